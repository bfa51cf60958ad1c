"""Every configuration that ships is complete and valid."""

import pytest
import torch
from conftest import ROOT, written

from lit_purify.cli import evaluate
from lit_purify.cli.settings import arguments, evaluation_parser, load
from lit_purify.cli.training import training_parser
from lit_purify.evaluation import Evaluator

# Those of sweeps are in the format of W&B: see test_wandb.py.
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "sweep")


# Protocols are made in test_protocols.py, the evaluations of CIFAR-10 in test_cifar10.py.
@pytest.mark.parametrize(
    "path",
    [path for path in CONFIGS if path.parent.name == "train" or path.stem.startswith(("digits", "folder"))],
    ids=lambda p: f"{p.parent.name}-{p.stem}",
)
def test_config_is_valid(path, monkeypatch):
    """What names shipped weights alone is made too."""
    monkeypatch.chdir(ROOT)
    parser = training_parser() if path.parent.name == "train" else evaluation_parser()
    settings = parser.parse_args(["--config", str(path)])
    if path.parent.name == "train":
        assert settings.model.class_path.startswith("lit_purify.training.")
    elif path.stem != "folder":
        made_evaluator(parser.instantiate(settings))


def made_evaluator(made):
    """The evaluator of an instantiated configuration."""
    defenses = {
        name: make if isinstance(make, torch.nn.Module) else make(made.denoiser) for name, make in made.defenses.items()
    }
    return Evaluator(made.classifier, defenses, made.attacks, made.gradients, made.baseline, made.runs, made.chunk)


def test_paths_begin_at_home(monkeypatch, tmp_path):
    """A shell leaves ``~`` in ``--run=~/x``, YAML leaves it everywhere."""
    monkeypatch.setenv("HOME", str(tmp_path))
    x, y = str(tmp_path / "x"), str(tmp_path / "y")
    assert arguments(["--run=~/x", "--data.root", "~/y"]) == [f"--run={x}", "--data.root", y]
    assert load("{run: ~/x, data: {root: ~/y}}") == {"run": x, "data": {"root": y}}


@pytest.mark.parametrize("task", ["RobustnessTask", "lit_purify.tasks.FrontierTask"])
def test_a_configuration_of_the_first_version_is_refused_in_one_line(task, tmp_path, refused):
    settings = {"seed_everything": 0, "model": {"class_path": task, "init_args": {"runs": 8}}}
    line = refused(evaluate, "--config", written(tmp_path / "old.yaml", settings))
    assert "there is no setting model; move its settings to the top level of the file" in line
    said = refused(evaluate, "--seed_everything", "0")
    assert "there is no setting seed_everything; leave it out: seed is" in said
