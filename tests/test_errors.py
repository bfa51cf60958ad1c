"""Wrong inputs: one line that names the thing and the remedy, exit status 2, no traceback, nothing half-written."""

import json
import os
import pickle
import re
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RESNET, UNET, training_on_digits, written
from PIL import Image
from processes import launch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lit_purify import cli
from lit_purify.cli.messages import explanation
from lit_purify.defense import NoPurifier
from lit_purify.errors import InputError
from lit_purify.evaluation import RobustnessTask
from lit_purify.evaluation.folder import RunFolder
from lit_purify.models import ResNetClassifier, UNet
from lit_purify.models.files import save_network

ATTACK = "attacks.pgd"
UNIFORM = "defenses.uniform"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_network(ResNetClassifier(**RESNET), folder / "classifier.safetensors")
    save_network(UNet(**UNET), folder / "denoiser.safetensors")
    return folder


@pytest.fixture
def evaluation(weights):
    """A configuration that is right, in about a tenth of a second."""
    return {
        "classifier": str(weights / "classifier.safetensors"),
        "denoiser": str(weights / "denoiser.safetensors"),
        "defenses": {"none": "NoPurifier", "uniform": {"class_path": "UniformPurifier", "level": 100, "steps": 2}},
        "attacks": {"pgd": {"class_path": "PGD", "eps": 0.1, "steps": 1, "step_size": 0.1}},
        "runs": 2,
        "chunk": 8,
        "data": {"class_path": "Digits", "batch_size": 2, "subset": {"class_path": "First", "n": 4}},
        "trainer": {"logger": False, "accelerator": "cpu"},
    }


@pytest.fixture
def training():
    """A configuration of ``train.py fit`` that is right and takes one step."""
    model = {"classifier": {"class_path": "ResNetClassifier", **RESNET}}
    few = {"max_steps": 1, "limit_val_batches": 1, "enable_checkpointing": False}
    return training_on_digits("ClassifierTask", model, {"batch_size": 8}, {"Export": {}}, **few)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def refused_with(refused, tmp_path, run):
    """As ``refused``, with a configuration of which some keys are changed, and flags."""

    def call(function, words, config, changes, flags, writes=False):
        said = refused(function, *words, "--config", written_to(tmp_path, config, changes), "--run", run, *flags)
        assert len(said) < 400
        assert writes or not run.exists(), "a refused command wrote something"
        return said

    return call


@pytest.fixture
def refused_evaluation(refused_with, evaluation):
    return lambda changes=None, *flags, **options: refused_with(cli.evaluate, [], evaluation, changes, flags, **options)


@pytest.fixture
def refused_training(refused_with, training):
    return lambda changes=None, *flags, **options: refused_with(cli.train, ["fit"], training, changes, flags, **options)


@pytest.fixture
def evaluate(monkeypatch, evaluation, tmp_path, run):
    """Runs a command that must work; returns its records without their times."""

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["eval.py"])
        cli.evaluate(["--config", str(written_to(tmp_path, evaluation, None)), "--run", str(run), *flags])
        records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
        return [{**record, "seconds": None} for record in records]

    return call


def changed(config, key, value):
    """Sets a dotted key; ``None`` as value removes it."""
    *parents, last = key.split(".")
    for parent in parents:
        config = config[parent]
    if value is None:
        del config[last]
    else:
        config[last] = value


def written_to(folder, config, changes):
    for key, value in (changes or {}).items():
        changed(config, key, value)
    return written(folder / "config.yaml", config)


def image_folder(root, classes=2, shape=(8, 8), count=2):
    """Constant images in one subfolder a class; further subfolders are empty: as many as the classifier has classes."""
    for label in range(max(classes, 10)):
        folder = root / f"class{label:02d}"
        folder.mkdir(parents=True)
        for item in range(count * (label < classes)):
            Image.fromarray(np.full(shape, 60 * item, dtype=np.uint8)).save(folder / f"{item}.png")
    return root


