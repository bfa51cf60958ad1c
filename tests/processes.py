"""Evaluations in processes that can be killed, each forked from one that has imported everything."""

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

from lit_purify.metrics import read_records

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lit_purify.cli", "sklearn.datasets", "torchvision.utils"])


SAMPLES = 13


def tiny(path, samples=SAMPLES, **attack):
    """Writes a configuration of one defense and one attack that takes a second."""
    weights = ROOT / "checkpoints"
    network = {
        name: {
            "class_path": f"lit_purify.models.load_{name}",
            "init_args": {"path": str(weights / f"digits_{name}.safetensors")},
        }
        for name in ("classifier", "denoiser")
    }
    pgd = {"norm": "linf", "eps": 0.2, "steps": 2, "step_size": 0.1}
    settings = {
        "model": {
            "class_path": "RobustnessTask",
            "init_args": {
                **network,
                "defenses": {"uniform": {"class_path": "UniformPurifier", "init_args": {"level": 200, "steps": 1}}},
                "attacks": {"pgd": attack or {"class_path": "PGD", "init_args": pgd}},
                "runs": 3,
                "chunk": 16,
                "gallery": 2,
            },
        },
        "data": {
            "class_path": "Digits",
            "init_args": {"batch_size": 3, "subset": {"class_path": "First", "init_args": {"n": samples}}},
        },
        "trainer": {"logger": False, "accelerator": "cpu"},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


class Launch:
    """An evaluation on some processes, which know each other as under torchrun.

    Args:
        config: What to evaluate.
        run: Where to.
        world: Processes.
        flags: Further arguments.
        die: (rank, k): that process kills itself at its k-th change of the run's folder.
        room: Bytes that a file may have once records are written; what is beyond fails as on a full disk.
    """

    def __init__(self, config, run, world=1, flags=(), die=None, room=None):
        argv = ["--config", str(config), "--run", str(run), *flags]
        environment = {}
        if world > 1:
            argv += ["--trainer.devices", str(world), "--trainer.strategy", "ddp"]
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        logs = run.with_name(f"{run.name}.logs")
        logs.mkdir(exist_ok=True)
        self.logs, self.processes = [], []
        for rank in range(world):
            own = {**environment, "LOCAL_RANK": str(rank), "RANK": str(rank)} if world > 1 else {}
            self.logs.append(logs / f"{time.monotonic_ns()}.rank{rank}")
            changes = die[1] if die and die[0] == rank else None
            self.processes.append(
                CONTEXT.Process(target=_evaluate, args=(argv, own, self.logs[-1], run, changes, room))
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

    @property
    def said(self):
        """What all have printed."""
        return "".join(log.read_text() for log in self.logs if log.exists())


def finish(config, run, world=1, flags=()):
    """An evaluation to its end."""
    launch = Launch(config, run, world, flags)
    assert launch.wait() == [0] * world, launch.said
    return launch.said


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


def _evaluate(argv, environment, log, run, changes, room):
    os.environ.update(environment)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.argv = ["eval.py"]
    if room is not None:

        def limit(event, args):
            if event == "open" and Path(str(args[0])).match("records*.jsonl") and set(str(args[1])) & {*"ax"}:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

        sys.addaudithook(limit)
    if changes is not None:
        sys.addaudithook(_Killer(str(run), changes))
    import torch

    from lit_purify.cli import evaluate

    torch.set_num_threads(1)
    evaluate(argv)


class _Killer:
    """Ends the process with SIGKILL just before its k-th change of a folder."""

    def __init__(self, folder, changes):
        self.folder, self.left = folder, changes

    def __call__(self, event, args):
        if event == "open":
            changes = isinstance(args[1], str) and set(args[1]) & set("wax")
        else:
            changes = event in ("os.rename", "os.remove", "os.mkdir", "os.truncate")
        if changes and str(args[0]).startswith(self.folder):
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
