"""Evaluations over several processes, which are killed and taken up again: the same records, each once."""

import io
import json
import os
import resource
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import CONTEXT, Launch, finish, launch, recorded, result, run_command, tiny
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lit_purify import cli
from lit_purify.attacks import PGD
from lit_purify.callbacks import RunWriter
from lit_purify.cli import common
from lit_purify.data import ImageFolder
from lit_purify.data.claims import Claims
from lit_purify.defense import NoPurifier
from lit_purify.errors import INTERRUPTED, InputError
from lit_purify.evaluation import Evaluator, Record, RobustnessTask, read_records
from lit_purify.evaluation.folder import RunFolder
from lit_purify.evaluation.records import append_records, write_records
from lit_purify.models import ResNetClassifier

sys.path.insert(0, str(Path(__file__).parent / "campaigns"))

from kills import KINDS, campaign

BATCH = "--data.batch_size"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("distributed") / "tiny.yaml")


@pytest.fixture(scope="module")
def whole(config):
    finish(config, config.parent / "whole")
    return config.parent / "whole"


def test_records_depend_on_neither_processes_nor_batches(config, whole, tmp_path):
    finish(config, tmp_path / "run", 3, [BATCH, "2", "--data.num_workers", "1"])
    assert result(tmp_path / "run") == result(whole)


def test_fewer_samples_than_processes(tmp_path):
    config = tiny(tmp_path / "tiny.yaml", samples=2)
    finish(config, tmp_path / "one")
    said = finish(config, tmp_path / "three", 3)
    assert "Warning" not in said
    assert result(tmp_path / "three") == result(tmp_path / "one")


def test_kills(tmp_path):
    """Two rounds of the campaign, with three interruptions each: one of every kind."""
    counts, failures = campaign(tmp_path, rounds=2, seed=1, worlds=(1, 3))
    assert not failures
    assert all(counts[kind] == 1 for kind in KINDS)
    assert counts["unfinished"] >= 3
    assert counts["records found"] > 0


# A process dies, hangs or does not come.


class Dies:
    """Lets a process kill itself after its third batch: that rank in that attempt."""

    def __init__(self, *deaths):
        self.deaths = deaths

    def __call__(self, rank):
        common._LAUNCHER = 1.0
        write, batches = RunWriter.on_evaluated, count(1)

        def on_evaluated(*args):
            write(*args)
            attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
            if (attempt, rank) in self.deaths and next(batches) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        RunWriter.on_evaluated = on_evaluated


