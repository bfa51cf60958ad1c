"""Writes the run folder of an evaluation, and resumes an interrupted one."""

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
    """Writes records to ``records.jsonl`` after each batch, so that a killed run loses at most one batch.

    The pictures of the gallery go to ``overlays/``. At the end it writes ``summary.json`` and ``report.html``, and
    prints the table. Other ranks than 0 write ``records.rankR.jsonl``, which rank 0 merges.
    """

    stream: BinaryIO | None = None
    text = ""

    @uncollected()
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merges existing records, and passes them to the task and the data."""
        assert isinstance(pl_module, RobustnessTask)
        if trainer.received_sigterm:
            # It came before Stopping's handler was set; Lightning would continue a test.
            raise KeyboardInterrupt
        folder = RunFolder(Path(trainer.default_root_dir))
        # Rank 0 reads for all: other nodes may not see the merged file yet.
        records = trainer.strategy.broadcast(folder.collect(write=True) if trainer.is_global_zero else [])
        pl_module.resume(records, count=trainer.is_global_zero)
        pairs = Counter(record.index for record in records)
        pl_module.data.finished = [index for index, found in pairs.items() if found == len(pl_module.evaluator.pairs)]
        self.stream = folder.open_part(trainer.global_rank)
        if records and trainer.is_global_zero:
            print(f"{folder.path}: resumes after {len(records)} records")

    def on_evaluated(
        self, trainer: L.Trainer, task: RobustnessTask, records: Sequence[Record], views: Sequence[View]
    ) -> None:
        """Writes pictures and records, and flushes them to the disk."""
        assert self.stream is not None
        for view in views:
            # Pictures come before records: a recorded sample gets no pictures later.
            pictures.write(view, RunFolder(Path(trainer.default_root_dir)).overlays)
        path = self.stream.name
        try:
            append_records(self.stream, records)
        except OSError as error:
            raise InputError(
                f"{path}: {str(error.strerror).lower()}: free some space and run the same command again; "
                "existing records stay"
            ) from error
        if os.fstat(self.stream.fileno()).st_nlink == 0:
            raise InputError(f"{path}: was deleted by another run: wait for that run, or run the same command again")

    @uncollected()
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes summary and report on rank 0, after all ranks are done."""
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
        """Closes the file and prints the table, after the loggers' output."""
        self._close()
        if self.text:
            print(self.text)
            self.text = ""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Closes the file, and prints how to resume after an interruption."""
        self._close()
        if trainer.is_global_zero and isinstance(exception, KeyboardInterrupt):
            print(f"\n{trainer.default_root_dir}: stopped; the same command resumes from here", file=sys.stderr)

    def _close(self) -> None:
        if self.stream is not None:
            self.stream.close()
