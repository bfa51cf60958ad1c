"""Training of a denoiser for variable-intensity noise."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_purify.data.base import Batch, ImageDataModule
from lit_purify.defense import Mask, Purifier, Trace
from lit_purify.errors import InputError
from lit_purify.functional.diffusion import noised, step_back, to_diffusion, to_image
from lit_purify.functional.images import each
from lit_purify.functional.levels import LevelMap, two_level
from lit_purify.functional.mask import random_shapes
from lit_purify.functional.noise import EVALUATION, KeyedNoise, Noise
from lit_purify.functional.rows import random_fields
from lit_purify.models import Classifier, Denoiser, Replayed, Replays
from lit_purify.training.task import TrainingTask

_NOISE, _LEVELS, _SHAPES, _AUGMENT = range(4)
_SHAPE_COUNT = 3


class DenoiserTask(TrainingTask):
    """Trains a denoiser to predict the noise (mean squared error) at levels drawn uniformly from 1 .. ``max_level``.

    Each image gets one level everywhere, or two independent levels: one inside and one outside a mask. The mask follows
    the classifier's attention or is a random shape; for table rows, a random subset of the fields.

    Validation draws the same noise in every epoch. It logs ``val/mse_<place>_t<level>``, their mean ``val/loss``, and
    ``val/psnr_t<level>`` of images denoised in one step. For each purifier it logs the classifier's accuracy on
    purified images, ``val/purified_accuracy/<name>``, and their PSNR to the clean images, ``val/psnr/<name>``. PSNR is
    in dB, averaged over images.

    Args:
        denoiser: The denoiser to train.
        classifier: Classifier for attention masks and validation; it is neither trained nor saved. ``None`` uses none.
        mask: Rule for the attention masks.
        constant: Share of images with one level everywhere.
        attention: Share with two levels by an attention mask.
        shapes: Share with two levels by random shapes. The three shares add to 1.
        max_level: Strongest level trained, in noising steps.
        val_levels: Levels of the validation errors: everywhere, inside a mask (half the level outside), and outside it
            (half the level inside).
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        warmup: Steps of linear warm-up.
        shift_pixels: Augmentation: shift images by up to this many pixels.
        mirror: Augmentation: mirror half of the images.
        seed: Seed of noise, levels and augmentation.
        purifiers: Purifiers for validation, by name; they are built with the denoiser.
        gradient_checkpointing: Recompute most activations of the denoiser in the backward pass: less memory, about a
            third more time.
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
        purifiers: dict[str, Callable[[Denoiser], Purifier]] | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup, shift_pixels, mirror, seed)
        shares = (constant, attention, shapes)
        if min(shares) < 0 or abs(sum(shares) - 1.0) > 1e-6:
            raise InputError(
                f"constant + attention + shapes = {sum(shares):g}: shares must not be negative and add to 1"
            )
        if attention > 0 and (classifier is None or mask is None):
            raise InputError(f"attention = {attention} needs a classifier and a mask: give both, or set attention to 0")
        if not val_levels:
            raise InputError("val_levels is empty: give at least one level")
        # Drop the limit of an earlier training.
        denoiser.schedule = denoiser.schedule.trained_to(None)
        for level in (max_level, *val_levels):
            denoiser.schedule.check("max_level" if level == max_level else "val_levels", level, low=1)
        denoiser.schedule = denoiser.schedule.trained_to(max_level)
        self.facts = {"max_level": max_level}
        self.denoiser, self.constant, self.attention, self.max_level = denoiser, constant, attention, max_level
        self.mask, self.val_levels = mask, tuple(val_levels)
        denoiser.gradient_checkpointing = gradient_checkpointing
        self._replayed = Replayed(denoiser, learns=True)
        # In a tuple, so that weight average and checkpoints do not include it.
        self._classifier: tuple[Classifier, ...] = ()
        if classifier is not None:
            self._classifier = (classifier.eval().requires_grad_(False),)
        self._replays = Replays(*self._classifier)
        # A plain dictionary, for the same reason.
        self.purifiers: dict[str, Purifier] = {}
        for name, make in (purifiers or {}).items():
            if classifier is None:
                raise InputError("purifiers need a classifier: give one, or leave the purifiers out")
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise InputError(f"purifiers: the name {name!r} may hold only letters, digits, '-' and '_': rename it")
            self.purifiers[name] = make(denoiser)

    @property
    def network(self) -> Denoiser:
        """The denoiser."""
        return self.denoiser

    def setup(self, stage: str) -> None:
        """Moves the classifier to the device; Lightning moves the task later."""
        super().setup(stage)
        for classifier in self._classifier:
            classifier.to(self.trainer.strategy.root_device)

    def loss(self, batch: Batch, noise: KeyedNoise) -> Tensor:
        """Mean squared error of the predicted noise over pixels and images."""
        image = self.augmented(batch["image"], noise, _AUGMENT)
        u = to_diffusion(image)
        eps = noise.normal(_NOISE, u)
        levels = self.draw_levels(image, noise)
        # In mixed precision the prediction has 16 bits, but its error is computed with 32.
        x = noised(u, self.denoiser.schedule.at(levels.dense), eps)
        # Recorded calls can neither recompute activations nor overlap the exchange of gradients.
        raw = self.denoiser.gradient_checkpointing or not self.denoiser.recordable or torch.distributed.is_initialized()
        predicted = (self.denoiser if raw else self._replayed)(x, levels).to(eps.dtype)
        return (predicted - eps).square().mean()

    def draw_levels(self, image: Tensor, noise: Noise) -> LevelMap:
        """Draws a level map for each image of a batch in [0, 1]."""
        draws = noise.uniform(_LEVELS, image.new_empty(len(image), 3))
        inside, outside = (1 + (draws[:, k] * self.max_level).long() for k in (0, 1))
        mask = self._shapes(image, noise)
        if self.attention > 0:
            attends = (draws[:, 2] >= self.constant) & (draws[:, 2] < self.constant + self.attention)
            if image.is_cuda:
                # Counting them would make the host wait for the GPU, which costs more than the extra images.
                mask = torch.where(each(attends, mask), self._attention(image, noise), mask)
            elif len(rows := attends.nonzero().flatten()):
                # The classifier is called only for images that need its mask.
                mask = mask.index_copy(0, rows, self._attention(image[rows], noise.rows(rows)))
        outside = torch.where(draws[:, 2] < self.constant, inside, outside)
        return two_level(mask, inside, outside)

    def _shapes(self, image: Tensor, noise: Noise) -> Tensor:
        """Random masks: (B, 1, H, W) for images, (B, F) for rows."""
        if image.ndim == 2:
            draws = noise.uniform(_SHAPES, image.new_empty(len(image), image.shape[1] + 1))
            return random_fields(image, draws, self.denoiser.onehot)
        return random_shapes(image, noise.uniform(_SHAPES, image.new_empty(len(image), 6 * _SHAPE_COUNT)), _SHAPE_COUNT)

    def _attention(self, image: Tensor, noise: Noise) -> Tensor:
        assert self.mask is not None
        with self._full_precision(), self._replays:
            return self.mask(self._classifier[0], image, noise)

    def _full_precision(self) -> torch.autocast:
        """Switches mixed precision off, because evaluations compute with 32 bits."""
        return torch.autocast(self.device.type, enabled=False)

    def check(self, data: ImageDataModule) -> None:
        """Raises an ``InputError`` if sizes or classes of networks and data differ."""
        image = data.cached_split("train")[0]["image"][None]
        self.denoiser.check_image(image)
        for classifier in self._classifier:
            classifier.check_image(image)
            if self.purifiers:
                classifier.check_classes(data.classes)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Trace]:
        """Measures denoising errors and purifiers, with the same noise in every epoch.

        Returns:
            The trace of each purifier.
        """
        (index, image), traces = (batch["index"], batch["image"]), {}
        noise = KeyedNoise(self.seed, index, torch.zeros_like(index), EVALUATION)
        self._measure_errors(image, noise)
        for name, purifier in self.purifiers.items():
            with self._full_precision():
                rule = purifier.mask
                mask = None if rule is None else rule(self._classifier[0], image, noise)
                trace = traces[name] = purifier.trace(image, noise, mask)
                right = self._classifier[0](trace.purified).argmax(dim=1) == batch["label"]
            self.measure(f"purified_accuracy/{name}", right.float())
            self.measure(f"psnr/{name}", psnr(trace.purified, image))
        return traces

    def _measure_errors(self, image: Tensor, noise: Noise) -> None:
        """Measures the errors at each validation level."""
        u = to_diffusion(image)
        eps = noise.normal(_NOISE, u)
        if self._classifier and self.mask is not None:
            mask = self._attention(image, noise)
        else:
            mask = self._shapes(image, noise)
        at = self.denoiser.schedule.at
        for t in self.val_levels:
            half = max(1, t // 2)
            for place, inside, outside, weight in (
                ("constant", t, t, torch.ones_like(mask)),
                ("inside", t, half, mask),
                ("outside", half, t, 1.0 - mask),
            ):
                levels = two_level(mask, inside, outside)
                x = noised(u, at(levels.dense), eps)
                predicted = self.denoiser(x, levels).to(eps.dtype)
                error = (predicted - eps).square()
                self.measure(f"mse_{place}_t{t}", error.mean(dim=1, keepdim=True) if error.ndim == 4 else error, weight)
                if place == "constant":
                    denoised = to_image(step_back(x, predicted, at(t), at(0)))
                    self.measure(f"psnr_t{t}", psnr(denoised, image))


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image (B,), 10 log10(1 / mse) in dB, capped at 100.

    Args:
        image: (B, C, H, W) in [0, 1].
        reference: (B, C, H, W) in [0, 1].
    """
    return -10.0 * (image - reference).square().flatten(1).mean(dim=1).clamp(min=1e-10).log10()