def worker(argv, folder, spoil):
    rank, attempt = (int(os.environ[name]) for name in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
    run_command("evaluate", argv, {}, folder / f"log.{attempt}.{rank}", spoil, rank)


def torchrun(argv, folder, spoil):
    """``torchrun --max-restarts 3 --nproc_per_node 2 -- eval.py ...``, with workers that are forked."""
    settings = LaunchConfig(1, 1, 2, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=3)
    settings.start_method = "fork"
    elastic_launch(settings, worker)(argv, folder, spoil)


def test_torchrun_recovers_by_itself(tmp_path):
    """Rank one is killed in the middle, then rank zero; nobody gives the command again."""
    config, run = tiny(tmp_path / "tiny.yaml", samples=30), tmp_path / "run"
    finish(config, tmp_path / "alone")
    argv = ["--config", str(config), f"--run={run}", BATCH, "1"]
    launcher = CONTEXT.Process(target=torchrun, args=(argv, tmp_path, Dies((0, 1), (1, 0))))
    launcher.start()
    launcher.join(100)
    said = "".join(path.read_text() for path in sorted(tmp_path.glob("log.*")))
    assert launcher.exitcode == 0, said
    assert len(list(tmp_path.glob("log.*"))) == 3 * 2
    assert said.count("resumes after") == 2
    assert "Traceback" not in said
    assert result(run) == result(tmp_path / "alone")


def test_who_lost_another_process_ends_and_the_same_command_goes_on(tmp_path):
    """With rank zero the store is gone; no launcher ends the others."""
    config, run = tiny(tmp_path / "tiny.yaml", samples=30), tmp_path / "run"
    launched = launch(config, run, 2, [BATCH, "1"], Dies((0, 0)))
    assert launched.wait() == [-signal.SIGKILL, INTERRUPTED], launched.said
    assert "error: another process of this run ended" in launched.said
    assert "Traceback" not in launched.said
    assert "resumes after" in finish(config, run)
    assert len(result(run)[0]) == 30


def test_nobody_waits_longer_than_the_timeout_for_who_does_not_come(config, tmp_path):
    """For rank one, and for rank zero."""
    argv = ["--config", str(config), f"--run={tmp_path / 'run'}", "--trainer.strategy=DDPStrategy"]
    argv += ["--trainer.strategy.timeout=0:00:02", "--trainer.devices=2"]
    launches = [Launch("evaluate", argv, tmp_path / f"{rank}", 2, Dies(), ranks=[rank]) for rank in (0, 1)]
    for launched in launches:
        assert launched.wait(30) == [INTERRUPTED], launched.said
        assert "error: another process of this run ended, or did not answer in time" in launched.said
        assert "Traceback" not in launched.said


def test_nobody_waits_longer_than_the_timeout_for_who_hangs(config, tmp_path):
    argv = ["--config", str(config), f"--run={tmp_path / 'run'}", BATCH, "1", "--trainer.strategy=DDPStrategy"]
    argv += ["--trainer.strategy.timeout=0:00:03", "--trainer.devices=2"]
    launched = Launch("evaluate", argv, tmp_path / "log", 2, spoil=Dies())
    launched.until(lambda: recorded(tmp_path / "run"))
    launched.kill(signal.SIGSTOP, {1})
    launched.processes[0].join(30)
    assert launched.wait(0) == [INTERRUPTED, -signal.SIGKILL], launched.said


def test_lightning_names_the_process_that_died(tmp_path):
    """Of those that it started itself."""
    child = tmp_path / "child.py"
    child.write_text("import os; print(os.getpid(), flush=True); os.kill(os.getpid(), 9)")
    argv = ["--config", str(tiny(tmp_path / "tiny.yaml")), f"--run={tmp_path / 'run'}"]
    argv += ["--trainer.devices=2", "--trainer.strategy=ddp"]
    launched = Launch("evaluate", argv, tmp_path / "log", spoil=partial(starts, child))
    assert launched.wait(30) == [-signal.SIGKILL], launched.said
    process, said = launched.said.split("\n", 1)
    assert f"[rank: 1] Child process with PID {process} terminated with code -9" in said


def starts(script, rank):
    """Lets Lightning start processes that execute another script."""
    sys.argv = [str(script)]


def test_what_lives_on_of_a_killed_run_does_not_disturb_the_next(tmp_path):
    """Rank zero is killed; rank one writes on, into a file that the next run has taken away."""
    config, run = tiny(tmp_path / "tiny.yaml", samples=15), tmp_path / "run"
    first = launch(config, run, 2, [BATCH, "1"])
    part = RunFolder(run).part(1)
    first.until(lambda: part.exists() and read_records(part))
    first.kill(signal.SIGSTOP, ranks={1})
    first.kill(ranks={0})
    before = recorded(run)
    second = launch(config, run, 2, [BATCH, "1"])
    second.until(lambda: "resumes after" in second.said)
    first.kill(signal.SIGCONT, ranks={1})
    assert second.wait() == [0, 0], second.said
    assert first.wait()[1] not in (0, -signal.SIGKILL), "it has noticed"
    assert len(result(run)[0]) == 15
    assert all(recorded(run)[key] <= seconds for key, seconds in before.items())


def test_a_second_launch_with_other_settings_changes_nothing(config, tmp_path):
    """Also before the first record, when no settings hold the folder yet."""
    run = tmp_path / "run"
    first = launch(config, run)
    first.until((run / "identity.json").exists)
    first.kill(signal.SIGSTOP)
    held = {path: path.read_bytes() for path in run.iterdir()}
    second = launch(config, run, flags=["--runs", "2"])
    assert second.wait() == [2]
    assert (
        second.said == f"eval.py: error: {run}: another run is writing there; wait for it, or choose another folder\n"
    )
    assert {path: path.read_bytes() for path in run.iterdir()} == held
    first.kill(signal.SIGCONT)
    assert first.wait() == [0], first.said


def test_processes_that_read_images_do_not_hold_the_folder(tmp_path):
    """They outlive a run that is killed by some seconds."""
    folder, (ready, told) = RunFolder(tmp_path), os.pipe()
    folder.lock()
    child = os.fork()
    if child == 0:
        os.write(told, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    folder.release()
    RunFolder(tmp_path).lock()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_folder_of_images_is_known_by_the_names_of_the_evaluated_split(tmp_path):
    for split in ("train", "val"):
        place = tmp_path / split / "cat"
        place.mkdir(parents=True)
        (place / "1.png").touch()
    before = ImageFolder(tmp_path).names_sha256
    (tmp_path / "train" / "cat" / "2.png").touch()
    assert ImageFolder(tmp_path).names_sha256 == before
    assert ImageFolder(tmp_path, evaluate_on="train").names_sha256 != before
    (place / "0.png").touch()
    assert ImageFolder(tmp_path).names_sha256 != before


def record(index):
    return Record("uniform", "pgd", index, 1, [1], [2], 0.1, 0.2, 0.5)


def test_a_write_that_fails_leaves_whole_lines(tmp_path):
    """The file may grow by one record and a half; two are written at once."""
    path = tmp_path / "records.jsonl"
    line = len(record(0).line())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with path.open("ab", buffering=0) as stream:
        append_records(stream, [record(0)])
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 * line // 2, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                append_records(stream, [record(1), record(2)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_text() == record(0).line()
        append_records(stream, [record(1)])
    assert [found.index for found in read_records(path)] == [0, 1]


def test_a_signal_amid_a_write_leaves_whole_lines(tmp_path):
    """It ends the process by an exception that is no ``Exception``."""

    class Interrupted(io.FileIO):
        def write(self, content):
            super().write(content[: len(content) // 2])
            raise KeyboardInterrupt

    path = tmp_path / "records.jsonl"
    path.write_text(record(0).line())
    with Interrupted(path, "a") as stream, pytest.raises(KeyboardInterrupt):
        append_records(stream, [record(1)])
    assert path.read_text() == record(0).line()


def test_a_merge_that_was_killed_leaves_each_record_once(tmp_path):
    """Between writing the merged file and removing the parts a record is in both."""
    folder = RunFolder(tmp_path)
    again = replace(record(1), seconds=9.0)
    folder.records.write_text(record(0).line() + record(1).line() + again.line())
    folder.part(2).write_text(again.line() + record(2).line() + record(3).line()[:40])
    assert folder.collect(write=False) == [record(0), record(1), record(2)]
    assert [found.index for found in folder.collect(write=True)] == [0, 1, 2]
    assert len(folder.records.read_text().splitlines()) == 3
    assert not folder.part(2).exists()


def test_a_part_has_one_writer(tmp_path):
    RunFolder(tmp_path).open_part(1).close()
    with pytest.raises(InputError, match=r"records.rank1.jsonl: another run is writing there"):
        RunFolder(tmp_path).open_part(1)


def test_records_of_other_images_are_refused(config, whole, tmp_path, refused):
    """The same settings, but the images behind them have changed."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    first, *others = read_records(run / "records.jsonl")
    write_records(run / "records.jsonl", [replace(first, label=first.label + 1), *others])
    said = refused(cli.evaluate, "--config", config, "--run", run)
    assert f"sample {first.index} with label {first.label + 1}, but the data has no such sample" in said


# Dealing out.


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("items", [0, 1, 6, 23])
def test_claims_in_any_order_give_every_item_once(monkeypatch, world, items):
    tickets = count()
    monkeypatch.setattr(Claims, "_tickets", lambda self: tickets)
    given = [iter(Claims(lambda: np.arange(items), 3, world, rank)) for rank in range(world)]
    order, found = np.random.RandomState(0), []
    while given:
        batches = given[order.randint(len(given))]
        batch = next(batches, None)
        if batch is None:
            given.remove(batches)
        else:
            found.append(batch)
    assert sorted(item for batch in found for item in batch) == list(range(items))
    assert all(1 <= len(batch) <= 3 for batch in found)
    assert len(found) == len(Claims(lambda: np.arange(items), 3, world, 0))


def test_equal_samples_are_shared_out_equally():
    """No process gets more batches, or samples, than when they are dealt out in advance."""
    for world, size, items in ((2, 64, 200), (3, 4, 13), (4, 10, 47)):
        shares = [list(Claims(partial(np.arange, items), size, world, rank)) for rank in range(world)]
        samples = [sum(map(len, share)) for share in shares]
        assert max(samples) - min(samples) <= 1
        assert max(map(len, shares)) == -(-items // (size * world))


# Memory


def test_out_of_memory_an_evaluation_goes_on_with_smaller_chunks(config, whole, monkeypatch, tmp_path, capsys):
    def predictions(run):
        return [(record.key, record.clean, record.adversarial) for record in read_records(run / "records.jsonl")]

    forward, seen = ResNetClassifier.forward, []

    def limited(self, image):
        seen.append(len(image))
        if len(image) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, image)

    monkeypatch.setattr(ResNetClassifier, "forward", limited)
    cli.evaluate(["--config", str(config), f"--run={tmp_path / 'halved'}"])
    assert seen.count(16) == 1
    assert predictions(tmp_path / "halved") == predictions(whole)
    assert {record.chunk for record in read_records(tmp_path / "halved" / "records.jsonl")} == {8}
    summary = json.loads((tmp_path / "halved" / "summary.json").read_text())
    assert (summary["chunk"], summary["smaller_chunks"]) == (16, {"8": 13})
    assert "out of memory with chunks of 16 rows" in capsys.readouterr().err


def test_running_accuracies_count_each_sample_once(classifier, monkeypatch):
    evaluated = SimpleNamespace(positions=np.array([1]), labels=np.array([0, 3]))
    monkeypatch.setattr(RobustnessTask, "data", SimpleNamespace(evaluated=evaluated))
    attacks = {"a": PGD("linf", 0.1, 1, 0.1), "b": PGD("l2", 0.1, 1, 0.1)}
    ranks = [RobustnessTask(Evaluator(classifier, {"none": NoPurifier()}, attacks, runs=2)) for _ in range(2)]
    for rank, task in enumerate(ranks):
        task.resume([Record("none", "a", 1, 3, [3, 3], [3, 4], 0, 0, 0)], count=rank == 0)
    ranks[0]._count([Record("none", "b", 1, 3, [3, 3], [4, 4], 0, 0, 0)])
    ranks[0]._count([Record("none", "a", 2, 3, [4, 4], [4, 4], 0, 0, 0)])
    found = [ranks[0].running(*pair) for pair in (("none",), ("none", "a"), ("none", "b"))]
    assert found == [0.5, 0.25, 0.0]
    assert ranks[1].running("none") == 0.0


def test_a_torn_first_line_is_mended(tmp_path):
    folder = RunFolder(tmp_path)
    folder.records.write_text(record(0).line()[:30])
    folder.part(1).write_text(record(1).line()[:30])
    assert folder.collect(write=True) == []
    with folder.records.open("a") as stream:
        stream.write(record(2).line())
    assert [r.index for r in folder.collect(write=True)] == [2]
    assert not folder.part(1).exists()


@pytest.mark.parametrize(("rank", "signaled"), [(0, False), (1, False), (0, True)])
def test_what_is_recorded_counts_once_over_all_processes(rank, signaled, tmp_path, monkeypatch):
    """A signal before the evaluation began ends it as well."""
    folder, told, writer = RunFolder(tmp_path), [], RunWriter()
    folder.records.write_text(record(0).line())
    evaluated = SimpleNamespace(positions=np.array([0]), labels=np.array([record(0).label]))
    trainer = SimpleNamespace(
        received_sigterm=signaled,
        default_root_dir=folder.path,
        is_global_zero=rank == 0,
        global_rank=rank,
        strategy=SimpleNamespace(broadcast=lambda _: read_records(folder.records)),
    )
    monkeypatch.setattr(RobustnessTask, "data", SimpleNamespace(evaluated=evaluated))
    task = RobustnessTask(Evaluator(torch.nn.Flatten(), {"uniform": NoPurifier()}, {"pgd": PGD()}))
    task.__dict__["resume"] = lambda records, count: told.append((len(records), count))
    with pytest.raises(KeyboardInterrupt) if signaled else nullcontext():
        writer.on_test_start(trainer, task)
    writer._close()
    if not signaled:
        assert (told, task.data.finished) == ([(1, rank == 0)], [0])
