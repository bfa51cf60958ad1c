"""What the pages of docs/ say is so: links lead somewhere, examples, notebooks and extensions run, the site builds."""

import json
import re
import subprocess
import sys
import traceback
from pathlib import Path

import matplotlib
import pytest
import torch
from processes import tiny
from test_structure import PACKAGE

from lit_purify import cli
from lit_purify.models.unet import UNet

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "checkpoints/README.md", *sorted(DOCS.rglob("*.md"))]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_read_well_as_text(page):
    """Lines of prose are short, and dates and hashes are in the table at the end."""
    text = re.sub(r"```.*?```|^(?:\||\$\$|<!--).*?$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 140
    figures, _, _ = page.read_text().partition("## Provenance")
    assert re.findall(r"20\d\d-\d\d-\d\d", figures) == []


def test_gallery_is_small_and_complete():
    shown = set(re.findall(r"\(gallery/(\S+)\)", (DOCS / "gallery.md").read_text()))
    assert shown == {path.name for path in (DOCS / "gallery").iterdir()}
    assert sum(path.stat().st_size for path in (DOCS / "gallery").iterdir()) < 1_000_000


def test_extensions_of_contributing(tmp_path, monkeypatch, capsys):
    """Each is one file, one YAML and one test, outside of the package."""
    files = files_of("contributing.md")
    names = ["broken", "in_range", "rounds", "search", "stripes"]
    wanted = {file for name in names for file in (f"{name}.py", f"{name}.yaml", f"test_{name}.py")}
    assert set(files) == {"conftest.py"} | wanted
    lay(files, tmp_path)
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(tmp_path)
    # Theirs takes its place meanwhile.
    monkeypatch.setitem(sys.modules, "conftest", sys.modules["conftest"])
    plain = ["-o", "addopts=", "-q", "--rootdir", str(tmp_path), "-p", "no:cacheprovider", "-p", "no:xdist"]
    with capsys.disabled():
        status = pytest.main([*plain, "--import-mode=importlib", str(tmp_path)])
    assert status == 0
    for style in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *style, "--config", "pyproject.toml"]
        done = subprocess.run(
            [*ruff, *(str(tmp_path / f"{name}.py") for name in names)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_an_image_goes_the_way_that_contributing_says(tmp_path, monkeypatch):
    forward, ways = UNet.forward, set()

    def noting(self, *args):
        files = [Path(frame.filename) for frame in traceback.extract_stack()]
        inside = [str(file.relative_to(PACKAGE)) for file in files if file.is_relative_to(PACKAGE)]
        if torch.is_grad_enabled() and "attacks/base.py" in inside:
            ways.add(tuple(dict.fromkeys(file for file in inside if not file.startswith("cli/"))))
        return forward(self, *args)

    monkeypatch.setattr(UNet, "forward", noting)
    cli.evaluate(["--config", str(tiny(tmp_path / "tiny.yaml", samples=1)), f"--run={tmp_path / 'run'}"])
    (way,) = ways
    stations = re.findall(r"^\d\. (.*)$", (DOCS / "contributing.md").read_text(), re.MULTILINE)
    told = [file for line in stations for file in re.findall(r"`(\w+/\w+\.py)`", line)]
    assert len(stations) == 7
    assert [*dict.fromkeys((*way, "models/unet.py"))] == [*told[:-2], "models/accelerated.py", "models/unet.py"]


def test_first_evaluation_notebook(monkeypatch):
    """In the small, and stored without outputs."""
    cells = json.loads((DOCS / "notebooks/first_evaluation.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code")
    matplotlib.use("agg")
    monkeypatch.chdir(DOCS / "notebooks")
    names = {}
    for cell in code:
        exec(
            cell.replace("First(20)", "First(2)")
            .replace("steps=10, eot=2", "steps=1, eot=1")
            .replace("samples=2", "samples=1"),
            names,
        )
    assert [row["defense"] for row in names["result"].summary["results"]] == ["none", "uniform", "heterogeneous"]
    assert names["view"].mask is not None
