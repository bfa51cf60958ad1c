"""Purifiers around another one: at another size, or with categories for an outcome."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor
from torch.nn.functional import interpolate

from lit_purify.defense.masks import Mask
from lit_purify.defense.purifiers import Approximation, Purifier, Trace
from lit_purify.errors import InputError
from lit_purify.functional.noise import Noise
from lit_purify.functional.rows import one_hot
from lit_purify.models import Denoiser


class Around(Purifier):
    """Another purifier, with something before it or after it.

    Args:
        denoiser: Predicts noise.
        purifier: A purifier, or a function that makes one from the denoiser.
        recompute: See ``Purifier``.
    """

    def __init__(self, denoiser: Denoiser, purifier: Callable[[Denoiser], Purifier], recompute: bool = True) -> None:
        super().__init__(denoiser, recompute)
        inner = purifier if isinstance(purifier, Purifier) else purifier(denoiser)
        self.purifier = inner if recompute else inner.without_recomputation()
        self.mask = self.purifier.mask

    def with_steps(self, steps: int) -> Self:
        """See ``Purifier``."""
        return self._with(purifier=self.purifier.with_steps(steps))

    def approximated(self, how: Approximation) -> Self:
        """See ``Purifier``."""
        return self._with(purifier=self.purifier.approximated(how))

    def without_recomputation(self) -> Self:
        """See ``Purifier``."""
        return self._with(purifier=self.purifier.without_recomputation())

    def with_mask(self, mask: Mask) -> Self:
        """See ``Purifier``."""
        return self._with(purifier=self.purifier.with_mask(mask), mask=mask)

    @property
    def levels(self) -> list[int]:
        """Of the other purifier."""
        return self.purifier.levels

    @property
    def start(self) -> list[int]:
        """Of the other purifier."""
        return self.purifier.start

    @property
    def nfe(self) -> int:
        """Of the other purifier."""
        return self.purifier.nfe


class ResizedPurifier(Around):
    """Another purifier at the denoiser's size: images are brought to it, and the result back to theirs (bilinear).

    So classifiers of 224x224 pixels are defended by diffusion networks of 256x256, as in DiffPure and what followed.
    What is attacked is the small image. A mask is made from it as well, where the classifier has its own size, and
    enlarged by repeating pixels. Arguments are those of ``Around``.
    """

    def trace(self, image: Tensor, noise: Noise, mask: Tensor | None = None) -> Trace:
        """That of the other purifier, in the size of the image."""
        large = None if mask is None else interpolate(mask, size=self.denoiser.size)
        trace = self.purifier.trace(_bilinear(image, self.denoiser.size), noise, large)
        purified, noised = (_bilinear(x, image.shape[-1]) for x in (trace.purified, trace.noised))
        return Trace(purified, noised, mask)

    def check_image(self, image: Tensor) -> None:
        """See ``Purifier``; any size will do."""
        self.purifier.check_image(_bilinear(image, self.denoiser.size))


class OneHotPurifier(Around):
    """Another purifier for rows of tables, after which every one-hot group has one category, that of its largest value.

    The step is piecewise constant; attacks differentiate it as if it were the identity (straight-through), and results
    say so. Which features are groups is what the denoiser says. Arguments are those of ``Around``.
    """

    straight_through = True

    def trace(self, image: Tensor, noise: Noise, mask: Tensor | None = None) -> Trace:
        """That of the other purifier, projected."""
        trace = self.purifier.trace(image, noise, mask)
        return Trace(one_hot(trace.purified, self.denoiser.onehot), trace.noised, mask)

    def check_image(self, image: Tensor) -> None:
        """See ``Purifier``."""
        self.purifier.check_image(image)
        if not self.denoiser.onehot:
            raise InputError("OneHotPurifier: the denoiser states no one-hot groups: give it onehot, or leave this out")


def _bilinear(image: Tensor, size: int) -> Tensor:
    return interpolate(image, size=(size, size), mode="bilinear", align_corners=False)
