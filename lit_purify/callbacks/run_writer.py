"""What an evaluation writes into its run's folder, and how it takes up an interrupted one."""

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
from lit_purify.report import pictures
from lit_purify.report.html import finish
from lit_purify.report.summary import RULES, table


class RunWriter(Callback, EvaluationListener):
    """Keeps ``records.jsonl``: one line a record, written through at once: a killed run loses one batch at most.

    The pictures of the first samples go to ``overlays/``. When every sample is there, records become ``summary.json``,
    ``report.html`` and the printed table.

    Rank zero appends to it, every other process to ``records.rankR.jsonl``, which is merged at the end or on resuming.
    """

    stream: BinaryIO | None = None
    text = ""

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
        for view in views:
            # Pictures before records: a sample whose record exists is not shown again.
            pictures.write(view, RunFolder(Path(trainer.default_root_dir)).overlays)
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

    @uncollected()
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rank zero writes, once all processes are done."""
        trainer.strategy.barrier("report")
        if not trainer.is_global_zero or not isinstance(pl_module, RobustnessTask):
            return
        folder, data = RunFolder(Path(trainer.default_root_dir)), pl_module.data
        summary = finish(folder, pl_module.evaluator, data.evaluated, data.name, data.evaluate_on)
        values = {}
        for result in summary["results"]:
            for rule in RULES:
                values[f"robust/{result['defense']}/{result['attack']}/{rule}"] = result["robust"][rule][0]
                values[f"clean/{result['defense']}/{rule}"] = result["clean"][rule][0]
        for logger in trainer.loggers:
            logger.log_metrics(values)
        self.text = f"{table(summary)}\nReport: {folder.report}"

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Closes the file, and prints the table after whatever the loggers print."""
        self._close()
        if self.text:
            print(self.text)
            self.text = ""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Says how to go on."""
        self._close()
        if trainer.is_global_zero and isinstance(exception, KeyboardInterrupt):
            print(f"\n{trainer.default_root_dir}: stopped; the same command goes on from here", file=sys.stderr)

    def _close(self) -> None:
        if self.stream is not None:
            self.stream.close()
