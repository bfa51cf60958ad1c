"""How far a training is, where no terminal shows a bar, and what it will cost."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback

from lit_purify.evaluation.estimate import duration, gibibytes, peak_memory
from lit_purify.functional.images import sample_shape
from lit_purify.models import Classifier, Denoiser
from lit_purify.training.task import TrainingTask

_FIRST, _SELDOM = 20.0, 600.0
"""Seconds until the first line, and between two lines at most."""
_DAY, _ROWS = 86400.0, 2
_WARM, _MEASURED = 2, 5
"""Batches of a dry run: those that do not count, and those that do."""


class TrainingProgress(Callback):
    """Prints a line after 20 s, at every tenth of the steps, and at least every ten minutes.

    Before the first step it warns of a training that takes more than a day on a CPU.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says where a resumed training goes on, and whether it will take days."""
        self.first, self.begun = trainer.global_step, perf_counter()
        total = int(trainer.estimated_stepping_batches)
        self.tenth, self.due = 10 * self.first // total, self.begun + _FIRST
        if 0 < self.first < total and trainer.is_global_zero:
            print(f"goes on after step {self.first}", file=sys.stderr)
        slowly = trainer.is_global_zero and trainer.strategy.root_device.type == "cpu"
        if slowly and isinstance(pl_module, TrainingTask):
            size = trainer.datamodule.batch_size * trainer.accumulate_grad_batches  # type: ignore[attr-defined]
            days = (total - self.first) * size * seconds_a_sample(pl_module.network) / _DAY
            if days > 1:
                slow = f"on this CPU the training takes about {days:.0f} days"
                print(f"warning: {slow}: take a GPU, a smaller network or fewer steps", file=sys.stderr, flush=True)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Steps, time left, loss."""
        step, total, now = trainer.global_step, int(trainer.estimated_stepping_batches), perf_counter()
        if not trainer.is_global_zero or step == self.first:
            return
        left = (total - step) * (now - self.begun) / (step - self.first)
        tenth = 10 * step // total
        due = now >= self.due or (tenth > self.tenth and now >= self.begun + _FIRST)
        if not due or sys.stderr.isatty():
            return
        self.tenth, self.due = tenth, now + _SELDOM
        loss = trainer.callback_metrics.get("train/loss")
        shown = "" if loss is None else f", loss {float(loss):.4f}"
        print(f"step {step} of {total}: {duration(left)} left{shown}", file=sys.stderr, flush=True)


def seconds_a_sample(network: Classifier | Denoiser) -> float:
    """Seconds of a forward and a backward pass, by the second of two passes of two samples; changes no weight."""
    x = torch.zeros(_ROWS, *sample_shape(network.channels, network.size))
    given = (x, torch.ones(_ROWS)) if isinstance(network, Denoiser) else (x,)
    training, started = network.training, 0.0
    network.eval()
    for _ in range(2):
        started = perf_counter()
        with torch.enable_grad():
            # Unlike backward(), this is not seen by what averages gradients over processes.
            torch.autograd.grad(network(*given).sum(), list(network.parameters()), allow_unused=True)
    network.train(training)
    return (perf_counter() - started) / _ROWS


def measure(task: TrainingTask, data: L.LightningDataModule, settings: Mapping[str, Any]) -> str:
    """Trains on a few batches on one device, writes nothing, and says what the whole training will cost.

    Args:
        task: What is trained.
        data: Its images.
        settings: Arguments of the trainer.
    """
    times: list[float] = []

    def tick(trainer: L.Trainer, *_: object) -> None:
        times.append(perf_counter())
        # An epoch may have fewer batches.
        trainer.should_stop = len(times) == _WARM + _MEASURED

    clock = LambdaCallback(on_train_batch_end=tick)
    own: dict[str, Any] = {"devices": 1, "num_nodes": 1, "strategy": "auto", "callbacks": [clock], "logger": False}
    own |= {
        "limit_train_batches": _WARM + _MEASURED,
        "limit_val_batches": 0,
        "max_epochs": _WARM + _MEASURED,
        "max_steps": -1,
    }
    off = ("progress_bar", "checkpointing", "model_summary")
    own |= {f"enable_{name}": False for name in off} | {"use_distributed_sampler": False}
    trainer = L.Trainer(**{**settings, **own})
    trainer.fit(task, datamodule=data)
    batches, every = len(data.train_dataloader()), trainer.accumulate_grad_batches
    limit = settings.get("limit_train_batches")
    batches = batches if limit is None else min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    steps, epochs = settings["max_steps"], settings["max_epochs"]
    bounds = [steps] if steps > 0 else []
    bounds += [] if epochs in (None, -1) and bounds else [(1000 if epochs is None else epochs) * -(-batches // every)]
    steps = min(bounds)
    seconds = (times[-1] - times[_WARM - 1]) / (len(times) - _WARM) * every
    return (
        f"{seconds:.3g} s a step on {trainer.strategy.root_device}, {steps} steps: {duration(steps * seconds)} without "
        f"validation; peak memory {gibibytes(peak_memory(trainer.strategy.root_device))}. Nothing was written."
    )
