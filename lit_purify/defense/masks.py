"""Rules that say which pixels are noised strongly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_purify.errors import InputError
from lit_purify.functional import mask as F
from lit_purify.functional.images import places
from lit_purify.functional.noise import MASK_STEP, Noise
from lit_purify.models import Classifier, replayed
from lit_purify.recorded import Recorded


class Mask(Recorded, ABC):
    """A rule from an image to a mask.

    The mask is hard and computed without a gradient: differentiating through a threshold gives zero everywhere. What an
    attacker may differentiate in its place is ``relaxed``.

    Attributes:
        relaxable: Whether ``relaxed`` depends on the image; the others are constants to an attacker.
        grades: L, where a mask is in {0, 1/L, .., 1}: what lies between is noised with a strength between.
        of_image: Whether the mask depends on the image alone, and not on the noise: it is then computed once for all
            draws of an image.
    """

    relaxable: bool = False
    grades: int = 1
    of_image: bool = False

    @torch.no_grad()
    def __call__(self, classifier: Classifier, image: Tensor, noise: Noise) -> Tensor:
        """(B, 1, H, W) in {0, 1}, or of more grades: 1 where the noise is strong.

        Args:
            classifier: Whose attention counts.
            image: (B, C, H, W) in [0, 1].
            noise: Randomness of the same rows, for rules that draw.
        """
        return self.build(classifier, image, noise)

    @abstractmethod
    def build(self, classifier: Classifier, image: Tensor, noise: Noise) -> Tensor:
        """As ``__call__``, which wraps it in ``no_grad``."""

    def relaxed(self, classifier: Classifier, image: Tensor, noise: Noise, temperature: float) -> Tensor:
        """(B, 1, H, W) in [0, 1]: the mask with sigmoids for thresholds, differentiable through the classifier.

        Args:
            classifier: As in ``__call__``.
            image: As in ``__call__``.
            noise: As in ``__call__``.
            temperature: Width of the sigmoids, as a part of the range of the normalized maps.
        """
        return self(classifier, image, noise)


class SaliencyMask(Mask):
    """A rule that cuts the normalized attention maps G_m = sum_c |A_m,c|^p of the classifier's blocks."""

    relaxable = of_image = True
    power: float

    def maps(self, classifier: Classifier, image: Tensor) -> Tensor:
        """Normalized maps (B, K, H, W)."""
        return self.normalized(self.saliency(classifier, image))

    def normalized(self, maps: Tensor) -> Tensor:
        """Each G_m scaled to [0, 1]."""
        return F.minmax_normalize(maps)

    def saliency(self, classifier: Classifier, image: Tensor) -> Tensor:
        """The maps G_m, (B, K, H, W)."""
        return F.saliency(classifier.features(image), (image.shape[-2], image.shape[-1]), self.power)

    @abstractmethod
    def cut(self, maps: Tensor, temperature: float | None) -> Tensor:
        """The mask (B, 1, H, W) of normalized maps; with a temperature, sigmoids stand for thresholds."""

    def build(self, classifier: Classifier, image: Tensor, noise: Noise) -> Tensor:
        """See ``Mask``; activations, reduction and cut are replayed as one where the classifier's calls are."""
        return replayed(self._cut, classifier, image)

    def _cut(self, classifier: Classifier, image: Tensor) -> Tensor:
        return self.cut(self.maps(classifier, image), None)

    def relaxed(self, classifier: Classifier, image: Tensor, noise: Noise, temperature: float) -> Tensor:
        """See ``Mask``."""
        return self.cut(self.maps(classifier, image), temperature)


class MinMaxThreshold(SaliencyMask):
    """The released code's rule on CIFAR-10: every G_m scaled to [0, 1], then M = union_m [G_m > tau].

    Args:
        tau: Threshold in (0, 1); 0.9 in the release.
        power: p of G_m = sum_c |A_m,c|^p.
    """

    def __init__(self, tau: float = 0.9, power: float = 2.0) -> None:
        self.tau, self.power = _fraction("tau", tau), power

    def cut(self, maps: Tensor, temperature: float | None) -> Tensor:
        """See ``SaliencyMask``."""
        if temperature is None:
            return F.threshold_union(maps, self.tau)
        return F.soft_threshold_union(maps, self.tau, temperature)


class SoftmaxThreshold(MinMaxThreshold):
    """The paper's rule: M = union_m [softmax(G_m) > tau] (Pei et al. 2025, section 3.2).

    A softmax over all pixels sums to 1, so ``tau`` is of the order of 1 / (H W), and so is the width of the relaxed
    mask's sigmoids: ``temperature * tau``.

    Args:
        tau: Threshold in (0, 1).
        power: p of G_m = sum_c |A_m,c|^p.
    """

    def __init__(self, tau: float, power: float = 2.0) -> None:
        super().__init__(tau, power)

    def normalized(self, maps: Tensor) -> Tensor:
        """Softmax of each G_m over all pixels."""
        return F.softmax_normalize(maps)

    def cut(self, maps: Tensor, temperature: float | None) -> Tensor:
        """See ``SaliencyMask``."""
        return super().cut(maps, None if temperature is None else temperature * self.tau)


