"""The experiments of docs/cifar10.md: each configuration runs in the small, on the weights that ship."""

import hashlib
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from test_protocols import nodes, write_images

from lit_purify.cli import evaluate, train
from lit_purify.models import load_classifier, load_denoiser

ROOT = Path(__file__).parent.parent
CONFIGS = {
    path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "configs/eval").glob("cifar10*.yaml"))
}
CARDS = (ROOT / "checkpoints/README.md").read_text()


def shrunk(settings, root):
    """The same defenses and attacks on two images, one step and one run of everything; of sweeps the ends."""
    settings = json.loads(json.dumps(settings))
    task, data = settings["model"]["init_args"], settings["data"]["init_args"]
    for attack in task["attacks"].values():
        attack["init_args"] |= {key: 1 for key in ("steps", "eot", "shift_steps") if key in attack["init_args"]}
    for node in nodes(task.get("families", {})):
        for key, value in node["init_args"].items():
            if isinstance(value, list) and key != "rules":
                node["init_args"][key] = [value[0], value[-1]] if key in ("level", "high", "jump", "tau") else value[:1]
    task |= {"runs": 1, "chunk": 4, "gallery": 0}
    data |= {"root": str(root), "download": False, "batch_size": 2, "num_workers": 0}
    data["subset"]["init_args"]["n"] = 2
    settings["trainer"] = {"logger": False, "accelerator": "cpu"}
    return settings


@pytest.mark.parametrize("name", CONFIGS)
def test_experiment_runs_in_the_small(name, tmp_path):
    write_images("CIFAR10", tmp_path / "data")
    (tmp_path / "data/test").rename(tmp_path / "data/train")
    write_images("CIFAR10", tmp_path / "data")
    for path in (tmp_path / "data").rglob("*.png"):
        path.rename(path.with_name(f"{path.parent.name}-{path.name}"))
    settings = shrunk(CONFIGS[name], tmp_path / "data")
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(settings, sort_keys=False))
    task = settings["model"]["init_args"]
    frontier = "families" in task
    evaluate([*(["frontier"] if frontier else []), "--config", str(config), "--run", str(tmp_path / "run")])
    rows = json.loads((tmp_path / "run/summary.json").read_text())["results"]
    rows = [(row["defense"], row["attack"]) for row in rows if "attacks" not in row]
    if frontier:
        assert all(any(defense.startswith(family) for defense, _ in rows) for family in task["families"])
    else:
        assert rows == [(defense, attack) for defense in task["defenses"] for attack in task["attacks"]]


def test_choices_are_made_on_validation_images():
    """The table alone reads the test images."""
    assert {
        name for name, settings in CONFIGS.items() if settings["data"]["init_args"].get("evaluate_on") != "val"
    } == {"cifar10"}


def test_cards_state_the_files():
    """Their hashes, and all of them."""
    stated = dict(reversed(line) for line in re.findall(r"^([0-9a-f]{64})  (\S+)$", CARDS, re.MULTILINE))
    files = sorted((ROOT / "checkpoints").glob("*.safetensors"))
    assert stated == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert sum(path.stat().st_size for path in files) < 40e6


@pytest.mark.parametrize(
    ("file", "recipe", "kind"),
    [
        ("cifar10_classifier", "cifar10_classifier", "classifier"),
        ("cifar10_classifier_adversarial", "cifar10_classifier_adversarial", "classifier"),
        ("cifar10_denoiser", "cifar10_denoiser", "denoiser"),
        ("digits_classifier", "digits_classifier", "classifier"),
        ("digits_denoiser", "digits_denoiser", "denoiser"),
    ],
)
def test_weights_are_of_the_networks_of_their_recipes(file, recipe, kind):
    read = {"classifier": load_classifier, "denoiser": load_denoiser}[kind]
    network = read(ROOT / f"checkpoints/{file}.safetensors")
    task = yaml.safe_load((ROOT / f"configs/train/{recipe}.yaml").read_text())["model"]["init_args"]
    wanted = task[kind]["init_args"]
    assert {key: network.config[key] for key in wanted} == wanted
    if kind == "denoiser":
        assert network.schedule.trained == task["max_level"]


@pytest.fixture
def recipe(tmp_path):
    """Runs the full-size recipe with a stand-in for Python: its status, its errors and the commands it gave."""
    stand_in, log = tmp_path / "python", tmp_path / "log"
    stand_in.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> "{log}"\ncase "$*" in *"$FAILING"*) exit 75;; esac\n')
    stand_in.chmod(0o755)

    def run(*flags, failing="no such word"):
        log.unlink(missing_ok=True)
        environment = {**os.environ, "PYTHON": str(stand_in), "FOLDER": str(tmp_path / "gpu"), "FAILING": failing}
        script = ROOT / "configs/cluster/cifar10_gpu.sh"
        done = subprocess.run([script, *flags], env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr, [line.split() for line in log.read_text().splitlines()]

    return run


def test_full_size_recipe_gives_valid_commands(recipe, capsys):
    status, _, commands = recipe("--data.init_args.root", "my/images")
    assert status == 0
    assert [command[0] for command in commands] == ["train.py"] * 3 + ["eval.py"]
    for command in commands:
        with pytest.raises(SystemExit) as exit_:
            (train if command[0] == "train.py" else evaluate)([*command[1:], "--print_config"])
        assert not exit_.value.code
        parsed = yaml.safe_load(capsys.readouterr().out)
        assert parsed["data"]["init_args"]["root"] == "my/images"
    defenses = parsed["model"]["init_args"]["defenses"]
    assert defenses["adversarial"]["init_args"]["network"]["init_args"]["path"].endswith(
        "gpu/adversarial/model.safetensors"
    )
    assert parsed["data"]["init_args"]["subset"]["init_args"]["n"] == 512
    assert {attack["init_args"]["steps"] for attack in parsed["model"]["init_args"]["attacks"].values()} == {100}


def test_full_size_recipe_goes_on_where_it_was(recipe, tmp_path):
    status, errors, commands = recipe(failing="/adversarial")
    assert (status, len(commands)) == (75, 2)
    assert "give the same command again" in errors
    last = tmp_path / "gpu/adversarial/checkpoints/last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    status, _, commands = recipe()
    assert (status, len(commands)) == (0, 4)
    assert ["--ckpt_path" in command for command in commands] == [False, True, False, False]
    assert commands[1][commands[1].index("--ckpt_path") + 1] == str(last)
