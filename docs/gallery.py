"""Makes the pictures of docs/gallery.md from finished runs; that page shows the commands.

``python docs/gallery.py`` needs Chromium; the picture of ``wandb leet`` also needs tmux and ``pip install rich``.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "gallery"
RUN, STRONG, TRAINING = (ROOT / "runs" / name for name in ("digits", "digits_strong", "gallery_training"))
COMPARE = ROOT / "compare.html"
TERMINAL = (150, 40)
"""Columns and rows."""


def save(png: bytes, name: str) -> None:
    """Writes a screenshot as WebP."""
    Image.open(io.BytesIO(png)).convert("RGB").save(PICTURES / f"{name}.webp", quality=82, method=6)


def opened(browser: Any, page: Path, scheme: str = "light", height: int = 900) -> Any:  # noqa: ANN401
    """A page of a run in the browser."""
    context = browser.new_context(viewport={"width": 1180, "height": height}, color_scheme=scheme)
    shown = context.new_page()
    shown.goto(page.as_uri())
    return shown


def report(browser: Any) -> None:  # noqa: ANN401
    """The report: top, plot in dark colors, gallery of images with a filter."""
    page = opened(browser, RUN / "report.html", height=860)
    save(page.screenshot(), "report_top")
    for outcome in ("survived every run", "wrong when clean"):
        page.get_by_label(outcome).uncheck()
    page.get_by_label("none", exact=True).uncheck()
    page.set_viewport_size({"width": 1180, "height": 860})
    page.locator("section.gallery").evaluate("each => window.scrollTo(0, each.offsetTop - 10)")
    save(page.screenshot(), "report_images")
    dark = opened(browser, STRONG / "report.html", "dark")
    dark.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    save(dark.locator(".plots > *").first.screenshot(), "plot_accuracy")
    save(dark.locator(".plots").nth(1).screenshot(), "plot_diagnostics")


def compare(browser: Any) -> None:  # noqa: ANN401
    """The comparison of two evaluations."""
    save(opened(browser, COMPARE, height=960).screenshot(), "compare")


def overlays() -> None:
    """Two strips that the evaluation wrote."""
    strips = sorted((RUN / "overlays").glob("*heterogeneous*[0-9].png"))[1:3]
    for k, strip in enumerate(strips):
        shutil.copy(strip, PICTURES / f"overlay_{k}.png")


def terminal(browser: Any, run: Path, name: str, *keys: str) -> None:  # noqa: ANN401
    """A run in ``wandb leet``, after some keys."""
    from rich.console import Console
    from rich.terminal_theme import DIMMED_MONOKAI, TerminalTheme
    from rich.text import Text

    (part,) = (run / "wandb").glob("offline-run-*")
    tmux = ["tmux", "-L", "lit_purify_gallery"]
    size = [f"-{axis}{count}" for axis, count in zip("xy", TERMINAL, strict=True)]
    colors = f"env TERM=xterm-256color COLORTERM=truecolor WANDB_CONFIG_DIR={PICTURES}/leet"
    leet = f"{colors} {Path(sys.executable).parent}/wandb leet run {part}"
    subprocess.run([*tmux, "new-session", "-d", *size, leet], check=True)
    try:
        for key in ("", *keys):
            if key:
                subprocess.run([*tmux, "send-keys", key], check=True)
            time.sleep(1 if key else 12)
        shown = subprocess.run([*tmux, "capture-pane", "-e", "-p"], check=True, capture_output=True, text=True).stdout
    finally:
        subprocess.run([*tmux, "kill-server"], check=True)
        shutil.rmtree(PICTURES / "leet", ignore_errors=True)
    console = Console(record=True, width=TERMINAL[0], file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(shown), soft_wrap=True)
    theme = TerminalTheme((22, 24, 29), (213, 216, 222), [DIMMED_MONOKAI.ansi_colors[k] for k in range(8)])
    code = console.export_html(theme=theme, code_format="{code}", inline_styles=True)
    # Braille of another font is wider than a cell.
    code = re.sub("[\u2800-\u28ff]", r"<i>\g<0></i>", code)
    style = (
        "body {margin: 0; padding: 8px; background: #16181d; color: #d5d8de; width: max-content; height: max-content} "
    )
    style += "pre {margin: 0; font: 13px/15px 'DejaVu Sans Mono', monospace} "
    style += (
        "i {display: inline-block; width: 1ch; height: 15px; overflow: hidden; vertical-align: top; font-style: normal}"
    )
    page = browser.new_page(viewport={"width": 1250, "height": 700})
    page.set_content(f"<style>{style}</style><pre>{code}</pre>")
    save(page.locator("body").screenshot(), name)


def main() -> None:
    """All pictures, in docs/gallery."""
    PICTURES.mkdir(exist_ok=True)
    os.chdir(ROOT)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        report(browser)
        compare(browser)
        overlays()
        # "[" and "2" hide the panes of the run's facts and of the machine, "3" shows pictures.
        terminal(browser, TRAINING, "wandb_training", "[", "2")
        terminal(browser, RUN, "wandb_evaluation", "[", "2", "3", "C-l", "/", *"running/robust", "Enter")


if __name__ == "__main__":
    main()
