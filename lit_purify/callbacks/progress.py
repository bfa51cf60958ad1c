"""How far an evaluation is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from time import monotonic

import lightning as L
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from lit_purify.evaluation.estimate import duration, gibibytes, peak_memory, work
from lit_purify.evaluation.module import EvaluationListener, RobustnessTask, View
from lit_purify.evaluation.own_images import Purification
from lit_purify.evaluation.records import Record

_SELDOM, _OFTEN = 600.0, 10.0
"""Seconds after which a log gets a line in any case, and between two lines at least."""


class Progress(Callback, EvaluationListener):
    """What is done, running robust accuracy, time left, peak memory; of several processes, rank zero speaks for all.

    Time left is told by the work that is left, a part of which is known by experience: defenses differ in cost.
    """

    bar: tqdm | None = None

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Begins."""
        if batch_idx == 0 and trainer.is_global_zero and isinstance(pl_module, RobustnessTask):
            samples = len(trainer.datamodule.evaluated)  # type: ignore[attr-defined]
            described = pl_module.describe()
            self.work = {(d["defense"], d["attack"]): work(d, pl_module.runs) for d in described}
            total = samples * len(described)
            left = 1.0 - pl_module.completed / total
            self._begin(
                "attacking", "samples x defenses", total, pl_module.completed, left * samples * sum(self.work.values())
            )

    def on_evaluated(
        self, trainer: L.Trainer, task: RobustnessTask, records: Sequence[Record], views: Sequence[View]
    ) -> None:
        """Counts records."""
        if self.bar is not None:
            pair = records[0].defense, records[0].attack
            count = len(records) * trainer.world_size
            accuracy = f"{' under '.join(pair)}: {100 * task.running(*pair):.1f} % robust"
            self._advance(count, count * self.work[pair], accuracy, trainer)

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Begins."""
        if batch_idx == 0 and trainer.is_global_zero and isinstance(pl_module, Purification):
            self._begin("purifying", "images", len(pl_module.jobs), 0, len(pl_module.jobs))

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts images."""
        if self.bar is not None and isinstance(outputs, int):
            count = outputs * trainer.world_size
            self._advance(count, count, "", trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the bar."""
        self._close()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that what is said of the error gets a line of its own."""
        self._close()

    def _begin(self, verb: str, unit: str, total: int, done: int, left: float) -> None:
        self.started = self.said = monotonic()
        self.unit, self.left, self.spent = unit, left, 0.0
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=verb,
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            mininterval=0.0,
            bar_format="{desc} |{bar}| {n_fmt}/{total_fmt} " + unit + "{postfix}",
        )
        self.done, self.said_at, self.total = done, done, total

    def _advance(self, count: int, spent: float, accuracy: str, trainer: L.Trainer) -> None:
        assert self.bar is not None
        now, before = monotonic(), self.done
        self.done, self.spent = min(self.done + count, self.total), self.spent + spent
        left = (now - self.started) * max(0.0, self.left - self.spent) / self.spent
        said = [
            accuracy,
            f"{duration(left)} left",
            f"peak memory {gibibytes(peak_memory(trainer.strategy.root_device))}",
        ]
        text = ", ".join(part for part in said if part)
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(self.done - before)
        tenth = 10 * self.done // self.total > 10 * self.said_at // self.total
        since = now - self.said
        if self.bar.disable and (since >= _SELDOM or (tenth and since >= _OFTEN)):
            self.said, self.said_at = now, self.done
            print(
                f"{100 * self.done // self.total} %: {self.done} of {self.total} {self.unit}, {text}", file=sys.stderr
            )

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
