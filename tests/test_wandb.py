"""What an offline W&B run holds: read back from the file that would be uploaded."""

import itertools
import json
import struct
from pathlib import Path

import pytest
import wandb
import yaml
from wandb.proto import wandb_internal_pb2
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from lit_purify.callbacks import WandbRun
from lit_purify.cli import evaluate
from lit_purify.cli.settings import arguments, dump, evaluation_parser, simplified
from lit_purify.errors import InputError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An offline run where HOME cannot be written, as in some containers."""
    folder = tmp_path_factory.mktemp("wandb") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", "/sys")
        # Set by the run, which another one of this process would keep.
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            patch.setenv(name, "")
            patch.delenv(name)
        patch.chdir(ROOT)
        wandb.teardown()
        few = ["--runs=2", "--chunk=8", "--gallery=2", "--data.subset.n=4"]
        evaluate([f"--run={folder}", "--attacks.pgd.steps=1", "--attacks.pgd.eot=1", *few])
        # The client's process may still be writing.
        wandb.teardown()
    return folder


def transactions(path):
    """The messages of a .wandb file: a LevelDB log (blocks of 32 KiB, chunks that begin or end one)."""
    data, position, message = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        message = message * (kind in (3, 4)) + data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield message


def read(path):
    for message in transactions(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(message)
        yield record


@pytest.fixture(scope="module")
def messages(run):
    (path,) = run.glob("wandb/offline-run-*/run-*.wandb")
    return list(read(path))


def test_pictures_of_the_table_are_staged_in_the_folder(run, messages):
    """They are uploaded as the table's artifact, from where the client keeps them."""
    (artifact,) = [m.artifact for m in messages if m.HasField("artifact") and m.artifact.name.endswith("samples")]
    files = {content.path: Path(content.local_path) for content in artifact.manifest.contents}
    assert not [path for path in files.values() if not (path.is_relative_to(run) and path.exists())]
    found = json.loads(files["samples.table.json"].read_text())
    row = dict(zip(found["columns"], found["data"][0], strict=True))
    assert all(row[name]["path"] in files for name in ("original", "adversarial", "mask", "noised", "purified"))
    assert "strong_noise" in row["mask"]["masks"]


def test_running_accuracies_end_at_the_final_ones(run, messages):
    """Of one process: all samples."""
    items = [item for message in messages if message.HasField("history") for item in message.history.item]
    logged = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
    for result in json.loads((run / "summary.json").read_text())["results"]:
        for name, kind in (
            (f"robust/{result['defense']}/{result['attack']}", "robust"),
            (f"clean/{result['defense']}", "clean"),
        ):
            assert logged[f"{name}/average"] == pytest.approx(result[kind]["average"][0], abs=1e-6)
            assert logged[f"running/{name}"] == pytest.approx(result[kind]["average"][0], abs=1e-6)


def test_disabled_leaves_nothing(tmp_path):
    logger = WandbRun(mode="disabled", save_dir=str(tmp_path))
    logger.log_metrics({"a": 1.0})
    logger.finalize("success")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [{"project": "a/b"}, {"tags": ["t" * 65]}, {"id": "a/b"}, {"patience": 0}])
def test_names_that_the_client_refuses_are_refused_at_once(tmp_path, wrong):
    with pytest.raises(InputError):
        WandbRun(save_dir=str(tmp_path), **wrong)


# Sweeps

SWEEPS = sorted((ROOT / "configs/sweep").glob("*.yaml"))


def commands(path):
    """The commands of a sweep over all combinations, as the agent of W&B makes them."""
    sweep = yaml.safe_load(path.read_text())
    names, values = zip(*((name, each["values"]) for name, each in sweep["parameters"].items()), strict=True)
    for combination in itertools.product(*values):
        given = {name: {"value": value} for name, value in zip(names, combination, strict=True)}
        parts = {**create_sweep_command_args({"args": given}), "env": [], "interpreter": [], "program": []}
        words = create_sweep_command(list(sweep["command"]))
        yield dict(zip(names, combination, strict=True)), [p for w in words for p in parts.get(w[2:-1], [w])]


def holds(found, wanted):
    """Short names of classes stand for full ones, and what is not given has its default."""
    if isinstance(wanted, dict):
        return all(holds(found[key], value) for key, value in wanted.items())
    return found == wanted or str(found["class_path"] if isinstance(found, dict) else found).endswith(f".{wanted}")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_every_combination_of_a_sweep_is_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    parser = evaluation_parser()
    for given, words in commands(path):
        settings = yaml.safe_load(dump(parser, parser.parse_args(arguments(words))))
        assert list(settings["defenses"]) == ["variable"]
        assert settings["trainer"]["logger"]["init_args"]["mode"] == "online"
        for name, value in given.items():
            found = settings
            for key in name.split("."):
                found = found[key] if key in found else found["init_args"][key]
            assert holds(found, simplified(yaml.safe_load(str(value)))), name


def test_runs_of_a_sweep_have_folders_of_their_own(monkeypatch, tmp_path):
    """And log what the sweep is judged by."""
    path = ROOT / "configs/sweep/levels.yaml"
    (_, words), *_ = commands(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    wandb.teardown()
    networks = [f"--{name}={ROOT}/checkpoints/digits_{name}.safetensors" for name in ("classifier", "denoiser")]
    small = ["--attacks.pgd.steps=1", "--attacks.pgd.eot=1", "--runs=1", "--data.subset.n=2"]
    words = [word.replace("configs/", f"{ROOT}/configs/") for word in words]
    evaluate([*words, *networks, *small, "--trainer.logger.mode=offline"])
    wandb.teardown()
    run = tmp_path / "runs/sweep-s1/r1"
    (file,) = run.glob("wandb/offline-run-*-r1/run-r1.wandb")
    metric = yaml.safe_load(path.read_text())["metric"]["name"]
    assert metric in {"/".join(i.nested_key) or i.key for m in read(file) for i in m.history.item}
    (record,) = [m.run for m in read(file) if m.HasField("run")]
    assert record.sweep_id == "s1"
