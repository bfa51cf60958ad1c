"""Generated pages of the site: README, the weights' card, and the API of each room; formulas."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
ROOMS = (
    "functional",
    "models",
    "defense",
    "attacks",
    "data",
    "evaluation",
    "checks",
    "training",
    "report",
    "callbacks",
    "cli",
)
MOVED = {"](../README.md": "](index.md", "](../checkpoints/README.md": "](weights.md"}


def on_files(files: Files, config: Any) -> Files:  # noqa: ANN401
    """Adds the generated pages."""
    home = (ROOT / "README.md").read_text().replace("](docs/", "](").replace("](checkpoints/README.md", "](weights.md")
    pages = {"index.md": home, "weights.md": (ROOT / "checkpoints/README.md").read_text()}
    pages |= {f"api/{room}.md": f"# lit_purify.{room}\n\n::: lit_purify.{room}\n" for room in ROOMS}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:  # noqa: ANN401
    """Redirects links to the generated pages."""
    for old, new in MOVED.items():
        markdown = markdown.replace(old, new)
    return markdown


def on_page_content(html: str, **_: Any) -> str:  # noqa: ANN401
    """Writes formulas as MathML, which browsers show without a script from elsewhere."""
    html = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', lambda m: convert(unescape(m[1])), html, flags=re.S)
    block = r'<div class="arithmatex">\\\[(.*?)\\\]</div>'
    return re.sub(block, lambda m: convert(unescape(m[1]), display="block"), html, flags=re.S)
