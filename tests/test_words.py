"""Plain English: words and patterns that make a reader read a sentence twice. The list grows here and nowhere else."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OUT = (
    r"anew|heeds?|for want of|lives on|owed|told|said|(?:is|are|was) meant|somebody|nobody can|whoever|meanwhile|dice"
    r"|go(?:es|ing)? on|went on|flatters?|looks? away|one's own|to be had|stands? (?:in for|there|beside)|asked of"
    r"|(?:be|is) waited for|whatever be|and of nothing else|what is attacked"
    r"|one (?:file|line|row|image|value|folder|subfolder|letter) an? \w+"
)
"""Words and phrases that are out of code, pages and configurations."""
START = r"(?:What|Of|Those|That|Whose|As|None|Begins|In order|Nothing)\b(?! fewer)|See ``\w+``\.$"
"""Starts of docstrings that do not name what the reader gets."""
SOURCES = sorted((ROOT / "lit_purify").rglob("*.py"))
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "checkpoints/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = [
    *PAGES,
    *sorted((ROOT / "configs").rglob("*.*")),
    *sorted((ROOT / "docs").glob("*.py")),
    *SOURCES,
]


def prose(path):
    """Lines and texts: comments and strings of code, all lines of other files."""
    if path.suffix != ".py":
        return list(enumerate(path.read_text().splitlines(), start=1))
    kinds = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1))
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return [(token.start[0], token.string) for token in tokens if token.type in kinds]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_words_that_are_out(path):
    found = [(line, match[0]) for line, text in prose(path) for match in re.finditer(rf"\b(?:{OUT})\b", text, re.I)]
    assert found == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_name_what_the_reader_gets(path):
    nodes = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Expr)]
    texts = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    assert [text.splitlines()[0] for text in texts if re.match(START, text)] == []
