"""A purifier whose diffusion network takes another size than the classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor
from torch.nn.functional import interpolate

from lit_purify.defense.masks import Mask
from lit_purify.defense.purifiers import Approximation, Purifier, Trace
from lit_purify.functional.noise import Noise
from lit_purify.models import Denoiser


class ResizedPurifier(Purifier):
    """Another purifier at the denoiser's size: images are brought to it, and the result back to theirs (bilinear).

    So classifiers of 224x224 pixels are defended by diffusion networks of 256x256, as in DiffPure and what followed.
    What is attacked is the small image. A mask is made from it as well, where the classifier has its own size, and
    enlarged by repeating pixels.

    Args:
        denoiser: Predicts noise, in images of its own size.
        purifier: What purifies at the denoiser's size: a purifier, or a function that makes one from the denoiser.
        recompute: See ``Purifier``.
    """

    def __init__(self, denoiser: Denoiser, purifier: Callable[[Denoiser], Purifier], recompute: bool = True) -> None:
        super().__init__(denoiser, recompute)
        inner = purifier if isinstance(purifier, Purifier) else purifier(denoiser)
        self.purifier = inner if recompute else inner.without_recomputation()
        self.mask = self.purifier.mask

    def trace(self, image: Tensor, noise: Noise, mask: Tensor | None = None) -> Trace:
        """That of the other purifier, in the size of the image."""
        large = None if mask is None else interpolate(mask, size=self.denoiser.size)
        trace = self.purifier.trace(_bilinear(image, self.denoiser.size), noise, large)
        purified, noised = (_bilinear(x, image.shape[-1]) for x in (trace.purified, trace.noised))
        return Trace(purified, noised, mask)

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

    def check_image(self, image: Tensor) -> None:
        """See ``Purifier``; any size will do."""
        self.purifier.check_image(_bilinear(image, self.denoiser.size))


def _bilinear(image: Tensor, size: int) -> Tensor:
    return interpolate(image, size=(size, size), mode="bilinear", align_corners=False)
