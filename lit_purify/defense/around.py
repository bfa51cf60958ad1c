"""Purifiers around another one: at another image size, or with one-hot outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor
from torch.nn.functional import interpolate
from typing_extensions import override

from lit_purify.defense.masks import Mask
from lit_purify.defense.purifiers import Approximation, Purifier, Trace
from lit_purify.errors import InputError
from lit_purify.functional.noise import Noise
from lit_purify.functional.rows import one_hot
from lit_purify.models import Denoiser


class PurifierWrapper(Purifier):
    """Another purifier with changed inputs or outputs.

    Args:
        denoiser: Predicts noise.
        purifier: A purifier, or a function that builds one from the denoiser.
        recompute: See ``Purifier``.
    """

    def __init__(self, denoiser: Denoiser, purifier: Callable[[Denoiser], Purifier], recompute: bool = True) -> None:
        super().__init__(denoiser, recompute)
        inner = purifier if isinstance(purifier, Purifier) else purifier(denoiser)
        self.purifier = inner if recompute else inner.without_recomputation()
        self.mask = self.purifier.mask

    @override
    def with_steps(self, steps: int) -> Self:
        return self._with(purifier=self.purifier.with_steps(steps))

    @override
    def approximated(self, how: Approximation) -> Self:
        return self._with(purifier=self.purifier.approximated(how))

    @override
    def without_recomputation(self) -> Self:
        return self._with(purifier=self.purifier.without_recomputation())

    @override
    def with_mask(self, mask: Mask) -> Self:
        return self._with(purifier=self.purifier.with_mask(mask), mask=mask)

    @property
    @override
    def levels(self) -> list[int]:
        return self.purifier.levels

    @property
    @override
    def start(self) -> list[int]:
        return self.purifier.start

    @property
    @override
    def nfe(self) -> int:
        return self.purifier.nfe


class ResizedPurifier(PurifierWrapper):
    """Another purifier at the denoiser's size: images are resized to it and back (bilinear).

    Classifiers of 224x224 pixels are thus defended by diffusion networks of 256x256, as in DiffPure. The attack
    perturbs the small image. The mask is computed on the small image too, at the classifier's size, and enlarged by
    repeating pixels. Arguments are those of ``PurifierWrapper``.
    """

    @override
    def trace(self, image: Tensor, noise: Noise, mask: Tensor | None = None) -> Trace:
        large = None if mask is None else interpolate(mask, size=self.denoiser.size)
        trace = self.purifier.trace(_bilinear(image, self.denoiser.size), noise, large)
        purified, noised = (_bilinear(x, image.shape[-1]) for x in (trace.purified, trace.noised))
        return Trace(purified, noised, mask)

    def check_image(self, image: Tensor) -> None:
        """Raises an ``InputError`` if the resized images do not fit the purifier; any size is allowed."""
        self.purifier.check_image(_bilinear(image, self.denoiser.size))


class OneHotPurifier(PurifierWrapper):
    """Another purifier for table rows, followed by an argmax in every one-hot group.

    Attacks differentiate the argmax as if it were the identity (straight-through), and results state this. The denoiser
    defines the groups. Arguments are those of ``PurifierWrapper``.
    """

    straight_through = True

    @override
    def trace(self, image: Tensor, noise: Noise, mask: Tensor | None = None) -> Trace:
        trace = self.purifier.trace(image, noise, mask)
        return Trace(one_hot(trace.purified, self.denoiser.onehot), trace.noised, mask)

    @override
    def check_image(self, image: Tensor) -> None:
        self.purifier.check_image(image)
        if not self.denoiser.onehot:
            raise InputError("OneHotPurifier: the denoiser has no one-hot groups: set its onehot, or leave it out")


def _bilinear(image: Tensor, size: int) -> Tensor:
    return interpolate(image, size=(size, size), mode="bilinear", align_corners=False)