def images_from(root, **options):
    """All images of a folder are the test split."""
    init_args = {"root": str(root), "channels": 1, "val_fraction": 0.0, "test_fraction": 1.0, **options}
    return {"class_path": "ImageFolder", "init_args": init_args}


class Blur(NoPurifier):
    """A purifier without a network, whose constructor leaves the denoiser out."""

    def __init__(self, sigma: float):
        super().__init__()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("defences", {"none": "NoPurifier"}, "there is no setting defences.none; did you mean defenses?"),
        ("rnus", 3, "there is no setting rnus; did you mean runs?"),
        (f"{UNIFORM}.foo", 5, "UniformPurifier has no option foo; it has level, steps, sampler, recompute"),
        (
            "classifier",
            {"class_path": "lit_purify.models.load_classifier", "pth": 5},
            "load_classifier has no option pth; did you mean path?",
        ),
        ("trainer.logger", [{"class_path": "CSVLogger", "sav_dir": "x"}], "did you mean save_dir?"),
        (UNIFORM, {"class_path": "test_errors.Blur", "sigma": 0.1}, "first argument of a purifier must be denoiser"),
        (f"{UNIFORM}.level", "five", "defenses: UniformPurifier.level: expected int; got five"),
        (f"{UNIFORM}.sampler", "ddimm", "UniformPurifier.sampler: expected 'ddim', 'ddpm', 'sde'; got ddimm"),
        (f"{ATTACK}.steps", 5.5, "attacks: PGD.steps: expected int; got 5.5"),
        ("seed", -1, "seed = -1 is outside"),
        ("attacks", None, "no attacks given: name a configuration with --config"),
        (f"{UNIFORM}.level", None, "defenses: level is missing: add it"),
        ("data", None, "no data given: name a configuration with --config"),
        (UNIFORM, 5, "defenses: a class is needed: give its class_path"),
        ("data", "Digitz", "data: there is no class Digitz; did you mean Digits?"),
        (f"{UNIFORM}.class_path", "PGD", "defenses: PGD is of another kind than this place needs"),
        (
            f"{UNIFORM}.class_path",
            "lit_purify.defense.Uniform",
            "module 'lit_purify.defense' has no attribute 'Uniform'; check class_path",
        ),
        ("defenses", {}, "defenses is empty: give at least one"),
        (
            "defenses",
            {100: "NoPurifier"},
            "config.yaml: defenses: YAML reads a name here as 100 (int): put it in quotes",
        ),
        ("baseline", False, "baseline: expected str or null; got False: put it in quotes if it is text"),
        ("baseline", "best", "baseline = 'best' is not among the defenses none, uniform"),
        ("trainer.accelerator", "abacus", "invalid accelerator name"),
        ("precision", "fp8", "precision"),
        ("trainer.strategy", "ddp_spawn", "trainer.strategy = ddp_spawn: use ddp"),
    ],
)
def test_configuration(refused_evaluation, key, value, said):
    assert said in refused_evaluation({key: value})


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--defences", "3"], "there is no setting defences; did you mean defenses?"),
        # Abbreviations, both with one meaning only.
        (["--trainer.device", "3"], "there is no setting trainer.device; did you mean trainer.devices?"),
        (["--data.batch", "4"], "data: Digits has no option batch; did you mean batch_size?"),
        ([f"--{UNIFORM}.levl", "5"], "defenses: UniformPurifier has no option levl; did you mean level?"),
        (["--atacks.pgd.steps", "5"], "there is no setting atacks; did you mean attacks?"),
        (["--attacks.pdg.steps", "5"], "--attacks.pdg.steps: no class accepts it: check name and value"),
        (["stray"], "unexpected argument stray; eval.py takes one of test, frontier"),
        (["tset"], "unexpected argument tset; did you mean test?"),
        (["--trainer.accelerator", "gpu"], "trainer.accelerator = gpu: torch finds no such device"),
        (["--classifier", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["--trainer.logger.mode", "onlin"], "--trainer.logger.mode: no class accepts it: check name and value"),
        (["--runs"], "--runs: expected one argument"),
        (["--model.init_args.runs", "2"], "there is no setting model; move its settings to the top level"),
    ],
)
def test_flags(refused_evaluation, flags, said):
    assert said in refused_evaluation(None, *flags)


