"""How far an evaluation is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from time import monotonic

import lightning as L
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from lit_purify.evaluation import EvaluationListener, Record, RobustnessTask, View
from lit_purify.evaluation.estimate import duration, gibibytes, peak_memory, work
from lit_purify.evaluation.own_images import Purification

_QUIET = 5.0
"""Seconds after which a log gets its first line."""


class Progress(Callback, EvaluationListener):
    """Shows running robust accuracy, time left and peak memory; of several processes, rank zero speaks for all.

    The bar counts the cost of samples, in network calls, as defenses differ in cost. Without a terminal a line is
    printed for every tenth of the cost.
    """

    bar: tqdm | None = None

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Begins."""
        if batch_idx == 0 and trainer.is_global_zero and isinstance(pl_module, RobustnessTask):
            evaluator, done = pl_module.evaluator, pl_module.ledger.done
            self.cost = {(d["defense"], d["attack"]): work(d, evaluator.runs) for d in evaluator.describe()}
            samples = len(trainer.datamodule.evaluated)  # type: ignore[attr-defined]
            left = samples * sum(self.cost.values()) - sum(self.cost[key[:2]] for key in done)
            self._begin("attacking", left)

    def on_evaluated(
        self, trainer: L.Trainer, task: RobustnessTask, records: Sequence[Record], views: Sequence[View]
    ) -> None:
        """Counts records."""
        pair = records[0].defense, records[0].attack
        self._advance(
            trainer,
            len(records) * (self.cost[pair] if self.bar is not None else 0),
            f"{' under '.join(pair)}: {100 * task.running(*pair):.1f} % robust, ",
        )

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Begins."""
        if batch_idx == 0 and trainer.is_global_zero and isinstance(pl_module, Purification):
            self._begin("purifying", len(pl_module.jobs))

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
        if isinstance(outputs, int):
            self._advance(trainer, outputs, "")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the bar."""
        self._close()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that an error message gets a line of its own."""
        self._close()

    def _begin(self, verb: str, total: int) -> None:
        style = "{desc} |{bar}| {percentage:3.0f} %{postfix}"
        self.bar, self.total, self.done, self.started = None, total, 0, monotonic()
        self.bar = tqdm(total=total, desc=verb, bar_format=style, dynamic_ncols=True, disable=not sys.stderr.isatty())

    def _advance(self, trainer: L.Trainer, cost: int, accuracy: str) -> None:
        if self.bar is None:
            return
        before, self.done = self.done, min(self.total, self.done + cost * trainer.world_size)
        left = (monotonic() - self.started) * (self.total - self.done) / max(1, self.done)
        memory = gibibytes(peak_memory(trainer.strategy.root_device))
        text = f"{accuracy}{duration(left)} left, peak memory {memory}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(self.done - before)
        if (
            self.bar.disable
            and monotonic() - self.started > _QUIET
            and 10 * self.done // self.total > 10 * before // self.total
        ):
            print(f"{100 * self.done // self.total} %: {text}", file=sys.stderr)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
