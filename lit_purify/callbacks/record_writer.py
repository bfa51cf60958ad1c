"""Appending records as they come, and taking up an interrupted evaluation."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

import lightning as L
from lightning.pytorch.callbacks import Callback

from lit_purify.metrics import Record
from lit_purify.run_folder import RunFolder
from lit_purify.tasks.robustness import EvaluationListener, RobustnessTask, View


class RecordWriter(Callback, EvaluationListener):
    """Keeps ``records.jsonl``: one line a record, written through at once: a killed run loses one batch at most."""

    lock: IO[str] | None = None

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merges what the last run left, and tells the task what is done."""
        assert isinstance(pl_module, RobustnessTask)
        # Lightning notes the signal and goes on, in a test. Every record is on the disk: ending at once loses nothing.
        signal.signal(signal.SIGTERM, _end)
        folder = RunFolder(Path(trainer.default_root_dir))
        if trainer.is_global_zero:
            self.lock = folder.lock()
            folder.collect(write=True)
        trainer.strategy.barrier("records")
        records = folder.collect(write=False)
        pl_module.resume(records, count=trainer.is_global_zero)
        # Nobody writes before everybody has read.
        trainer.strategy.barrier("resumed")
        if records and trainer.is_global_zero:
            print(f"{folder.path}: goes on after {len(records)} records")

    def on_evaluated(
        self, trainer: L.Trainer, task: RobustnessTask, records: Sequence[Record], views: Sequence[View]
    ) -> None:
        """One write a batch, flushed to the disk."""
        path = RunFolder(Path(trainer.default_root_dir)).part(trainer.global_rank)
        with path.open("a") as stream:
            stream.write("".join(record.line() for record in records))
            stream.flush()
            os.fsync(stream.fileno())

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lets others write."""
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Says how to go on, and lets others write."""
        self._release()
        if trainer.is_global_zero and isinstance(exception, KeyboardInterrupt):
            print(f"\n{trainer.default_root_dir}: stopped; the same command goes on from here", file=sys.stderr)

    def _release(self) -> None:
        if self.lock is not None:
            self.lock.close()


def _end(signum: int, frame: FrameType | None) -> NoReturn:
    # As Ctrl-C, upon which Lightning ends the processes that it has started as well.
    raise KeyboardInterrupt
