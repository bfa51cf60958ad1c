"""Masks of where in its input a classifier looks: for images, and for rows of tables, which have no attention maps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_purify.defense.masks import SaliencyMask
from lit_purify.errors import InputError
from lit_purify.functional.noise import Noise
from lit_purify.functional.rows import fields
from lit_purify.models import Classifier


class InputMask(SaliencyMask):
    """How much each pixel or feature counts for the classifier, cut by another rule.

    Of rows the rule cuts fields: a one-hot group counts as the sum of its features, and is noised as a whole.

    Args:
        of: What cuts: ``TopFraction`` (of the pixels, or of the fields), ``MinMaxThreshold`` or ``SoftmaxThreshold``.
        onehot: Widths of the one-hot groups, which are the last features of a row.
    """

    def __init__(self, of: SaliencyMask, onehot: Sequence[int] = ()) -> None:
        self.of, self.onehot, self.grades, self.power = of, list(onehot), of.grades, of.power

    @abstractmethod
    def look(self, classifier: Classifier, image: Tensor) -> Tensor:
        """How much each value counts, not negative, of the shape of ``image``; differentiable where gradients are."""

    def saliency(self, classifier: Classifier, image: Tensor) -> Tensor:
        """One map: (B, 1, H, W) of images, (B, 1, 1, G) of the G fields of rows."""
        counts = self.look(classifier, image)
        if image.ndim == 4:
            return counts.sum(dim=1, keepdim=True)
        field = fields(image.shape[1], self.onehot, image.device)
        sums = counts.new_zeros(len(image), int(field[-1]) + 1)
        return sums.index_add(1, field, counts)[:, None, None]

    def normalized(self, maps: Tensor) -> Tensor:
        """As the other rule does it."""
        return self.of.normalized(maps)

    def cut(self, maps: Tensor, temperature: float | None) -> Tensor:
        """See ``SaliencyMask``."""
        return self.of.cut(maps, temperature)

    def build(self, classifier: Classifier, image: Tensor, noise: Noise) -> Tensor:
        """See ``Mask``."""
        return self._spread(super().build(classifier, image, noise), image)

    def relaxed(self, classifier: Classifier, image: Tensor, noise: Noise, temperature: float) -> Tensor:
        """See ``Mask``."""
        return self._spread(super().relaxed(classifier, image, noise, temperature), image)

    def _spread(self, mask: Tensor, image: Tensor) -> Tensor:
        """Of fields to their features."""
        return mask if image.ndim == 4 else mask[:, 0, 0][:, fields(image.shape[1], self.onehot, image.device)]


class GradientTimesInput(InputMask):
    """|x * gradient of the largest logit in x| (Shrikumar et al., ICML 2017); of images the sum over channels."""

    def look(self, classifier: Classifier, image: Tensor) -> Tensor:
        """See ``InputMask``."""
        graph = torch.is_grad_enabled() and image.requires_grad
        with torch.enable_grad():
            leaf = image if graph else image.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(classifier(leaf).amax(dim=1).sum(), leaf, create_graph=graph)
        return (leaf * gradient).abs() if graph else (leaf * gradient).abs().detach()


class FirstLayer(InputMask):
    """What each feature of a row brings to the active units u of the first linear layer: sum_u |W_uf x_f|^p."""

    def look(self, classifier: Classifier, image: Tensor) -> Tensor:
        """See ``InputMask``.

        Raises:
            InputError: The classifier's first linear layer does not take the row.
        """
        layer = next((module for module in classifier.network.modules() if isinstance(module, nn.Linear)), None)
        if layer is None or image.ndim != 2 or layer.in_features != image.shape[1]:
            raise InputError("mask: FirstLayer needs rows and a first linear layer that takes them: GradientTimesInput")
        row = classifier.normalize(image)
        active = (layer(row) > 0).to(row.dtype)
        return (active @ layer.weight.abs().pow(self.power)) * row.abs().pow(self.power)