class TopFraction(SaliencyMask):
    """The released code's rule on ImageNet: the top fraction of max_m G_m, each G_m scaled to [0, 1].

    Args:
        fraction: Part of the pixels, in (0, 1); 0.15 in the release.
        power: p of G_m = sum_c |A_m,c|^p.
    """

    def __init__(self, fraction: float = 0.15, power: float = 2.0) -> None:
        self.fraction, self.power = _fraction("fraction", fraction), power

    def cut(self, maps: Tensor, temperature: float | None) -> Tensor:
        """See ``SaliencyMask``."""
        if temperature is None:
            return F.top_fraction(maps, self.fraction)
        return F.soft_top_fraction(maps, self.fraction, temperature)


class Ones(Mask):
    """Strong noise everywhere."""

    of_image = True

    def build(self, classifier: Classifier, image: Tensor, noise: Noise) -> Tensor:
        """See ``Mask``."""
        return torch.ones_like(places(image))


class Zeros(Mask):
    """Weak noise everywhere."""

    of_image = True

    def build(self, classifier: Classifier, image: Tensor, noise: Noise) -> Tensor:
        """See ``Mask``."""
        return torch.zeros_like(places(image))


class RandomArea(Mask):
    """As many pixels as another rule chooses, drawn at random: the control for whether the place matters.

    Of a rule of several grades, as many as amount to the same mean.

    Args:
        area_of: The rule whose area is matched, image by image.
    """

    def __init__(self, area_of: Mask) -> None:
        self.area_of = area_of

    def build(self, classifier: Classifier, image: Tensor, noise: Noise) -> Tensor:
        """See ``Mask``."""
        count = self.area_of.build(classifier, image, noise).flatten(1).sum(dim=1)
        return F.top_count(noise.uniform(MASK_STEP, places(image)), count)


class Wrapped(Mask):
    """Another rule, with the image changed before it or the mask after it.

    Args:
        of: The other rule.
    """

    def __init__(self, of: Mask) -> None:
        self.of, self.grades, self.relaxable, self.of_image = of, of.grades, of.relaxable, of.of_image

    def before(self, image: Tensor) -> Tensor:
        """The image (B, C, H, W) that the other rule sees."""
        return image

    def after(self, mask: Tensor) -> Tensor:
        """The mask (B, 1, H, W) from that of the other rule."""
        return mask

    def build(self, classifier: Classifier, image: Tensor, noise: Noise) -> Tensor:
        """See ``Mask``."""
        return self.after(self.of.build(classifier, self.before(image), noise))

    def relaxed(self, classifier: Classifier, image: Tensor, noise: Noise, temperature: float) -> Tensor:
        """See ``Mask``."""
        return self.after(self.of.relaxed(classifier, self.before(image), noise, temperature))


class Inverse(Wrapped):
    """What another rule leaves out."""

    def after(self, mask: Tensor) -> Tensor:
        """Ones for zeros."""
        return 1.0 - mask


class Rolled(Wrapped):
    """Another rule's mask moved by half the image, around the border: its shape, where the classifier looks away."""

    def after(self, mask: Tensor) -> Tensor:
        """Moved by half the height and width."""
        return mask.roll([size // 2 for size in mask.shape[1:]], dims=list(range(1, mask.ndim)))


class Renormalized(Wrapped):
    """Another rule, to which the classifier is shown (image - mean) / std in place of the image.

    The released code of Pei et al. (2025) makes its masks from u = 2 image - 1, normalized by ImageNet's mean m and
    standard deviation s for whatever classifier: ``mean`` (1 + m) / 2, ``std`` s / 2.

    Args:
        of: The other rule.
        mean: Subtracted from each channel of the [0, 1] image.
        std: What each channel is divided by; the classifier's own normalization comes on top.
    """

    def __init__(self, of: Mask, mean: Sequence[float], std: Sequence[float]) -> None:
        if not all(value > 0.0 for value in std):
            raise InputError(f"std = {list(std)}: use numbers above 0")
        super().__init__(of)
        self.mean, self.std = list(mean), list(std)

    def before(self, image: Tensor) -> Tensor:
        """(image - mean) / std."""
        # Filled, not copied: a GPU would have to be waited for.
        mean, std = (
            torch.cat([image.new_full((1, 1, 1, 1), value) for value in values], dim=1)
            for values in (self.mean, self.std)
        )
        return (image - mean) / std


class Relaxed(Mask):
    """Another rule as a gradient-based attack may see it; to be put in place of the rule in a view of the defense.

    Args:
        of: The other rule.
        soft: Whether the forward pass is the relaxation too. Otherwise it is the rule's own mask, bit for bit, and only
            the gradient is the relaxation's (straight-through, Bengio et al., arXiv 1308.3432).
        temperature: See ``Mask.relaxed``.
    """

    relaxable = True

    def __init__(self, of: Mask, soft: bool, temperature: float) -> None:
        if not temperature > 0.0:
            raise InputError(f"temperature = {temperature}: use a number above 0")
        self.of, self.soft, self.temperature = of, soft, temperature
        self.grades = of.grades

    def __call__(self, classifier: Classifier, image: Tensor, noise: Noise) -> Tensor:
        """(B, 1, H, W), differentiable."""
        relaxed = self.of.relaxed(classifier, image, noise, self.temperature)
        if self.soft:
            return relaxed
        # What is added is 0, with a gradient.
        return self.of(classifier, image, noise) + (relaxed - relaxed.detach())

    def build(self, classifier: Classifier, image: Tensor, noise: Noise) -> Tensor:
        """See ``Mask``."""
        return self(classifier, image, noise)


def _fraction(name: str, value: float) -> float:
    if not 0.0 < value < 1.0:
        raise InputError(f"{name} = {value} is outside (0, 1)")
    return value
