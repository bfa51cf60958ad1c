"""What becomes of a run when a process dies or hangs, or memory runs out."""

import json
import signal
import socket
from pathlib import Path

import pytest
import torch
from processes import Launch

from lit_purify import cli
from lit_purify.callbacks.roll import Roll, Sign
from lit_purify.errors import INTERRUPTED, InputError
from lit_purify.functional.chunks import fitting
from lit_purify.metrics import read_records
from lit_purify.models import ResNetClassifier

ROOT = Path(__file__).parent.parent
WEIGHTS = {name: ROOT / "checkpoints" / f"digits_{name}.safetensors" for name in ("classifier", "denoiser")}
EVALUATION = [
    "--config",
    str(ROOT / "configs/eval/digits.yaml"),
    *(f"--model.init_args.{name}.init_args.path={path}" for name, path in WEIGHTS.items()),
    "--model.init_args.attacks.pgd.init_args.steps=1",
    "--model.init_args.attacks.pgd.init_args.eot=1",
    "--model.init_args.runs=2",
    "--model.init_args.chunk=16",
    "--data.init_args.subset.init_args.n=24",
    "--data.init_args.batch_size=4",
    "--trainer.accelerator=cpu",
]


def sign(beat=0, done=0, state="works", host="b", process=7):
    return Sign(beat, done, state, host, process)


def roll(*signs):
    found = Roll(range(len(signs)), silence=60, stall=600, start=100)
    for rank, each in enumerate(signs):
        found.hear(rank, each)
    return found


def test_who_is_silent_is_named_who_ended_is_not_missed():
    heard = roll(sign(), sign(), sign(state="ended"))
    for beat in range(1, 14):
        said = heard.age(5)
        heard.hear(0, sign(beat))
        if said is not None:
            break
    assert (said, beat) == ("no sign of life for 60 s from rank 1 (b, process 7)", 13)


def test_who_waits_for_hours_but_lives_is_left_alone():
    heard = roll(sign(state="waits"), sign(done=3))
    for beat in range(1, 1000):
        assert heard.age(5) is None
        heard.hear(0, sign(beat, state="waits"))
        heard.hear(1, sign(beat, done=3 + beat // 100))


def test_of_those_who_stand_still_the_one_behind_hangs():
    heard = roll(sign(done=9), sign(done=8), sign(done=9))
    for beat in range(1, 200):
        said = heard.age(5)
        for rank, done in enumerate((9, 8, 9)):
            heard.hear(rank, sign(beat, done))
        if said is not None:
            break
    assert (said, beat) == ("nothing done for 600 s by rank 1 (b, process 7)", 121)


def test_a_failure_is_passed_on_after_a_while_and_a_verdict_at_once():
    heard = roll(sign(), sign(state="failed: InputError: no disk"))
    assert heard.age(5) is None
    heard.hear(0, sign(1))
    assert heard.age(11) == "rank 1 (b, process 7) failed: InputError: no disk"
    assert roll(sign(state="verdict: rank 5 is lost")).age(5) == "rank 5 is lost"


def test_a_rank_that_hangs_ends_the_evaluation_and_the_same_command_goes_on(tmp_path, capsys):
    run = tmp_path / "run"
    argv = [*EVALUATION, f"--run={run}", "--trainer.logger=false"]
    launched = Launch("evaluate", [*argv, "--watch.silence=4"], tmp_path / "log", 2)
    launched.until(lambda: any(path.stat().st_size for path in run.glob("records*")))
    launched.kill(signal.SIGSTOP, {1})
    launched.processes[0].join(100)
    assert launched.wait(0) == [INTERRUPTED, -signal.SIGKILL]
    said = launched.said
    assert (
        f"error: no sign of life for 4 s from rank 1 ({socket.gethostname()}, process {launched.processes[1].pid})"
        in said
    )
    assert "the same command goes on from here" in said
    cli.evaluate(argv)
    assert "goes on after" in capsys.readouterr().out
    assert json.loads((run / "summary.json").read_text())["samples"] == 24


def test_a_chunk_that_fits_is_found_and_another_error_is_none_of_memory():
    tried = []

    def compute(size):
        tried.append(size)
        if size > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return -size

    assert fitting(compute, 50) == (-6, 6)
    assert tried == [50, 25, 12, 6]
    with pytest.raises(RuntimeError, match="a bug"):
        fitting(lambda size: (_ for _ in ()).throw(RuntimeError("a bug")), 4)
    with pytest.raises(InputError, match="chunk = 1: lower"):
        fitting(lambda size: (_ for _ in ()).throw(RuntimeError("DefaultCPUAllocator: can't allocate memory")), 4)


def test_an_evaluation_that_runs_out_of_memory_goes_on_with_smaller_chunks_and_says_so(monkeypatch, tmp_path, capsys):
    def predictions(run):
        return [(record.key, record.clean, record.adversarial) for record in read_records(run / "records.jsonl")]

    argv = [*EVALUATION, "--trainer.logger=false", "--data.init_args.subset.init_args.n=4"]
    cli.evaluate([*argv, f"--run={tmp_path / 'whole'}"])
    assert json.loads((tmp_path / "whole" / "summary.json").read_text())["smaller_chunks"] == {}
    forward, seen = ResNetClassifier.forward, []

    def limited(self, image):
        seen.append(len(image))
        if len(image) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, image)

    monkeypatch.setattr(ResNetClassifier, "forward", limited)
    capsys.readouterr()
    cli.evaluate([*argv, f"--run={tmp_path / 'halved'}"])
    assert seen.count(16) == 1
    assert predictions(tmp_path / "halved") == predictions(tmp_path / "whole")
    assert {record.chunk for record in read_records(tmp_path / "halved" / "records.jsonl")} == {8}
    summary = json.loads((tmp_path / "halved" / "summary.json").read_text())
    assert (summary["chunk"], summary["smaller_chunks"]) == (16, {"8": 16})
    said = capsys.readouterr()
    assert "out of memory with chunks of 16 rows" in said.err
    for text in (said.out, (tmp_path / "halved" / "report.html").read_text()):
        assert "16, but 16 records with 8, for want of memory: equal to others up to rounding only" in text


def test_two_processes_make_one_run_of_wandb_with_the_overlays_of_both(tmp_path):
    run = tmp_path / "run"
    few = ["--data.init_args.subset.init_args.n=8", "--data.init_args.batch_size=2", "--model.init_args.gallery=4"]
    launched = Launch("evaluate", [*EVALUATION, f"--run={run}", *few], tmp_path / "log", 2)
    assert launched.wait() == [0, 0], launched.said
    assert len(list(tmp_path.rglob("offline-run-*"))) == 1
    (table,) = (json.loads(path.read_text()) for path in run.rglob("files/media/table/samples*.json"))
    shown = {row[table["columns"].index("index")] for row in table["data"]}
    # Chosen by their positions, whichever process holds them.
    assert shown == {0, 1, 2, 3}