def test_several_loggers_are_no_error(evaluate, run):
    """The parser tries a single logger first: what it says about that must not end the command."""
    evaluate("--trainer.logger", f"[{{class_path: CSVLogger, init_args: {{save_dir: {run}}}}}]")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such configuration; name another with --config"),
        (b"classifier:\n  class_path: [unclosed\ndata: x\n", "not valid YAML, correct it: line 3: "),
        (b"- 1\n- 2\n", "holds no settings"),
        (bytes(range(256)), "not a YAML text file"),
    ],
)
def test_configuration_file(refused, tmp_path, content, said):
    path = tmp_path / "settings.yaml"
    if content is not None:
        path.write_bytes(content)
    assert refused(cli.evaluate, "--config", path).startswith(f"{path}: {said}")
    assert refused(cli.train, "fit", f"--config={path}").startswith(f"{path}: {said}")


def test_training_without_a_configuration(refused):
    for words in ([], ["fti"]):
        assert "the command is missing, use one of fit, validate, export: fit --config FILE trains" in refused(
            cli.train, *words
        )
    assert "no model given: name a configuration with --config" in refused(cli.train, "fit")


def test_what_a_constructor_refuses_has_its_place(refused_evaluation):
    assert refused_evaluation({f"{UNIFORM}.level": 0}).startswith("defenses.uniform: level = 0 is outside 1 .. 1000")


def test_weights_of_a_configuration(refused_evaluation):
    said = refused_evaluation({"denoiser": "runs/mine/model.safetensors"})
    assert said.startswith("runs/mine/model.safetensors: no such file; check the path, train it (configs/train)")


