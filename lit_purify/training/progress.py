"""How far a training is, where no terminal shows a bar, and what it will cost."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lit_purify.evaluation.estimate import duration, gibibytes, peak_memory
from lit_purify.training.task import TrainingTask

_SELDOM, _OFTEN = 600.0, 20.0
"""Seconds after which a line is printed in any case, and before which none is."""
_WARM, _MEASURED = 2, 5
"""Steps of a dry run: those that do not count, and those that do."""


class TrainingProgress(Callback):
    """Prints a line after 20 s, at every tenth of the steps, and at least every ten minutes."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says where a resumed training goes on."""
        self.begun = self.said = perf_counter()
        self.first = self.said_at = trainer.global_step
        self.silent = not trainer.is_global_zero or sys.stderr.isatty()
        if trainer.global_step and trainer.is_global_zero:
            print(f"goes on after step {trainer.global_step}", file=sys.stderr)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Steps, time left, loss."""
        step, total, now = trainer.global_step, int(trainer.estimated_stepping_batches), perf_counter()
        tenth = 10 * step // total > 10 * self.said_at // total or self.said_at == self.first
        if (
            self.silent
            or step == self.said_at
            or not (now - self.said >= _SELDOM or (tenth and now - self.said >= _OFTEN))
        ):
            return
        self.said, self.said_at = now, step
        left = duration((total - step) * (now - self.begun) / (step - self.first))
        loss = trainer.callback_metrics.get("train/loss")
        shown = "" if loss is None else f", loss {float(loss):.4f}"
        print(f"step {step} of {total}: {left} left{shown}", file=sys.stderr, flush=True)


class _Clock(Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:  # noqa: ANN401
        if trainer.global_step == _WARM:
            self.begun = perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = (perf_counter() - self.begun) / _MEASURED
        self.memory = peak_memory(pl_module.device)


def measure(task: TrainingTask, data: L.LightningDataModule, settings: Mapping[str, Any]) -> str:
    """Takes a few steps on one device, writes nothing, and says what the whole training will cost.

    Args:
        task: What is trained.
        data: Its images.
        settings: Arguments of the trainer.
    """
    clock = _Clock()
    own: dict[str, Any] = {
        "max_steps": _WARM + _MEASURED,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
    }
    own |= {"logger": False, "callbacks": [clock], "enable_checkpointing": False, "enable_model_summary": False}
    own |= {"enable_progress_bar": False, "use_distributed_sampler": False, "devices": 1, "strategy": "auto"}
    trainer = L.Trainer(**{**settings, **own, "num_nodes": 1})
    trainer.fit(task, datamodule=data)
    steps = int(settings.get("max_steps", -1))
    if epochs := settings.get("max_epochs") or (1000 if steps < 0 else None):
        batches = len(trainer.train_dataloader) if trainer.train_dataloader is not None else 0
        every = int(settings.get("accumulate_grad_batches", 1))
        bounded = epochs * -(-batches // every)
        steps = bounded if steps < 0 else min(steps, bounded)
    total = duration(steps * clock.seconds)
    return (
        f"{clock.seconds:.3g} s a step on {trainer.strategy.root_device}, {steps} steps: {total} without validation; "
        f"peak memory {gibibytes(clock.memory)}. Nothing was written."
    )
