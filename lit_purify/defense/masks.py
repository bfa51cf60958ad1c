"""Mask rules: where the noise is strong."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lit_purify.errors import InputError
from lit_purify.functional import mask as F
from lit_purify.functional.images import places
from lit_purify.functional.noise import MASK_STEP, Noise
from lit_purify.models import Classifier, replayed
from lit_purify.recorded import Recorded


class Mask(Recorded, ABC):
    """A rule that computes a mask from an image.

    The mask is hard and has no gradient, since the gradient of a threshold is 0 almost everywhere. ``relaxed`` is a
    differentiable replacement for attacks.

    Attributes:
        relaxable: Whether ``relaxed`` depends on the image; otherwise the mask is a constant to an attacker.
        grades: L, for masks in {0, 1/L, .., 1}; intermediate values get intermediate noise.
        of_image: Whether the mask depends on the image alone, not on noise. It is then computed once for all draws.
    """

    relaxable: bool = False
    grades: int = 1
    of_image: bool = False

    @torch.no_grad()
    def __call__(self, classifier: Classifier, image: Tensor, noise: Noise) -> Tensor:
        """Returns the mask, (B, 1, H, W) in {0, 1/L, .., 1}; the noise is strong where it is 1.

        Args:
            classifier: The classifier whose attention is used.
            image: (B, C, H, W) in [0, 1].
            noise: Randomness of the same rows, for random rules.
        """
        return self.build(classifier, image, noise)

    @abstractmethod
    def build(self, classifier: Classifier, image: Tensor, noise: Noise) -> Tensor:
        """Computes the mask; ``__call__`` wraps it in ``no_grad``."""

    def relaxed(self, classifier: Classifier, image: Tensor, noise: Noise, temperature: float) -> Tensor:
        """Returns the relaxed mask, (B, 1, H, W) in [0, 1]: sigmoids replace thresholds, so that it is differentiable.

        Args:
            classifier: As in ``__call__``.
            image: As in ``__call__``.
            noise: As in ``__call__``.
            temperature: Width of the sigmoids, as a fraction of the range of the normalized maps.
        """
        return self(classifier, image, noise)


class SaliencyMask(Mask):
    """A rule that thresholds the normalized attention maps G_m = sum_c |A_m,c|^p of the classifier's blocks."""

    relaxable = of_image = True
    power: float

    def maps(self, classifier: Classifier, image: Tensor) -> Tensor:
        """Returns normalized maps (B, K, H, W)."""
        return self.normalized(self.saliency(classifier, image))

    def normalized(self, maps: Tensor) -> Tensor:
        """Scales each G_m to [0, 1]."""
        return F.minmax_normalize(maps)

    def saliency(self, classifier: Classifier, image: Tensor) -> Tensor:
        """Returns the maps G_m, (B, K, H, W)."""
        return F.saliency(classifier.features(image), (image.shape[-2], image.shape[-1]), self.power)

    @abstractmethod
    def cut(self, maps: Tensor, temperature: float | None) -> Tensor:
        """Returns the mask (B, 1, H, W) of normalized maps; with a temperature, sigmoids replace thresholds."""

    def build(self, classifier: Classifier, image: Tensor, noise: Noise) -> Tensor:
        """Computes activations, maps and cut as one replayed CUDA graph if the classifier's calls are replayed."""
        return replayed(self._cut, classifier, image)

    def _cut(self, classifier: Classifier, image: Tensor) -> Tensor:
        return self.cut(self.maps(classifier, image), None)

    @override
    def relaxed(self, classifier: Classifier, image: Tensor, noise: Noise, temperature: float) -> Tensor:
        return self.cut(self.maps(classifier, image), temperature)


class MinMaxThreshold(SaliencyMask):
    """The released code's rule for CIFAR-10: each G_m is scaled to [0, 1], then M = union_m [G_m > tau].

    Args:
        tau: Threshold in (0, 1); 0.9 in the release.
        power: p of G_m = sum_c |A_m,c|^p.
    """

    def __init__(self, tau: float = 0.9, power: float = 2.0) -> None:
        self.tau, self.power = _fraction("tau", tau), power

    @override
    def cut(self, maps: Tensor, temperature: float | None) -> Tensor:
        if temperature is None:
            return F.threshold_union(maps, self.tau)
        return F.soft_threshold_union(maps, self.tau, temperature)


class SoftmaxThreshold(MinMaxThreshold):
    """The paper's rule: M = union_m [softmax(G_m) > tau] (Pei et al. 2025, section 3.2).

    A softmax over all pixels sums to 1, so ``tau`` is of the order of 1 / (H W). The relaxed mask's sigmoids have the
    width ``temperature * tau``.

    Args:
        tau: Threshold in (0, 1).
        power: p of G_m = sum_c |A_m,c|^p.
    """

    def __init__(self, tau: float, power: float = 2.0) -> None:
        super().__init__(tau, power)

    @override
    def normalized(self, maps: Tensor) -> Tensor:
        return F.softmax_normalize(maps)

    @override
    def cut(self, maps: Tensor, temperature: float | None) -> Tensor:
        return super().cut(maps, None if temperature is None else temperature * self.tau)


