"""A purifier whose diffusion network takes another size than the classifier."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import interpolate

from lit_purify.defense.masks import Given
from lit_purify.defense.purifiers import Purifier, Trace
from lit_purify.errors import InputError
from lit_purify.functional.noise import Noise
from lit_purify.models import Classifier, Denoiser


class ResizedPurifier(Purifier):
    """Another purifier at the denoiser's size: images are brought to it, and the result back to theirs (bilinear).

    So classifiers of 224x224 pixels are defended by diffusion networks of 256x256, as in DiffPure and what followed.
    What is attacked is the small image. A mask is made from it as well, where the classifier has its own size, and
    enlarged by repeating pixels.

    Args:
        denoiser: Predicts noise, in images of its own size.
        classifier: Whose attention steers the noise, for purifiers with a mask.
        purifier: What purifies at the denoiser's size.
        recompute: See ``Purifier``.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        classifier: Classifier,
        purifier: Callable[[Denoiser, Classifier], Purifier],
        recompute: bool = True,
    ) -> None:
        super().__init__(denoiser, classifier, recompute)
        inner = purifier(denoiser, classifier)
        if inner.classifier is not classifier:
            raise InputError("purifier: another classifier needs no resizing around it; make it a defense of its own")
        self.purifier = inner if recompute else inner.without_recomputation()
        self.mask = self.purifier.mask

    def trace(self, image: Tensor, noise: Noise) -> Trace:
        """That of the other purifier, in the size of the image."""
        mask, inner = None, self.purifier
        if self.mask is not None:
            mask = self.mask(self.classifier, image, noise)
            inner = inner.with_mask(Given(interpolate(mask, size=self.denoiser.size), self.mask.grades))
        trace = inner.trace(_bilinear(image, self.denoiser.size), noise)
        purified, noised = (_bilinear(x, image.shape[-1]) for x in (trace.purified, trace.noised))
        return Trace(purified, noised, mask)

    def with_steps(self, steps: int) -> ResizedPurifier:
        """See ``Purifier``."""
        return self._around(self.purifier.with_steps(steps))

    def without_recomputation(self) -> ResizedPurifier:
        """See ``Purifier``."""
        return self._around(self.purifier.without_recomputation())

    def _around(self, purifier: Purifier) -> ResizedPurifier:
        other = ResizedPurifier(self.denoiser, self.classifier, lambda denoiser, classifier: purifier)
        # A view may have a rule of its own.
        return other.with_mask(self.mask) if self.mask is not None else other

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
