"""Base class of both trainings: optimizer, keyed randomness, checks of resumed trainings."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lit_purify.data.base import Batch, ImageDataModule
from lit_purify.errors import InputError
from lit_purify.functional.images import flip, shift
from lit_purify.functional.noise import TRAINING, KeyedNoise
from lit_purify.models import Classifier, Denoiser
from lit_purify.private import mend_resumed
from lit_purify.training.batch_norm import SynchronizedBatchNorm


class TrainingTask(L.LightningModule, ABC):
    """AdamW with warm-up and cosine decay; randomness keyed by (seed, sample, epoch).

    So the split of a batch over processes changes no noise, and a resumed training takes the same steps as an
    uninterrupted one.

    Args:
        learning_rate: Peak learning rate.
        weight_decay: Weight decay of AdamW.
        warmup: Steps of linear warm-up.
        shift_pixels: Augmentation: shift images by up to this many pixels.
        mirror: Augmentation: mirror half of the images.
        seed: Seed of noise and augmentation.

    Attributes:
        facts: Facts about the training for the exported file.
    """

    def __init__(
        self, learning_rate: float, weight_decay: float, warmup: int, shift_pixels: int, mirror: bool, seed: int
    ) -> None:
        super().__init__()
        if not 0.0 < learning_rate < 1.0:
            raise InputError(f"learning_rate = {learning_rate} is outside (0, 1): use e.g. 1e-3")
        for name, value in (("weight_decay", weight_decay), ("shift_pixels", shift_pixels)):
            if value < 0:
                raise InputError(f"{name} = {value}: use 0 or more")
        if not 0 <= seed < 2**32:
            raise InputError(f"seed = {seed} is outside 0 .. 2**32 - 1: use a seed within it")
        self.learning_rate, self.weight_decay, self.warmup = learning_rate, weight_decay, warmup
        self.shift_pixels, self.mirror, self.seed = shift_pixels, mirror, seed
        self.facts: dict[str, Any] = {}
        self.means: dict[str, MeanMetric] = {}

    @property
    @abstractmethod
    def network(self) -> Classifier | Denoiser:
        """The network to train and export."""

    def setup(self, stage: str) -> None:
        """Checks the data, and switches the network to training mode: loaded networks are in evaluation mode."""
        self.check(self.trainer.datamodule)  # type: ignore[attr-defined]
        # Convolutions are faster with channels last, on tensor cores and on CPUs.
        self.network.train().to(memory_format=torch.channels_last)
        normalizes = any(
            isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) for m in self.network.modules()
        )
        self.synchronizes = normalizes and self.trainer.world_size > 1

    @abstractmethod
    def check(self, data: ImageDataModule) -> None:
        """Raises an ``InputError`` if networks and data do not match."""

    @abstractmethod
    def loss(self, batch: Batch, noise: KeyedNoise) -> Tensor:
        """The loss of a training batch, averaged over its images."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch; batch normalization uses the images of all processes."""
        with SynchronizedBatchNorm() if self.synchronizes else nullcontext():
            loss = self.loss(batch, self.keyed(batch))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def measure(self, name: str, values: Tensor, weights: Tensor | float = 1.0) -> None:
        """Adds values to the weighted mean that the validation logs as ``val/<name>``."""
        if name not in self.means:
            self.means[name] = MeanMetric().to(self.device)
        self.means[name].update(values, weights)

    def on_validation_epoch_end(self) -> None:
        """Logs the means of this validation over all processes."""
        means = {f"val/{name}": mean.compute() for name, mean in self.means.items()}
        losses = [mean for name, mean in means.items() if name.startswith("val/mse_")]
        self.log_dict(means | ({"val/loss": torch.stack(losses).mean()} if losses else {}))
        self.means.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores the samples per batch over all processes, and the batches per step."""
        checkpoint["batch"] = self._batch()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that a step has as many samples as before; the number of processes may differ.

        Raises:
            InputError: The checkpoint was trained with another number of samples per step.
        """
        if not self.trainer.training:
            return
        (samples, batches), (before, batches_before) = self._batch(), checkpoint.get("batch", self._batch())
        within = not checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]
        if samples * batches != before * batches_before or (within and samples != before):
            ranks = self.trainer.world_size
            raise InputError(
                f"ckpt_path: trained with {before} samples per batch over all processes and {batches_before} batches "
                f"per step, now {samples} and {batches}: set data.batch_size to {before / ranks:g} for "
                f"{ranks} processes" + ("" if within else ", or trainer.accumulate_grad_batches to make up for it")
            )

    def _batch(self) -> tuple[int, int]:
        size = getattr(self.trainer.datamodule, "batch_size", 0)  # type: ignore[attr-defined]
        return self.trainer.world_size * size, self.trainer.accumulate_grad_batches

    def on_train_start(self) -> None:
        """Corrects Lightning's counters of a resumed training."""
        mend_resumed(self.trainer)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seeds dropout for each process and batch, so that a resumed training repeats it."""
        # With accumulated gradients, several batches share a step.
        stream = (self.seed * 65_537 + self.global_rank) * 1_000_003 + self.global_step
        torch.manual_seed((stream * 1_000_033 + batch_idx) % 2**63)

    def keyed(self, batch: Batch) -> KeyedNoise:
        """Noise of a training batch; each epoch has other noise."""
        return KeyedNoise(self.seed, batch["index"], torch.zeros_like(batch["index"]), TRAINING + self.current_epoch)

    def augmented(self, image: Tensor, noise: KeyedNoise, step: int) -> Tensor:
        """Randomly shifted and mirrored images (B, C, H, W)."""
        draws = noise.uniform(step, image.new_empty(len(image), 3))
        image = shift(image, draws[:, :2], self.shift_pixels)
        return flip(image, draws[:, 2:]) if self.mirror else image

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips gradients also for a fused optimizer, which Lightning refuses in case it unscales float16 gradients."""
        if optimizer.defaults.get("fused") and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), gradient_clip_val)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW; linear warm-up, then a cosine to 0 at the last step."""
        weights = list(self.network.parameters())
        # One kernel for all weights, only on GPUs: on CPUs its rounding differs.
        fused = weights[0].is_cuda or None
        optimizer = torch.optim.AdamW(weights, self.learning_rate, weight_decay=self.weight_decay, fused=fused)
        if math.isinf(self.trainer.estimated_stepping_batches):
            raise InputError("the training has no end, so no schedule: set trainer.max_steps or trainer.max_epochs")
        total = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, min(self.warmup, total // 2))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
