"""Progress: a bar on a terminal, occasional lines in a log."""

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
"""Seconds until a log's first line, between two lines of a log, and between two texts of a bar."""


class Progress(Callback, EvaluationListener):
    """Shows accuracy or loss, time left and peak memory on rank 0, extrapolated to all ranks.

    A training counts steps and a purification counts images. An evaluation counts network calls, because defenses
    differ in cost. Without a terminal it prints a line for every 10 % and every ten minutes.
    """

    bar: tqdm | None = None

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Starts the bar of an evaluation; existing records are known by then."""
        if batch_idx == 0 and isinstance(pl_module, RobustnessTask):
            evaluator, done = pl_module.evaluator, pl_module.ledger.done
            self.cost = {(d["defense"], d["attack"]): work(d, evaluator.runs) for d in evaluator.describe()}
            samples = len(trainer.datamodule.evaluated)  # type: ignore[attr-defined]
            left = samples * sum(self.cost.values()) - sum(self.cost[key[:2]] for key in done)
            self._begin(trainer, "attacking", left)

    def on_evaluated(
        self, trainer: L.Trainer, task: RobustnessTask, records: Sequence[Record], views: Sequence[View]
    ) -> None:
        """Advances the bar by new records."""
        if self.bar is not None:
            pair = records[0].defense, records[0].attack
            done = self.done + len(records) * self.cost[pair] * trainer.world_size
            self._show(trainer, done, lambda: f"{' under '.join(pair)}: {100 * task.running(*pair):.1f} % robust, ")

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Starts the bar of a purification."""
        if batch_idx == 0 and isinstance(pl_module, Purification):
            self._begin(trainer, "purifying", len(pl_module.jobs))

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:  # noqa: ANN401
        """Advances the bar by purified images."""
        if self.bar is not None:
            self._show(trainer, self.done + outputs * trainer.world_size, str)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the bar of a training, at its current step."""
        self._begin(trainer, "training", int(trainer.estimated_stepping_batches), trainer.global_step)
        if self.bar is not None and 0 < self.first < self.total:
            print(f"resumes after step {self.first}", file=sys.stderr)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Advances the bar by a step."""
        # With accumulated gradients, several batches share a step.
        if self.bar is not None and trainer.global_step > self.done:
            step, loss = trainer.global_step, trainer.callback_metrics.get("train/loss")
            about = f"step {step} of {self.total}, "
            self._show(trainer, step, lambda: about if loss is None else f"{about}loss {float(loss):.4f}, ")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Closes the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that an error message starts on a new line."""
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
        """Updates the bar; calls ``text`` only to show it, because reading a loss waits for the GPU."""
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
