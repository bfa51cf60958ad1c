"""The installed package: what a wheel holds, and that its commands work outside of a clone."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the contents of the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("lit_purify-*.whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(folder / "site")
    return folder / "site"


def test_contents(installed):
    names = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    for name in ("py.typed", "cli/eval.txt", "configs/eval/digits.yaml", "checkpoints/digits_denoiser.safetensors"):
        assert f"lit_purify/{name}" in names
    assert {path.name for path in (ROOT / "lit_purify/report/templates").iterdir()} <= {Path(n).name for n in names}
    assert not [name for name in names if name.startswith(("tests/", "docs/")) or "__pycache__" in name]
    (metadata,) = installed.glob("*.dist-info")
    stated = (metadata / "METADATA").read_text()
    for line in (ROOT / "requirements.txt").read_text().split():
        assert f"Requires-Dist: {line.partition('>=')[0]}".replace("_", "-") in stated.replace("_", "-"), line
    scripts = (metadata / "entry_points.txt").read_text()
    assert "lit-purify-eval = lit_purify.cli:evaluate" in scripts
    assert "lit-purify-train = lit_purify.cli:train" in scripts


def test_commands_work_in_any_folder(installed, tmp_path):
    """Shipped configurations and weights are found where nothing of that name lies in the working directory."""
    code = (
        "import sys; from lit_purify.cli import evaluate; import lit_purify as lp; "
        "lp.load_classifier('checkpoints/digits_classifier.safetensors'); evaluate(sys.argv[1:])"
    )
    run = [sys.executable, "-c", code, "--config", "configs/eval/digits_suite.yaml", "--print_config"]
    done = subprocess.run(
        run, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(installed), "HOME": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    assert "apgd" in yaml.safe_load(done.stdout)["attacks"]
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
