"""The shape of the library: who may import whom."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lit_purify"
FILES = sorted(PACKAGE.rglob("*.py"))

_BASE = {"errors", "recorded", "functional"}
_EVALUATED = _BASE | {"models", "defense", "attacks", "data", "evaluation", "private"}
ALLOWED = {
    "errors": set(),
    "private": {"errors"},
    "recorded": {"errors"},
    "functional": {"errors"},
    "models": _BASE,
    "defense": _BASE | {"models"},
    "attacks": _BASE,
    "data": _BASE | {"models", "private"},
    "evaluation": _EVALUATED,
    "checks": _EVALUATED,
    "training": _EVALUATED,
    "report": _EVALUATED,
    "callbacks": _EVALUATED | {"checks", "training", "report"},
    "cli": _EVALUATED | {"checks", "training", "report", "callbacks"},
}
"""What each room may import of the others; imports go down only."""
FOREIGN = {
    "lightning": {"data", "evaluation", "checks", "training", "callbacks", "cli", "private"},
    "wandb": {"callbacks", "private"},
    "timm": {"models"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "sklearn": {"data"},
    "torchmetrics": {"evaluation", "training"},
    "huggingface_hub": {"models"},
    "argparse": {"cli"},
    "jsonargparse": {"cli"},
}


def part(path):
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    own = part(path)
    for name in imports(path):
        words = name.split(".")
        if words[0] == "lit_purify" and words[1] != "__version__":
            assert words[1] == own or words[1] in ALLOWED[own], f"{own} imports {words[1]}"
        if words[0] in FOREIGN:
            assert own in FOREIGN[words[0]], f"{own} imports {words[0]}"
        # Where downloads are kept belongs to the machine, not to a run.
        if re.search(r"\benviron\b|getenv|sys\.argv", path.read_text()) and path.name != "sources.py":
            assert own in ("cli", "private"), f"{own} reads arguments or the environment"


def test_files_stay_small():
    lines = {path: len(path.read_text().splitlines()) for path in FILES}
    assert max(lines.values()) <= 400
    assert all(len((ROOT / name).read_text().splitlines()) <= 15 for name in ("train.py", "eval.py"))
