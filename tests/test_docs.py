"""What the pages of docs/ say is so: links lead somewhere, generated parts are new, examples and commands run."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def files_of(page):
    """The files that a page shows in full, by name: code blocks behind ``<!-- file: NAME -->``."""
    return dict(re.findall(r"<!-- file: (\S+) -->\n```\w*\n(.*?)```", (DOCS / page).read_text(), re.DOTALL))


def lay(files, folder):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def anchors(page):
    """What links to the headings of a page are called."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target


def test_reference_is_new():
    text = runpy.run_path(str(DOCS / "reference.py"))["page"]()
    assert (DOCS / "reference.md").read_text() == text, "docs/reference.md is old: run `python docs/reference.py`"


def test_reference_explains_every_argument():
    for line in (DOCS / "reference.md").read_text().splitlines():
        assert not re.fullmatch(r"\| `\w+` \| .*\|\s+\|", line), line


def test_new_purifier_of_contributing(tmp_path):
    """One file, one YAML and one test, outside of the package."""
    files = files_of("contributing.md")
    assert set(files) == {"rounds.py", "rounds.yaml", "test_rounds.py"}
    lay(files, tmp_path)
    run = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 500}
    path = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path / "test_rounds.py")]
    done = subprocess.run(tests, env=path, **run)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout
    for style in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *style, "--config", "pyproject.toml", str(tmp_path / "rounds.py")]
        done = subprocess.run(ruff, **run)
        assert done.returncode == 0, done.stdout + done.stderr
