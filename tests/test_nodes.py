"""What becomes of a run when a process dies or hangs, or memory runs out."""

import copy
import json
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from conftest import GaussianDenoiser
from processes import Launch, finish, tiny
from torch.distributed import PrefixStore, TCPStore

from lit_purify import cli
from lit_purify.attacks import FGSM
from lit_purify.callbacks import Watch
from lit_purify.callbacks.roll import Roll, Sign
from lit_purify.defense import NoPurifier
from lit_purify.errors import INTERRUPTED, InputError
from lit_purify.evaluation import RobustnessTask, read_records
from lit_purify.evaluation.folder import RunFolder
from lit_purify.functional.chunks import fitting
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


def sign(beat=0, done=0, state="works", place=""):
    return Sign(beat, done, state, "b", 7, place)


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
    heard = roll(*(sign(done=done, place="step (a.py:1)") for done in (9, 8, 9)))
    for beat in range(1, 200):
        said = heard.age(5)
        for rank, done in enumerate((9, 8, 9)):
            heard.hear(rank, sign(beat, done, place="step (a.py:1)"))
        if said is not None:
            break
    assert (said, beat) == ("nothing done for 600 s by rank 1 (b, process 7, in step (a.py:1))", 121)


def test_who_waits_in_a_collective_for_one_that_works_is_left_alone():
    """As in a validation, when its own part is done."""
    heard = roll(sign(), sign(done=3, place="step (a.py:1)"))
    for beat in range(1, 1000):
        assert heard.age(5) is None
        heard.hear(0, sign(beat))
        heard.hear(1, sign(beat, done=3 + beat // 100, place="step (a.py:1)"))


def test_a_failure_is_passed_on_after_a_while_and_a_verdict_at_once():
    heard = roll(sign(), sign(state="failed: InputError: no disk"))
    assert heard.age(5) is None
    heard.hear(0, sign(1))
    assert heard.age(11) == "rank 1 (b, process 7) failed: InputError: no disk"
    assert roll(sign(state="verdict: rank 5 is lost")).age(5) == "rank 5 is lost"


def test_when_all_wait_for_hours_the_one_that_does_not_wait_for_others_hangs():
    heard = roll(sign(state="waits"), sign(state="waits", place="read (nfs.py:7)"), sign(state="waits"))
    for beat in range(1, 200):
        said = heard.age(5)
        for rank, place in enumerate(("", "read (nfs.py:7)", "")):
            heard.hear(rank, sign(beat, state="waits", place=place))
        if said is not None:
            break
    assert (said, beat) == ("nothing done for 600 s by rank 1 (b, process 7, in read (nfs.py:7))", 121)


def test_connections_that_do_not_stand_in_time_are_reported():
    heard = roll(sign(state="waits"), sign(state="connects"))
    heard.silence = 999
    assert heard.age(100) is None
    said = heard.age(1)
    assert said.startswith("all 2 processes came, but within 100 s no connections stood between rank 1 (b, process 7)")


def test_who_does_not_come_ends_the_run(tmp_path):
    """Nobody waits for torch's half an hour, whoever it is that is missing."""
    config = tiny(tmp_path / "tiny.yaml")
    argv = ["--config", str(config), f"--run={tmp_path / 'run'}", "--watch.start=2"]
    launches = [Launch("evaluate", argv, tmp_path / f"{rank}", 2, ranks=[rank]) for rank in (0, 1)]
    assert [launched.wait() for launched in launches] == [[INTERRUPTED], [INTERRUPTED]]
    for launched, came, missing in zip(launches, ("1 of 2 processes came", "nobody answered"), (1, 0), strict=True):
        assert f"error: {came} within 2 s, rank {missing} did not: see what it printed" in launched.said
        assert launched.said.count("\n") == 1


def test_ctrl_c_is_heard_by_who_waits_for_the_others(tmp_path):
    """In torch's own code, where Python hears nothing."""
    config, run = tiny(tmp_path / "tiny.yaml"), tmp_path / "run"
    launched = Launch("evaluate", ["--config", str(config), f"--run={run}"], tmp_path / "log", 2, ranks=[0])
    launched.until((run / ".lock").exists)
    time.sleep(1.0)
    launched.kill(signal.SIGINT)
    assert launched.wait(20) in ([-signal.SIGINT], [INTERRUPTED]), launched.said
    assert RunFolder(run).lock() is None


def test_images_that_take_long_are_no_stall(monkeypatch):
    """In a purification network calls count as well, not only batches."""
    network = GaussianDenoiser()
    task = torch.nn.ModuleDict({"defended": torch.nn.ModuleDict({"denoiser": network})})
    watch = Watch(stall=20.0)
    assert watch.interval <= 2.0
    watch.threads = [threading.Thread()]
    watch.on_predict_start(None, task)
    for _ in range(3):
        network(torch.zeros(1, 1, 4, 4), torch.tensor([5]))
    assert (watch.done, watch.state) == (3, "works")


@pytest.mark.parametrize(
    ("script", "start", "said"),
    [
        (
            "import os; os.kill(os.getpid(), 9)",
            # Long enough between two looks to have Lightning's observer, which looks every 5 s, come first.
            16,
            "rank 1 ({host}, process {process}) was killed by SIGKILL; the run ends",
        ),
        ("import time; time.sleep(600)", 3, "1 of 2 processes came within 3 s, rank 1 did not"),
    ],
)
def test_processes_that_lightning_starts_are_missed_as_well(tmp_path, script, start, said):
    """What a process says that ended is not cut off by Lightning, which kills all."""
    child = tmp_path / "child.py"
    child.write_text(f"import os; print(os.getpid(), flush=True); {script}")
    argv = ["--config", str(tiny(tmp_path / "tiny.yaml")), f"--run={tmp_path / 'run'}", f"--watch.start={start}"]
    argv += ["--trainer.devices=2", "--trainer.strategy=ddp"]
    launched = Launch("evaluate", argv, tmp_path / "log", spoil=Starts(child))
    assert launched.wait() == [INTERRUPTED], launched.said
    process, line = launched.said.splitlines()
    assert said.format(host=socket.gethostname(), process=process) in line
    state = Path(f"/proc/{process}/cmdline")
    assert not (state.exists() and state.read_bytes()), "it is left over"


class Starts:
    """Lets Lightning start processes that execute another script."""

    def __init__(self, script):
        self.script = script

    def __call__(self, rank):
        sys.argv = [str(self.script)]


class Stuck(L.Callback):
    """Rank one goes no further from a place of the run on."""

    def __init__(self, where: str, stopped: bool = False) -> None:
        def hang(trainer, *_, **__):
            if trainer.global_rank == 1:
                if stopped:
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(600)

        setattr(self, where, hang)


@pytest.mark.parametrize(
    ("command", "where", "stopped"),
    [("test", "setup", True), ("test", "on_test_epoch_end", False), ("validate", "on_validation_batch_end", False)],
)
def test_a_rank_that_goes_no_further_ends_the_run_wherever_it_is(tmp_path, command, where, stopped):
    if command == "test":
        argv = ["--config", str(tiny(tmp_path / "tiny.yaml", samples=3))]
    else:
        argv = [
            command,
            f"--config={ROOT / 'configs/train/digits_denoiser.yaml'}",
            "--trainer.logger=false",
            "--data.init_args.batch_size=4",
        ]
    argv += ["--trainer.accelerator=cpu", f"--run={tmp_path / 'run'}"]
    argv += ["--watch.silence=4"] if stopped else ["--watch.silence=20", "--watch.stall=5"]
    argv += ["--trainer.callbacks+=test_nodes.Stuck", f"--trainer.callbacks.where={where}"]
    argv += [f"--trainer.callbacks.stopped={stopped}"]
    # The third learns of it from rank zero.
    launched = Launch("evaluate" if command == "test" else "train", argv, tmp_path / "log", 3 if stopped else 2)
    for rank, process in enumerate(launched.processes):
        process.join(0 if stopped and rank == 1 else 60)
    ended = [INTERRUPTED, -signal.SIGKILL if stopped else INTERRUPTED, INTERRUPTED]
    assert launched.wait(0) == ended[: len(launched.processes)], launched.said
    assert launched.said.count("error: ") == 1
    who = f"rank 1 ({socket.gethostname()}, process {launched.processes[1].pid}"
    said = (
        f"no sign of life for 4 s from {who})" if stopped else f"nothing done for 5 s by {who}, in hang (test_nodes.py"
    )
    assert f"error: {said}" in launched.said


def test_network_calls_and_batches_are_progress(unet, classifier, images):
    task = RobustnessTask(*map(copy.deepcopy, (classifier, unet)), {"none": NoPurifier}, {"fgsm": FGSM("linf", 0.1)})
    watch = Watch()
    watch.threads = [threading.current_thread()]
    watch.on_test_start(None, task)
    assert watch.state == "works"
    task.classifier(images)
    task.denoiser(images, torch.full((len(images),), 3))
    assert watch.done == 2
    for hook in (watch.on_train_batch_start, watch.on_validation_batch_start, watch.on_predict_batch_start):
        before = watch.done
        hook(None, None, None, 0)
        assert watch.done == before + 1


def test_when_rank_zero_dies_the_others_end_and_say_so(tmp_path):
    """With it goes the store that holds signs of life, and the counter of batches."""
    config, run = tiny(tmp_path / "tiny.yaml", samples=60), tmp_path / "run"
    argv = ["--config", str(config), f"--run={run}", "--data.init_args.batch_size=1", "--watch.silence=3"]
    launched = Launch("evaluate", argv, tmp_path / "log", 2)
    launched.until(lambda: len([path for path in run.glob("records*") if path.stat().st_size]) == 2)
    launched.kill(ranks={0})
    assert launched.wait() == [-signal.SIGKILL, INTERRUPTED], launched.said
    assert "no sign of life for 3 s from rank 0" in launched.said
    assert "Traceback" not in launched.said


def test_a_rank_that_hangs_ends_the_evaluation_and_the_same_command_goes_on(tmp_path):
    config, run = tiny(tmp_path / "tiny.yaml", samples=60), tmp_path / "run"
    argv = ["--config", str(config), f"--run={run}", "--data.init_args.batch_size=1"]
    launched = Launch("evaluate", [*argv, "--watch.silence=4"], tmp_path / "log", 2)
    launched.until(lambda: any(path.stat().st_size for path in run.glob("records*")))
    launched.kill(signal.SIGSTOP, {1})
    launched.processes[0].join(60)
    assert launched.wait(0) == [INTERRUPTED, -signal.SIGKILL], launched.said
    said, process = launched.said, launched.processes[1].pid
    assert f"error: no sign of life for 4 s from rank 1 ({socket.gethostname()}, process {process})" in said
    assert "the same command goes on from here" in said
    assert "goes on after" in finish(config, run)
    assert json.loads((run / "summary.json").read_text())["samples"] == 60


def test_collectives_wait_as_long_as_they_must_and_who_is_connected_has_said_so():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    timeouts = []
    strategy = SimpleNamespace(
        setup_environment=lambda: timeouts.append(strategy._timeout),
        launcher=None,
        cluster_environment=SimpleNamespace(main_address="127.0.0.1", main_port=server.port),
    )
    watch = Watch()
    watch.attend(SimpleNamespace(strategy=strategy, world_size=2, global_rank=1))
    store = PrefixStore("lit_purify/watch", server)
    store.set("0", json.dumps(Sign(1, 0, "waits", "host", 1, "")))
    strategy.setup_environment()
    assert timeouts[0] > timedelta(days=100)
    assert store.check(["1"])
    said = Sign(*json.loads(store.get("1")))
    assert (said.state, said.process) == ("waits", os.getpid())
    watch.teardown(None, None, "test")


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
        assert "16, but 16 records with 8 (too little memory): equal to others up to rounding only" in text


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
