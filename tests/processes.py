"""Runs in processes that a test can lay hands on, each forked from one that has imported everything."""

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import yaml
from wandb.sdk.data_types._private import MEDIA_TMP

from lit_purify.evaluation import read_records

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lit_purify.cli", "sklearn.datasets", "torchvision.utils"])
SAMPLES = 13


def tiny(path, samples=SAMPLES, **attack):
    """Writes a configuration of one defense and one attack that takes a second."""
    settings = {
        **{name: str(ROOT / f"checkpoints/digits_{name}.safetensors") for name in ("classifier", "denoiser")},
        "defenses": {"uniform": {"class_path": "UniformPurifier", "level": 200, "steps": 1}},
        "attacks": {"pgd": attack or {"class_path": "PGD", "eps": 0.2, "steps": 2, "step_size": 0.1}},
        "runs": 3,
        "chunk": 16,
        "gallery": 2,
        "data": {"class_path": "Digits", "batch_size": 3, "subset": {"class_path": "First", "n": samples}},
        "trainer": {"logger": False, "accelerator": "cpu"},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


class Launch:
    """The processes of a command, started one by one as a launcher on each host would.

    Args:
        command: ``evaluate`` or ``train``.
        argv: Its arguments.
        log: What the processes print goes to ``LOG.RANK``.
        world: Processes; with one it is none of several.
        spoil: Called in each process, with its rank, before anything else.
        ranks: Those that are started; all if none are given.
    """

    def __init__(self, command, argv, log, world=1, spoil=None, ranks=None):
        place = {}
        if world > 1:
            if not any("--trainer.strategy" in word for word in argv):
                argv = [*argv, "--trainer.devices", str(world), "--trainer.strategy", "ddp"]
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        self.logs = [Path(f"{log}.{rank}") for rank in range(world)]
        self.processes = []
        for rank in range(world) if ranks is None else ranks:
            own = {**place, "LOCAL_RANK": str(rank), "RANK": str(rank)} if world > 1 else {}
            self.processes.append(
                CONTEXT.Process(target=run_command, args=(command, list(argv), own, self.logs[rank], spoil, rank))
            )
            self.processes[-1].start()

    def wait(self, seconds=120):
        """Exit statuses; who has not ended by then is killed."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        self.kill()
        return [process.exitcode for process in self.processes]

    def kill(self, number=signal.SIGKILL, ranks=None):
        """Sends a signal to all, or to some."""
        for rank, process in enumerate(self.processes):
            if ranks is None or rank in ranks:
                process.join(0)
                if process.exitcode is None:
                    os.kill(process.pid, number)
        if number == signal.SIGKILL and ranks is None:
            for process in self.processes:
                process.join()

    def until(self, condition, seconds=120):
        """Waits for something that happens while all of them live."""
        end = time.monotonic() + seconds
        while not condition():
            assert all(process.exitcode is None for process in self.processes), self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.005)

    @property
    def said(self):
        """What all have printed."""
        return "".join(log.read_text() for log in self.logs if log.exists())


def launch(config, run, world=1, flags=(), spoil=None):
    """An evaluation."""
    logs = run.with_name(f"{run.name}.logs")
    logs.mkdir(exist_ok=True)
    argv = ["--config", str(config), "--run", str(run), *flags]
    return Launch("evaluate", argv, logs / str(time.monotonic_ns()), world, spoil)


def finish(config, run, world=1, flags=()):
    """An evaluation to its end."""
    launched = launch(config, run, world, flags)
    assert launched.wait() == [0] * world, launched.said
    return launched.said


def result(run):
    """What a finished run holds, without what may differ between equal evaluations."""
    assert not [path.name for path in run.iterdir() if path.name.startswith("records.rank")]
    lines = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    for entry in (*lines, *summary["results"]):
        entry["seconds"] = 0
    pictures = sorted(path.name for path in (run / "overlays").iterdir())
    assert (run / "report.html").exists()
    return [json.dumps(line) for line in lines], summary, pictures


def recorded(run):
    """Seconds of every whole record in a folder: they tell a record that was kept from one that was made anew."""
    found = {}
    for path in run.glob("records*.jsonl"):
        # It may be merged just now.
        with contextlib.suppress(FileNotFoundError):
            for record in read_records(path):
                found.setdefault(record.key, set()).add(record.seconds)
    return found


def run_command(command, argv, environment, log, spoil, rank):
    # It belongs to the server that this process was forked from: exit functions must not remove it.
    MEDIA_TMP._finalizer.detach()
    # Workers of torchrun, which are forked from another child of the server, may have removed it.
    Path(MEDIA_TMP.name).mkdir(exist_ok=True)
    os.environ.update(environment)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.argv = ["eval.py" if command == "evaluate" else "train.py"]
    if spoil is not None:
        spoil(rank)
    import torch

    from lit_purify import cli

    torch.set_num_threads(1)
    getattr(cli, command)(argv)


class Room:
    """Lets the files of records grow to so many bytes once they are written; what is beyond fails as on a full disk."""

    def __init__(self, size):
        self.size = size

    def __call__(self, rank):
        sys.addaudithook(self.limit)

    def limit(self, event, args):
        if event == "open" and Path(str(args[0])).match("records*.jsonl") and set(str(args[1])) & {*"ax"}:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


class Killer:
    """Lets one process kill itself with SIGKILL just before its k-th change of a folder."""

    def __init__(self, folder, rank, changes):
        self.folder, self.rank, self.left = str(folder), rank, changes

    def __call__(self, rank):
        if rank == self.rank:
            sys.addaudithook(self.count)

    def count(self, event, args):
        if event == "open":
            changes = isinstance(args[1], str) and set(args[1]) & set("wax")
        else:
            changes = event in ("os.rename", "os.remove", "os.mkdir", "os.truncate")
        if changes and str(args[0]).startswith(self.folder):
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
