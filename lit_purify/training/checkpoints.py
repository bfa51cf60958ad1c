"""Atomic checkpoints, and the average of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_purify.atomic import replacing
from lit_purify.errors import InputError, notice
from lit_purify.private import average_in_few_kernels

_LAG, _FEW = 0.2, 10
"""An average lags if its window exceeds this part of the training; shorter trainings get no warning."""


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints atomically: a killed training keeps the previous checkpoint.

    Lightning's own class writes into the system's temporary folder and copies from there.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:  # noqa: ANN401
        """Writes a temporary file, flushes it to the disk, and renames it."""
        with replacing(Path(path)) as stream:
            torch.save(checkpoint, stream)


class Averaging(WeightAveraging):
    """Exponential moving average of the weights, updated at every step.

    After n updates the decay is ``min(decay, (1 + n) / (10 + n))``, so the average soon forgets the initial weights.

    Args:
        decay: Final decay, in (0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0.0 < decay < 1.0:
            raise InputError(f"average = {decay}: use a decay within (0, 1), or 0 for no average")

        super().__init__(use_buffers=False)
        self.decay = decay

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Creates the average on the training's device: on the CPU, every step would wait for it."""
        pl_module.to(trainer.strategy.root_device)
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            average_in_few_kernels(self, self._kept)

    def _kept(self, updates: int) -> float:
        """The decay after this many updates, rounded to 32 bits."""
        return float(torch.tensor((1 + updates) / (10 + updates), dtype=torch.float32).clamp(max=self.decay))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copies the average into the network, and warns if it lags behind the weights."""
        super().on_train_end(trainer, pl_module)
        steps = trainer.global_step
        window = 1.0 / (1.0 - self._kept(steps))
        if steps >= _FEW and window > _LAG * steps and trainer.is_global_zero:
            lags = f"the average of the weights still lags: it reaches back {window:.0f} of {steps} steps"
            notice(f"warning: {lags}: train longer, or set average to 0")
