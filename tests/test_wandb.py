"""What an offline W&B run holds: read back from the file that would be uploaded."""

import json
import struct
from pathlib import Path

import pytest
from wandb.proto import wandb_internal_pb2

from lit_purify.cli import evaluate

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wandb") / "run"
    evaluate(
        [
            "--config",
            str(ROOT / "configs/eval/digits.yaml"),
            f"--run={folder}",
            f"--model.init_args.classifier.init_args.path={ROOT / 'checkpoints/digits_classifier.safetensors'}",
            f"--model.init_args.denoiser.init_args.path={ROOT / 'checkpoints/digits_denoiser.safetensors'}",
            "--model.init_args.attacks.pgd.init_args.steps=1",
            "--model.init_args.attacks.pgd.init_args.eot=1",
            "--model.init_args.runs=2",
            "--model.init_args.chunk=8",
            "--model.init_args.gallery=2",
            "--data.init_args.subset.init_args.n=4",
        ]
    )
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


@pytest.fixture(scope="module")
def history(run):
    (path,) = run.glob("wandb/offline-run-*/run-*.wandb")
    rows = []
    for message in transactions(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(message)
        if record.HasField("history"):
            rows.append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
    return rows


def test_scalars(run, history):
    logged = {key: value for row in history for key, value in row.items()}
    summary = json.loads((run / "summary.json").read_text())
    for result in summary["results"]:
        name = f"robust/{result['defense']}/{result['attack']}"
        for rule in ("average", "worst", "majority"):
            assert logged[f"{name}/{rule}"] == pytest.approx(result["robust"][rule][0], abs=1e-6)
            assert logged[f"clean/{result['defense']}/{rule}"] == pytest.approx(result["clean"][rule][0], abs=1e-6)
        assert f"running/{result['defense']}/{result['attack']}" in logged


def test_overlays_can_be_toggled_and_samples_stand_in_a_table(run, history):
    logged = {key: value for row in history for key, value in row.items()}
    assert logged["masks/count"] == 2 * 2
    assert all("strong_noise" in each for each in logged["masks/all_masks"])
    assert logged["samples/_type"] == "table-file"
    assert (logged["samples/nrows"], logged["samples/ncols"]) == (4 * 2, 9)
    (file,) = run.glob("wandb/offline-run-*/files/media/table/samples*.json")
    rows = json.loads(file.read_text())["data"]
    assert [row[0] for row in rows] == ["heterogeneous", "none", "uniform", "variable"] * 2