class Code:
    """Pickles as a call that makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(("workers", "name"), [(0, "class00/0.png"), (1, "class01/1.png")], ids=["first", "last"])
def test_unreadable_image(refused_evaluation, evaluate, evaluation, tmp_path, run, workers, name):
    root = image_folder(tmp_path / "images")
    image = (root / name).read_bytes()
    (root / name).write_bytes(image[:30])
    changes = {"data": images_from(root, batch_size=1, num_workers=workers)}
    # The first image is read before anything is written.
    said = refused_evaluation(changes, writes=name == "class01/1.png")
    assert said == f"{root / name}: cannot be read as an image: remove or replace it"
    (root / name).write_bytes(image)
    assert len(evaluate()) == 8


@pytest.mark.parametrize("batch_size", [1, 4])
def test_images_of_several_sizes(refused_evaluation, tmp_path, batch_size):
    root = image_folder(tmp_path / "images")
    Image.fromarray(np.zeros((9, 9), dtype=np.uint8)).save(root / "class01" / "1.png")
    said = refused_evaluation({"data": images_from(root, batch_size=batch_size)}, writes=True)
    assert "(1, 9, 9)" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.classifier.size": 16}, "the classifier takes images of shape (1, 16, 16), the data has (1, 8, 8)"),
        ({"model.classifier.num_classes": 5}, "the data has 10 classes (0, 1, 2 ...) but the classifier has 5"),
        ({"model.lerning_rate": 1}, "ClassifierTask has no option lerning_rate; did you mean learning_rate?"),
        ({"model.learning_rate": -1}, "learning_rate = -1"),
        ({"model.classifier.depth": 9}, "depth = 9 is not 6 n + 2"),
        ({"trainer.val_check_interval": 5000}, "`val_check_interval` (5000) must be less than or equal"),
        ({"trainer.strategy": "foo"}, "invalid strategy name"),
        ({"trainer.max_steps": -1, "trainer.max_epochs": -1}, "set trainer.max_steps or trainer.max_epochs"),
        ({"trainer.precision": "bf16-true"}, "trainer.precision = bf16-true: use 32-true, bf16-mixed"),
    ],
)
def test_training(refused_training, changes, said):
    assert said in refused_training(changes)


def test_checkpoint_to_resume_from(refused_training, tmp_path):
    path = tmp_path / "last.ckpt"
    assert refused_training(None, "--ckpt_path", path) == f"{path}: no such checkpoint; check ckpt_path"
    for content in (b"text", pickle.dumps({"state_dict": Code(tmp_path / "trap")})):
        path.write_bytes(content)
        assert refused_training(None, "--ckpt_path", path).startswith(f"{path}: not a checkpoint that train.py saved")
    assert not (tmp_path / "trap").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
@pytest.mark.parametrize("place", ["file", "file/run", "/proc/lit_purify/run"])
def test_run_folder_that_cannot_be_made(refused, evaluation, training, tmp_path, place):
    """Permission bits do not bind root; these do."""
    (tmp_path / "file").write_text("")
    run = tmp_path / place
    for function, argv, config in ((cli.evaluate, [], evaluation), (cli.train, ["fit"], training)):
        said = refused(function, *argv, "--config", written_to(tmp_path, config, None), "--run", run)
        assert said.startswith("/proc" if place.startswith("/") else str(run))
        assert said.endswith("; choose another folder with --run")


def test_path_outside_the_run_folder(refused_training, tmp_path):
    path = tmp_path / "config.yaml" / "model.safetensors"
    export = [{"class_path": "Export", "init_args": {"path": str(path)}}]
    said = refused_training({"trainer.callbacks": export}, writes=True)
    assert said.startswith(f"{path.parent}: ")
    assert said.endswith("; check the path")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "overlays/none.pgd.000000.png"])
def test_no_space_left(refused_evaluation, evaluate, run, name):
    partial = run / f"{name}.partial"
    partial.parent.mkdir(parents=True)
    partial.symlink_to("/dev/full")
    said = refused_evaluation(writes=True)
    assert said == f"{run}: no space left; choose another folder with --run"
    assert not (run / name).exists()
    assert not partial.is_symlink()
    assert len(evaluate()) == 8


def test_no_space_left_for_records(refused_evaluation, evaluate, monkeypatch, run):
    def full(stream, records):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("lit_purify.callbacks.run_writer.append_records", full)
        said = refused_evaluation(writes=True)
    assert said == (
        f"{run / 'records.jsonl'}: no space left on device: free some space and run the same command again; "
        "existing records stay"
    )
    assert len(evaluate()) == 8


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_no_space_left_for_the_network(refused_training, run):
    run.mkdir()
    partial = run / "model.safetensors.partial"
    partial.symlink_to("/dev/full")
    assert refused_training(writes=True) == f"{run}: no space left; choose another folder with --run"
    assert sorted(path.name for path in run.iterdir()) == [".lock", "config.yaml"]


def test_other_settings_without_records(run):
    """A run that ended before its first record does not hold the folder."""
    folder = RunFolder(run)
    folder.claim({"a": 1}, None, write=True)
    folder.claim({"a": 2}, None, write=True)
    folder.records.write_text(json.dumps({**dict.fromkeys(RECORD), "label": 0, "clean": [], "adversarial": []}) + "\n")
    with pytest.raises(InputError, match=r"a: 2 there, 3 here"):
        folder.claim({"a": 3}, None, write=True)


RECORD = ["defense", "attack", "index", "label", "clean", "adversarial", "linf", "l2", "seconds"]


def test_only_one_process_speaks_before_the_run(evaluation, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        cli.evaluate(["--config", str(written_to(tmp_path, evaluation, {"modle": 3}))])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == ""


def test_every_process_speaks_of_its_own_data(refused_evaluation, monkeypatch, tmp_path, run):
    """Of an image that another process reads, rank zero does not know."""
    run.mkdir()
    root = image_folder(tmp_path / "images")
    bad = root / "class01" / "1.png"
    bad.write_bytes(b"")
    monkeypatch.setenv("RANK", "1")
    said = refused_evaluation({"data": images_from(root, batch_size=1)}, writes=True)
    assert said == f"{bad}: cannot be read as an image: remove or replace it [rank 1]"


class Killed(Dataset):
    def __getitem__(self, item):
        os._exit(1)

    def __len__(self):
        return 1


def test_what_torch_says_is_translated(monkeypatch):
    # How long torch waits for a batch before it looks whether its workers live.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    with pytest.raises(RuntimeError) as killed:
        next(iter(DataLoader(Killed(), num_workers=1)))
    assert "lower data.num_workers" in explanation(killed.value, None)
    with pytest.raises(ValueError, match="more than 1 value") as single:
        nn.BatchNorm2d(1)(torch.zeros(1, 1, 1, 1))
    assert "raise data.batch_size" in explanation(single.value, None)


def test_a_port_that_another_program_has(refused_evaluation, monkeypatch):
    with socket.create_server(("", 0)) as other:
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        said = refused_evaluation(None, "--trainer.devices", "2")
    assert re.match(r"MASTER_PORT = \d+: the port cannot be used; unset it", said)


def test_bugs_keep_their_traceback(evaluate, monkeypatch):
    def broken(self, batch, batch_idx):
        raise RuntimeError("a bug")

    monkeypatch.setattr(RobustnessTask, "test_step", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        evaluate()


def test_the_whole_standard_error(evaluation, tmp_path, run):
    """All that a user sees, with whatever libraries print."""
    root = image_folder(tmp_path / "images", classes=10, count=1)
    (root / "class01" / "0.png").write_bytes(b"")
    evaluation["data"] = images_from(root, batch_size=1, num_workers=1)
    launched = launch(written_to(tmp_path, evaluation, None), run)
    assert launched.wait() == [2]
    assert launched.said.startswith(f"eval.py: error: {root}/class01/0.png: cannot be read as an image")
    assert launched.said.count("\n") == 1


@pytest.mark.parametrize("flags", [[], ["--trainer.devices", "1"]])
def test_processes_that_know_nothing_of_each_other(refused_evaluation, monkeypatch, flags):
    """As torchrun starts them, without the flags."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refused_evaluation(None, *flags, "--trainer.accelerator", "cpu")
    assert said.startswith("2 processes were started (WORLD_SIZE), the trainer has 1: add --trainer.devices 2")


