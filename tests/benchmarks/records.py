"""100,000 records written as an evaluation writes them, taken up again, and summarized."""

import os
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from measuring import ROOT, row, timed

from lit_purify.attacks import PGD
from lit_purify.callbacks import RecordWriter, Report
from lit_purify.data import ImageDataModule
from lit_purify.data.base import ImageDataset
from lit_purify.defense import NoPurifier
from lit_purify.evaluation import Record, RobustnessTask
from lit_purify.evaluation.folder import RunFolder
from lit_purify.models import ResNetClassifier, UNet

SAMPLES, DEFENSES, ATTACKS, RUNS, BATCH = 10_000, 5, 2, 8, 64


class Labels(ImageDataModule):
    """Labels alone."""

    def split(self, name):
        return ImageDataset.whole(lambda i: torch.zeros(1, 8, 8), np.arange(SAMPLES) % 10, list("abcdefghij"))


def measure(pairs):
    """CPU seconds against the 10 s that they may take; wall-clock seconds of writing against those of the disk."""
    found = [evaluation() for _ in range(pairs)]
    names = ("written", "resumed", "summarized")
    for name in names:
        yield row(f"100,000 records {name} / 10 s", [(seconds[name], 10.0) for seconds in found])
    whole = [sum(seconds[name] for name in names) for seconds in found]
    yield row("100,000 records, all of it / 10 s", [(seconds, 10.0) for seconds in whole], limit=1.0)
    yield row(
        f"{BATCH} records written / as many bytes (wall clock)", [pair for seconds in found for pair in seconds["disk"]]
    )


def evaluation():
    """Seconds of each part."""
    draw = np.random.default_rng(0)
    # On the disk that runs lie on; a folder for temporary files may be in memory.
    (ROOT / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as place, redirect_stdout(None):
        folder = RunFolder(Path(place))
        folder.identity.write_text("{}")
        folder.config.write_text("")
        trainer, task = made(place)
        writer = RecordWriter()
        seconds = {"written": timed(lambda: writer.on_test_start(trainer, task), time.process_time)}
        seconds["disk"] = []
        for first in range(0, SAMPLES, BATCH):
            index = range(first, min(first + BATCH, SAMPLES))
            for pair in task.pairs:
                predictions = draw.integers(10, size=(len(index), 2, RUNS)).tolist()
                records = [
                    Record(*pair, i, i % 10, clean, broken, 0.0313, 1.25, 0.37)
                    for i, (clean, broken) in zip(index, predictions, strict=True)
                ]
                cpu = time.process_time()
                wall = timed(lambda records=records: writer.on_evaluated(trainer, task, records, []), time.perf_counter)
                seconds["written"] += time.process_time() - cpu
                seconds["disk"].append((wall, bare("".join(map(Record.line, records)).encode(), Path(place) / "bare")))
        writer.teardown(trainer, task, "test")
        trainer, task = made(place)
        seconds["resumed"] = timed(lambda: writer.on_test_start(trainer, task), time.process_time)
        writer.teardown(trainer, task, "test")
        assert task.completed == SAMPLES * len(task.pairs)
        seconds["summarized"] = timed(lambda: Report().on_test_end(trainer, task), time.process_time)
    return seconds


def made(place):
    """An evaluation that is about to begin, as far as records need one."""
    attacks = {f"attack{k}": PGD("linf", 0.03, 1, 0.01) for k in range(ATTACKS)}
    defenses = {f"defense{k}": NoPurifier for k in range(DEFENSES)}
    task = RobustnessTask(ResNetClassifier(8, 8, 10, 1, 4), UNet(1, 8, 8, [1]), defenses, attacks, runs=RUNS)
    strategy = SimpleNamespace(broadcast=lambda value: value, barrier=lambda name: None)
    trainer = SimpleNamespace(
        default_root_dir=place,
        datamodule=Labels(),
        strategy=strategy,
        received_sigterm=False,
        is_global_zero=True,
        global_rank=0,
        loggers=[],
    )
    return trainer, task


def bare(content, path):
    """Seconds to bring the same bytes to the disk."""
    now = time.perf_counter()
    with path.open("ab", buffering=0) as stream:
        stream.write(content)
        os.fsync(stream.fileno())
    return time.perf_counter() - now