class TopFraction(SaliencyMask):
    """The released code's rule for ImageNet: the top fraction of max_m G_m, with each G_m scaled to [0, 1].

    Args:
        fraction: Fraction of the pixels, in (0, 1); 0.15 in the release.
        power: p of G_m = sum_c |A_m,c|^p.
    """

    def __init__(self, fraction: float = 0.15, power: float = 2.0) -> None:
        self.fraction, self.power = _fraction("fraction", fraction), power

    @override
    def cut(self, maps: Tensor, temperature: float | None) -> Tensor:
        if temperature is None:
            return F.top_fraction(maps, self.fraction)
        return F.soft_top_fraction(maps, self.fraction, temperature)


class FullMask(Mask):
    """Strong noise everywhere."""

    of_image = True

    @override
    def build(self, classifier: Classifier, image: Tensor, noise: Noise) -> Tensor:
        return torch.ones_like(places(image))


class EmptyMask(Mask):
    """Weak noise everywhere."""

    of_image = True

    @override
    def build(self, classifier: Classifier, image: Tensor, noise: Noise) -> Tensor:
        return torch.zeros_like(places(image))


class RandomArea(Mask):
    """A random mask with the area of another rule's mask: the control for whether the location matters.

    For a rule with several grades, the number of pixels gives the same mean.

    Args:
        area_of: The rule whose area is matched, per image.
    """

    def __init__(self, area_of: Mask) -> None:
        self.area_of = area_of

    @override
    def build(self, classifier: Classifier, image: Tensor, noise: Noise) -> Tensor:
        count = self.area_of.build(classifier, image, noise).flatten(1).sum(dim=1)
        return F.top_count(noise.uniform(MASK_STEP, places(image)), count)


class MaskWrapper(Mask):
    """Another rule with a changed image or a changed mask.

    Args:
        of: The other rule.
    """

    def __init__(self, of: Mask) -> None:
        self.of, self.grades, self.relaxable, self.of_image = of, of.grades, of.relaxable, of.of_image

    def before(self, image: Tensor) -> Tensor:
        """Returns the image (B, C, H, W) that the other rule receives."""
        return image

    def after(self, mask: Tensor) -> Tensor:
        """Returns the mask (B, 1, H, W), given that of the other rule."""
        return mask

    @override
    def build(self, classifier: Classifier, image: Tensor, noise: Noise) -> Tensor:
        return self.after(self.of.build(classifier, self.before(image), noise))

    @override
    def relaxed(self, classifier: Classifier, image: Tensor, noise: Noise, temperature: float) -> Tensor:
        return self.after(self.of.relaxed(classifier, self.before(image), noise, temperature))


class InvertedMask(MaskWrapper):
    """The complement of another rule's mask."""

    @override
    def after(self, mask: Tensor) -> Tensor:
        return 1.0 - mask


class ShiftedMask(MaskWrapper):
    """Another rule's mask, moved cyclically by half the image: the same shape at another location (a control)."""

    @override
    def after(self, mask: Tensor) -> Tensor:
        return mask.roll([size // 2 for size in mask.shape[1:]], dims=list(range(1, mask.ndim)))


class RenormalizedInput(MaskWrapper):
    """Another rule whose classifier receives (image - mean) / std instead of the image.

    The released code of Pei et al. (2025) computes masks from u = 2 image - 1 and then applies ImageNet's mean m and
    standard deviation s, for every classifier. This is ``mean`` (1 + m) / 2 and ``std`` s / 2.

    Args:
        of: The other rule.
        mean: Subtracted from each channel of the [0, 1] image.
        std: Divisor of each channel; the classifier's own normalization follows.
    """

    def __init__(self, of: Mask, mean: Sequence[float], std: Sequence[float]) -> None:
        if not all(value > 0.0 for value in std):
            raise InputError(f"std = {list(std)}: use numbers above 0")
        super().__init__(of)
        self.mean, self.std = list(mean), list(std)

    @override
    def before(self, image: Tensor) -> Tensor:
        # Filling avoids a copy from the host, for which a GPU would synchronize.
        mean, std = (
            torch.cat([image.new_full((1, 1, 1, 1), value) for value in values], dim=1)
            for values in (self.mean, self.std)
        )
        return (image - mean) / std


class RelaxedMask(Mask):
    """A differentiable version of another rule, for views of a defense.

    Args:
        of: The other rule.
        soft: Use the relaxed mask in the forward pass too. Otherwise the forward pass is the rule's own mask, bit for
            bit, and only the gradient is the relaxed mask's (straight-through, Bengio et al., arXiv 1308.3432).
        temperature: See ``Mask.relaxed``.
    """

    relaxable = True

    def __init__(self, of: Mask, soft: bool, temperature: float) -> None:
        if not temperature > 0.0:
            raise InputError(f"temperature = {temperature}: use a number above 0")
        self.of, self.soft, self.temperature = of, soft, temperature
        self.grades = of.grades

    def __call__(self, classifier: Classifier, image: Tensor, noise: Noise) -> Tensor:
        """Returns (B, 1, H, W), differentiable."""
        relaxed = self.of.relaxed(classifier, image, noise, self.temperature)
        if self.soft:
            return relaxed
        # The added term is 0 and carries the gradient.
        return self.of(classifier, image, noise) + (relaxed - relaxed.detach())

    @override
    def build(self, classifier: Classifier, image: Tensor, noise: Noise) -> Tensor:
        return self(classifier, image, noise)


def _fraction(name: str, value: float) -> float:
    if not 0.0 < value < 1.0:
        raise InputError(f"{name} = {value}: use a number above 0 and below 1")
    return value
