"""Appending records as they come, and taking up an interrupted evaluation."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import lightning as L
from lightning.pytorch.callbacks import Callback

from lit_purify.errors import InputError
from lit_purify.evaluation import EvaluationListener, Record, RobustnessTask, View
from lit_purify.evaluation.folder import RunFolder
from lit_purify.evaluation.records import append_records, uncollected


class RecordWriter(Callback, EvaluationListener):
    """Keeps ``records.jsonl``: one line a record, written through at once: a killed run loses one batch at most.

    Rank zero appends to it, every other process to ``records.rankR.jsonl``, which is merged at the end or on resuming.
    """

    stream: BinaryIO | None = None

    @uncollected()
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merges what the last run left, and tells task and data what is done."""
        assert isinstance(pl_module, RobustnessTask)
        if trainer.received_sigterm:
            # Before Stopping heeded it; Lightning notes it and goes on, in a test.
            raise KeyboardInterrupt
        folder = RunFolder(Path(trainer.default_root_dir))
        # Rank zero reads for all: another node may not see yet what it has merged.
        records = trainer.strategy.broadcast(folder.collect(write=True) if trainer.is_global_zero else [])
        data = trainer.datamodule  # type: ignore[attr-defined]
        evaluated = data.evaluated
        labels = dict(zip(evaluated.positions.tolist(), evaluated.labels[evaluated.positions].tolist(), strict=True))
        for record in records:
            if labels.get(record.index) != record.label:
                raise InputError(
                    f"{folder.path} holds a record of sample {record.index} with label {record.label}, which these "
                    "images do not have: choose another run folder"
                )
        pl_module.resume(records, count=trainer.is_global_zero)
        pairs = Counter(record.index for record in records)
        data.finished = [index for index, found in pairs.items() if found == len(pl_module.evaluator.pairs)]
        self.stream = folder.open_part(trainer.global_rank)
        if records and trainer.is_global_zero:
            print(f"{folder.path}: goes on after {len(records)} records")

    def on_evaluated(
        self, trainer: L.Trainer, task: RobustnessTask, records: Sequence[Record], views: Sequence[View]
    ) -> None:
        """One write a batch, flushed to the disk."""
        assert self.stream is not None
        path = self.stream.name
        try:
            append_records(self.stream, records)
        except OSError as error:
            raise InputError(
                f"{path}: {str(error.strerror).lower()}; what is recorded stays: make room and give the same command "
                "again"
            ) from error
        if os.fstat(self.stream.fileno()).st_nlink == 0:
            raise InputError(f"{path}: removed while it was written; give the same command again, unless it runs again")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Closes the file."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Says how to go on."""
        self._close()
        if trainer.is_global_zero and isinstance(exception, KeyboardInterrupt):
            print(f"\n{trainer.default_root_dir}: stopped; the same command goes on from here", file=sys.stderr)

    def _close(self) -> None:
        if self.stream is not None:
            self.stream.close()
