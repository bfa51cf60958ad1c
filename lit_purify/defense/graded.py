"""Masks with several grades of noise, and masks from other networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lit_purify.defense.masks import Mask, MaskWrapper, SaliencyMask
from lit_purify.errors import InputError
from lit_purify.functional.levels import MAX_DISTINCT
from lit_purify.functional.noise import Noise
from lit_purify.models import Classifier


class AverageMask(Mask):
    """The average of several rules' masks, (B, 1, H, W) in {0, 1/L, .., 1}.

    Nested rules (the top 10, 20 and 40 % of the pixels) give a mask that follows the ranks of the attention. Rules with
    ``ExternalAttention`` give a mask on which several networks agree.

    Args:
        rules: L rules with one grade each.
    """

    def __init__(self, rules: Sequence[Mask]) -> None:
        _check_grades(len(rules))
        if any(rule.grades != 1 for rule in rules):
            raise InputError("rules: a rule with several grades cannot be averaged: list its parts instead")
        self.rules, self.grades = list(rules), len(rules)
        self.relaxable = any(rule.relaxable for rule in rules)
        self.of_image = all(rule.of_image for rule in rules)

    @override
    def build(self, classifier: Classifier, image: Tensor, noise: Noise) -> Tensor:
        return _mean([rule.build(classifier, image, noise) for rule in self.rules])

    @override
    def relaxed(self, classifier: Classifier, image: Tensor, noise: Noise, temperature: float) -> Tensor:
        return _mean([rule.relaxed(classifier, image, noise, temperature) for rule in self.rules])


class QuantizedSaliency(SaliencyMask):
    """The saliency max_m G_m, each G_m scaled to [0, 1], rounded to {0, 1/L, .., 1}; the relaxed mask is not rounded.

    Args:
        grades: L.
        power: p of G_m = sum_c |A_m,c|^p.
    """

    def __init__(self, grades: int, power: float = 2.0) -> None:
        _check_grades(grades)
        self.grades, self.power = grades, power

    @override
    def cut(self, maps: Tensor, temperature: float | None) -> Tensor:
        highest = maps.amax(dim=1, keepdim=True)
        return (highest * self.grades).round() / self.grades if temperature is None else highest


class ExternalAttention(MaskWrapper):
    """A rule that uses the attention of another classifier than the defended one.

    Args:
        of: The rule.
        network: The other classifier, for images of the same size.
    """

    def __init__(self, of: Mask, network: Classifier) -> None:
        super().__init__(of)
        self.network = network.requires_grad_(False)

    @override
    def build(self, classifier: Classifier, image: Tensor, noise: Noise) -> Tensor:
        return super().build(self._at(image), image, noise)

    @override
    def relaxed(self, classifier: Classifier, image: Tensor, noise: Noise, temperature: float) -> Tensor:
        return super().relaxed(self._at(image), image, noise, temperature)

    def _at(self, image: Tensor) -> Classifier:
        """Moves the network to the image's device, since a rule is no module and ``.to()`` does not reach it."""
        self.network.check_image(image)
        return self.network.to(image.device, image.dtype)


def _mean(masks: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(masks)).sum(dim=0) / len(masks)


def _check_grades(number: int) -> None:
    if not 1 <= number < MAX_DISTINCT:
        raise InputError(f"a mask with {number} grades: use 1 to {MAX_DISTINCT - 1}")
