"""The shape of the library: who may import whom, and how large each room may be."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lit_purify"
FILES = sorted(PACKAGE.rglob("*.py"))

BUDGETS = {
    "functional": 1860,
    "models": 3510,
    "defense": 2020,
    "attacks": 2030,
    "data": 1490,
    "evaluation": 1610,
    "checks": 910,
    "training": 810,
    "report": 1100,
    "callbacks": 650,
    "cli": 1110,
}
"""Lines of each room at most: what it has today. A room may shrink; what lets it grow is a decision."""
LIBRARY, TESTS = 17_880, 15_310
_BASE = {"atomic", "errors", "recorded", "functional"}
_EVALUATED = _BASE | {"models", "defense", "attacks", "data", "evaluation"}
_ALL = _EVALUATED | {"checks", "training", "report", "callbacks", "private", "shipped", "api"}
ALLOWED = {
    "atomic": set(),
    "errors": set(),
    "private": set(),
    "recorded": {"errors"},
    "shipped": set(),
    "functional": {"errors"},
    "models": _BASE | {"private", "shipped"},
    "defense": _BASE | {"models"},
    "attacks": _BASE | {"private"},
    "data": _BASE | {"models", "private"},
    "evaluation": _EVALUATED,
    "checks": _EVALUATED,
    "training": _EVALUATED | {"private"},
    "report": _EVALUATED,
    "callbacks": _EVALUATED | {"checks", "training", "report", "private"},
    "api": _EVALUATED | {"checks", "report"},
    "__init__": {"api", "attacks", "defense", "errors", "models"},
    "cli": _ALL,
}
"""What each room may import of the others; imports go down only."""
FOREIGN = {
    "lightning": {"data", "evaluation", "training", "callbacks", "cli", "private"},
    "wandb": {"callbacks", "private"},
    "timm": {"models"},
    "matplotlib": set(),
    "jinja2": {"report"},
    "sklearn": {"data"},
    "torchmetrics": {"attacks", "training", "private"},
    "huggingface_hub": {"models"},
    "argparse": {"cli", "private"},
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


def test_imports_go_down_only():
    for path in FILES:
        own = part(path)
        for name in imports(path):
            words = name.split(".")
            if words[0] == "lit_purify" and words[1] != "__version__":
                assert words[1] == own or words[1] in ALLOWED[own], f"{path} imports {words[1]}"
            if words[0] in FOREIGN:
                assert own in FOREIGN[words[0]], f"{path} imports {words[0]}"
        if re.search(r"\benviron\b|getenv|sys\.argv", path.read_text()):
            assert own in ("cli", "private"), f"{path} reads arguments or the environment"


def lines(folder):
    return sum(len(path.read_text().splitlines()) for path in folder.rglob("*.py"))


def test_the_house_stays_small():
    assert {room: lines(PACKAGE / room) for room, most in BUDGETS.items() if lines(PACKAGE / room) > most} == {}
    assert lines(PACKAGE) <= LIBRARY
    assert lines(ROOT / "tests") <= TESTS
    assert max(len(path.read_text().splitlines()) for path in FILES) <= 400
    assert all(len((ROOT / name).read_text().splitlines()) <= 15 for name in ("train.py", "eval.py"))


def test_nothing_outside_the_command_line_knows_a_flag():
    """Messages name arguments; only the report shows commands, those that repeat it."""
    for path in FILES:
        if part(path) != "cli" and path.name != "html.py":
            texts = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
            found = [t for t in texts if re.search(r"(?<!wandb sync )--[a-z]\w+|init_args\.", str(t))]
            assert not found, f"{path}: {found}"
