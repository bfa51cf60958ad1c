"""Every configuration that ships is complete and valid."""

from pathlib import Path

import pytest
import yaml

from lit_purify.cli import evaluate, train

ROOT = Path(__file__).parent.parent
# Those of sweeps are in the format of W&B: see test_wandb.py.
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "sweep")


# Those of protocols run in test_protocols.py.
@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.parent.name != "protocols"], ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_config_is_valid(path, capsys):
    run, command = (train, ["fit"]) if path.parent.name == "train" else (evaluate, [])
    with pytest.raises(SystemExit) as exit_:
        run([*command, "--config", str(path), "--print_config"])
    assert not exit_.value.code
    parsed = yaml.safe_load(capsys.readouterr().out)
    assert parsed["model"]["class_path"].startswith("lit_purify.training.")


def scientific(node):
    """Every class_path with its arguments, at any depth."""
    if isinstance(node, dict):
        if "class_path" in node:
            yield node["class_path"].rpartition(".")[2], set(node.get("init_args", {}))
        for value in node.values():
            yield from scientific(value)


STATED = {
    "PGD": {"norm", "eps", "steps", "step_size", "eot", "loss", "select", "random_start"},
    "MaskShift": {"norm", "eps", "steps", "step_size", "eot", "loss", "select", "random_start", "shift_steps"},
    "APGD": {"norm", "eps", "steps", "eot", "loss", "targets", "select"},
    "Square": {"norm", "eps", "steps", "eot", "p"},
    "UniformPurifier": {"level", "steps", "sampler"},
    "GradualPurifier": {"level", "steps", "sampler"},
    "HeterogeneousPurifier": {"mask", "high", "low", "steps", "resampling", "jump"},
    "VariableIntensityPurifier": {"mask", "high", "low", "steps"},
    "TopFraction": {"fraction"},
    "MinMaxThreshold": {"tau"},
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_scientific_parameters_are_stated(path):
    """A change of class keeps arguments of the same name, so a default must not stand in for a stated value."""
    for name, given in scientific(yaml.safe_load(path.read_text())):
        assert STATED.get(name, set()) <= given, name
