"""How far a run is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from lit_purify.evaluation import EvaluationListener, Record, RobustnessTask, View
from lit_purify.evaluation.estimate import duration, gibibytes, peak_memory, work
from lit_purify.evaluation.own_images import Purification

_FIRST, _SELDOM, _OFTEN = 20.0, 600.0, 0.2
"""Seconds until a log gets its first line, and between two lines of a log and two texts of a bar at most."""


class Progress(Callback, EvaluationListener):
    """Shows accuracy or loss, time left and peak memory; of several processes, rank zero speaks for all.

    A training counts steps, a purification images, an evaluation the cost of its samples in network calls, as defenses
    differ in cost. Without a terminal a line is printed for every tenth, and every ten minutes.
    """

    bar: tqdm | None = None

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Begins, when what is recorded already is known."""
        if batch_idx == 0 and isinstance(pl_module, RobustnessTask):
            evaluator, done = pl_module.evaluator, pl_module.ledger.done
            self.cost = {(d["defense"], d["attack"]): work(d, evaluator.runs) for d in evaluator.describe()}
            samples = len(trainer.datamodule.evaluated)  # type: ignore[attr-defined]
            left = samples * sum(self.cost.values()) - sum(self.cost[key[:2]] for key in done)
            self._begin(trainer, "attacking", left)

    def on_evaluated(
        self, trainer: L.Trainer, task: RobustnessTask, records: Sequence[Record], views: Sequence[View]
    ) -> None:
        """Counts records."""
        if self.bar is not None:
            pair = records[0].defense, records[0].attack
            done = self.done + len(records) * self.cost[pair] * trainer.world_size
            self._show(trainer, done, lambda: f"{' under '.join(pair)}: {100 * task.running(*pair):.1f} % robust, ")

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Begins."""
        if batch_idx == 0 and isinstance(pl_module, Purification):
            self._begin(trainer, "purifying", len(pl_module.jobs))

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:  # noqa: ANN401
        """Counts images."""
        if self.bar is not None:
            self._show(trainer, self.done + outputs * trainer.world_size, str)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins, or goes on."""
        self._begin(trainer, "training", int(trainer.estimated_stepping_batches), trainer.global_step)
        if self.bar is not None and 0 < self.first < self.total:
            print(f"goes on after step {self.first}", file=sys.stderr)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Counts steps."""
        # Several batches make a step where gradients are accumulated.
        if self.bar is not None and trainer.global_step > self.done:
            step, loss = trainer.global_step, trainer.callback_metrics.get("train/loss")
            about = f"step {step} of {self.total}, "
            self._show(trainer, step, lambda: about if loss is None else f"{about}loss {float(loss):.4f}, ")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Closes the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that an error message gets a line of its own."""
        self._close()

    def _begin(self, trainer: L.Trainer, verb: str, total: int, first: int = 0) -> None:
        if trainer.is_global_zero:
            terminal, style = sys.stderr.isatty(), "{desc} |{bar}| {percentage:3.0f} %{postfix}"
            self.total, self.first, self.done, self.started = total, first, first, monotonic()
            self.bar = tqdm(
                total=total, initial=first, desc=verb, bar_format=style, dynamic_ncols=True, disable=not terminal
            )
            self.due = self.started + (_FIRST if self.bar.disable else 0.0)

    def _show(self, trainer: L.Trainer, done: int, text: Callable[[], str]) -> None:
        """Asks for the text only when it is shown: on a GPU a loss has to be waited for."""
        assert self.bar is not None
        before, self.done, now = self.done, min(self.total, done), monotonic()
        tenth = 10 * self.done // self.total > 10 * before // self.total
        if now >= self.due or (tenth and now >= self.started + _FIRST):
            left = duration((now - self.started) * (self.total - self.done) / max(1, self.done - self.first))
            memory = gibibytes(peak_memory(trainer.strategy.root_device))
            line = f"{text()}{left} left, peak memory {memory}"
            if self.bar.disable:
                print(f"{100 * self.done // self.total} %: {line}", file=sys.stderr, flush=True)
            self.bar.set_postfix_str(line, refresh=False)
            self.due = now + (_SELDOM if self.bar.disable else _OFTEN)
        self.bar.update(self.done - before)
        if self.done == self.total:
            self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