@pytest.mark.parametrize(
    ("shape", "options", "changes", "said"),
    [
        ((9, 9, 3), {"channels": 3}, {}, "the classifier takes images of shape (1, 8, 8), the data has (3, 9, 9)"),
        # The defended one fits.
        (
            (8, 8),
            {},
            {UNIFORM: {"class_path": "ResNetClassifier", **RESNET, "size": 16}},
            "defenses.uniform: the classifier takes images of shape (1, 16, 16), the data has (1, 8, 8)",
        ),
        (
            (16, 16),
            {},
            {"classifier": {"class_path": "ResNetClassifier", **RESNET, "size": 16}},
            "the denoiser takes images of shape (1, 8, 8), the data has (1, 16, 16):",
        ),
        (
            (8, 8),
            {"classes": 11},
            {},
            "the data has 11 classes (class00, class01, class02 ...) but the classifier has 10: ",
        ),
    ],
)
def test_data_and_networks(refused_evaluation, tmp_path, run, shape, options, changes, said):
    """A logger would make folders as soon as the run starts."""
    root = image_folder(tmp_path / "images", options.pop("classes", 2), shape)
    changes["trainer.logger"] = {"class_path": "CSVLogger", "save_dir": str(run)}
    assert refused_evaluation({"data": images_from(root, **options), **changes}).startswith(said)
