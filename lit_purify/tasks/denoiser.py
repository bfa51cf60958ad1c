"""Training a denoiser for variable-intensity noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lit_purify.data.base import Batch
from lit_purify.defense.masks import Mask
from lit_purify.errors import InputError
from lit_purify.functional.diffusion import noised, to_diffusion
from lit_purify.functional.levels import two_level
from lit_purify.functional.mask import random_shapes
from lit_purify.functional.noise import EVALUATION, KeyedNoise, Noise
from lit_purify.models import Classifier, Denoiser
from lit_purify.tasks.training import TrainingTask

_NOISE, _LEVELS, _SHAPES, _AUGMENT = range(4)
_SHAPE_COUNT = 3


class DenoiserTask(TrainingTask):
    """Predicts the noise, mean squared error, at levels drawn uniformly from 1 .. ``max_level``.

    Each image gets one level everywhere, or two: one inside and one outside a mask, either of them the stronger. The
    mask is the classifier's attention or a random shape.

    Args:
        denoiser: What is trained.
        classifier: Whose attention gives masks; not trained, not saved. ``None``: no such masks.
        mask: Rule for the classifier's masks.
        constant: Share of images with one level everywhere.
        attention: Share with two levels by the classifier's attention.
        shapes: Share with two levels by random shapes.
        max_level: Strongest level trained, in noising steps.
        val_levels: Levels whose validation error is logged: everywhere, and inside (with half of it outside) and
            outside (with half of it inside) a mask.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Of AdamW.
        warmup: Steps of linear warm-up.
        shift_pixels: Augmentation: move images by up to so many pixels.
        mirror: Augmentation: mirror half of the images.
        seed: Of noise, levels and augmentation.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        classifier: Classifier | None = None,
        mask: Mask | None = None,
        constant: float = 0.5,
        attention: float = 0.25,
        shapes: float = 0.25,
        max_level: int = 1000,
        val_levels: Sequence[int] = (50, 100, 200, 400),
        learning_rate: float = 4e-4,
        weight_decay: float = 0.0,
        warmup: int = 500,
        shift_pixels: int = 0,
        mirror: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup, shift_pixels, mirror, seed)
        shares = (constant, attention, shapes)
        if min(shares) < 0 or abs(sum(shares) - 1.0) > 1e-6:
            raise InputError(
                f"constant + attention + shapes = {sum(shares):g}: shares must not be negative and add to 1"
            )
        if attention > 0 and (classifier is None or mask is None):
            raise InputError(f"attention = {attention} needs a classifier and a mask: give both, or set attention to 0")
        for level in (max_level, *val_levels):
            denoiser.schedule.check("max_level" if level == max_level else "val_levels", level, low=1)
        self.denoiser, self.constant, self.attention, self.max_level = denoiser, constant, attention, max_level
        self.mask, self.val_levels = mask, tuple(val_levels)
        # In a tuple: the weight average and the checkpoints are about the denoiser alone.
        self._classifier: tuple[Classifier, ...] = ()
        if classifier is not None:
            self._classifier = (classifier.eval().requires_grad_(False),)
        names = [f"{place}_t{t}" for t in self.val_levels for place in ("constant", "inside", "outside")]
        self.errors = nn.ModuleDict({name: MeanMetric() for name in names})

    @property
    def network(self) -> Denoiser:
        """The denoiser."""
        return self.denoiser

    def setup(self, stage: str) -> None:
        """Brings the classifier along."""
        for classifier in self._classifier:
            classifier.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Error in the predicted noise, averaged over pixels and images."""
        noise = self.keyed(batch)
        if batch_idx == 0:
            self._check(batch)
        image = self.augmented(batch["image"], noise, _AUGMENT)
        u = to_diffusion(image)
        eps = noise.normal(_NOISE, u)
        levels = self.draw_levels(image, noise)
        loss = (self.denoiser(noised(u, self.denoiser.schedule.at(levels), eps), levels) - eps).square().mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def draw_levels(self, image: Tensor, noise: Noise) -> Tensor:
        """Level maps (B, 1, H, W) of a batch of images in [0, 1]."""
        draws = noise.uniform(_LEVELS, image.new_empty(len(image), 3))
        inside, outside = (1 + (draws[:, k] * self.max_level).long() for k in (0, 1))
        mask = random_shapes(image, noise.uniform(_SHAPES, image.new_empty(len(image), 6 * _SHAPE_COUNT)), _SHAPE_COUNT)
        if self.attention > 0:
            attends = (draws[:, 2] < self.constant + self.attention).reshape(-1, 1, 1, 1)
            mask = torch.where(attends, self._attention(image, noise), mask)
        outside = torch.where(draws[:, 2] < self.constant, inside, outside)
        return two_level(mask, inside, outside)

    def _attention(self, image: Tensor, noise: Noise) -> Tensor:
        if self.mask is None or not self._classifier:
            raise RuntimeError("attention without a classifier and a mask rule")
        return self.mask(self._classifier[0], image, noise)

    def _check(self, batch: Batch) -> None:
        self.denoiser.check_image(batch["image"])
        for classifier in self._classifier:
            classifier.check_image(batch["image"])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Errors by level, with noise that is the same in every epoch."""
        self._check(batch)
        index, image = batch["index"], batch["image"]
        noise = KeyedNoise(self.seed, index, torch.zeros_like(index), EVALUATION)
        u = to_diffusion(image)
        eps = noise.normal(_NOISE, u)
        if self._classifier and self.mask is not None:
            mask = self._attention(image, noise)
        else:
            mask = random_shapes(
                image, noise.uniform(_SHAPES, image.new_empty(len(image), 6 * _SHAPE_COUNT)), _SHAPE_COUNT
            )
        for t in self.val_levels:
            half = max(1, t // 2)
            for place, inside, outside, weight in (
                ("constant", t, t, torch.ones_like(mask)),
                ("inside", t, half, mask),
                ("outside", half, t, 1.0 - mask),
            ):
                levels = two_level(mask, inside, outside)
                x = noised(u, self.denoiser.schedule.at(levels), eps)
                error = (self.denoiser(x, levels) - eps).square().mean(dim=1, keepdim=True)
                self._error(f"{place}_t{t}").update(error, weight)

    def on_validation_epoch_end(self) -> None:
        """Logs every error, and their mean as ``val/loss``."""
        values = {}
        for name in self.errors:
            values[f"val/mse_{name}"] = self._error(name).compute()
            self._error(name).reset()
        self.log_dict(values)
        self.log("val/loss", torch.stack(list(values.values())).mean(), prog_bar=True)

    def _error(self, name: str) -> MeanMetric:
        metric = self.errors[name]
        assert isinstance(metric, MeanMetric)
        return metric
