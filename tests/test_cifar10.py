"""The experiments of docs/cifar10.md: each configuration runs in the small, on the weights that ship."""

import hashlib
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from test_configs import made_evaluator
from test_protocols import instantiated

import lit_purify as lp
from lit_purify.cli import evaluate, train
from lit_purify.cli.settings import load

ROOT = Path(__file__).parent.parent
CONFIGS = {path.stem: load(path.read_text()) for path in sorted((ROOT / "configs/eval").glob("cifar10*.yaml"))}
CARDS = (ROOT / "checkpoints/README.md").read_text()


@pytest.mark.parametrize("name", CONFIGS)
def test_experiment_fits_the_weights_that_ship(name, monkeypatch):
    """Every defense and attack is made; an image goes through every defense, of families through the last point."""
    monkeypatch.chdir(ROOT)
    evaluator = made_evaluator(instantiated(CONFIGS[name]))
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for defense in {key.partition("/")[0]: key for key in evaluator.defenses}.values():
        assert evaluator.defenses[defense](image).isfinite().all(), defense


def test_choices_are_made_on_validation_images():
    """The tables alone read the test images."""
    assert {
        name for name, settings in CONFIGS.items() if settings["data"]["init_args"].get("evaluate_on") != "val"
    } == {"cifar10", "cifar10_league", "cifar10_second_test"}


def test_cards_state_the_files():
    """Their hashes, and all of them."""
    stated = dict(reversed(line) for line in re.findall(r"^([0-9a-f]{64})  (\S+)$", CARDS, re.MULTILINE))
    files = sorted((ROOT / "checkpoints").glob("*.safetensors"))
    assert stated == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert sum(path.stat().st_size for path in files) < 40e6


@pytest.mark.parametrize("path", sorted((ROOT / "checkpoints").glob("*.safetensors")), ids=lambda path: path.stem)
def test_weights_are_of_the_networks_of_their_recipes(path):
    """A recipe has the name of the file that it made."""
    kind = "denoiser" if "denoiser" in path.stem else "classifier"
    network = {"classifier": lp.load_classifier, "denoiser": lp.load_denoiser}[kind](path)
    task = load((ROOT / f"configs/train/{path.stem}.yaml").read_text())["model"]["init_args"]
    wanted = task[kind]["init_args"]
    assert {key: network.arguments[key] for key in wanted} == wanted
    if kind == "denoiser":
        assert network.schedule.trained == task["max_level"]


@pytest.fixture
def recipe(tmp_path):
    """Runs the full-size recipe with stand-ins for Python and timeout: its status and the commands it gave."""
    log = tmp_path / "log"
    log.touch()
    # Without --foreground, or with another signal, a training would not be asked to save.
    timed = '[ "$1 $2 $3 $4 $5" = "--foreground --preserve-status --signal TERM 420s" ] && shift 5 && exec "$@"'
    for name, does in {"python": "", "timeout": timed}.items():
        (tmp_path / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "${{0##*/}} $*" >> "{log}"\n{does}\n')
        (tmp_path / name).chmod(0o755)

    def run(*flags, **variables):
        place = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FOLDER": str(tmp_path / "gpu"), "SECONDS_EACH": "420"}
        place |= variables
        script = ROOT / "configs/cluster/cifar10_gpu.sh"
        done = subprocess.run([script, *flags], env={**os.environ, **place}, capture_output=True, check=False)
        given = [line.split() for line in log.read_text().splitlines()]
        return done.returncode, [words[1:] for words in given if words[0] == "python"]

    return run


@pytest.mark.parametrize("variables", [{"STAGES": "denoiser clasifier"}, {"SECONDS_EACH": "4m"}])
def test_full_size_recipe_refuses_what_it_does_not_know(recipe, variables):
    assert recipe(**variables) == (2, [])


def test_full_size_recipe_gives_valid_commands(recipe, tmp_path, capsys):
    """Each training goes on from its last checkpoint, if there is one; each stage takes what the ones before made."""
    status, commands = recipe("--data.root", "my/images")
    assert status == 0
    assert [command[0] for command in commands] == ["train.py"] * 3 + ["eval.py"]
    assert [command[command.index("--ckpt_path") + 1] for command in commands[:3]] == ["last"] * 3
    parsed = []
    for command in commands:
        with pytest.raises(SystemExit) as exit_:
            (train if command[0] == "train.py" else evaluate)([*command[1:], "--print_config"])
        assert not exit_.value.code
        parsed.append(yaml.safe_load(capsys.readouterr().out))
        assert parsed[-1]["data"]["init_args"]["root"] == "my/images"
    folder, table = tmp_path / "gpu", parsed[-1]
    network = parsed[2]["model"]["init_args"]["classifier"]
    assert network["init_args"]["path"] == str(folder / "classifier/model.safetensors")
    made = {name: table[name] for name in ("classifier", "denoiser")} | {
        "adversarial": table["defenses"]["adversarial"]
    }
    for name, network in made.items():
        assert network["init_args"]["path"] == str(folder / name / "model.safetensors")
