"""Masks from the importance of inputs to a classifier, for images and for table rows (which have no attention maps)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_purify.defense.masks import SaliencyMask
from lit_purify.errors import InputError
from lit_purify.functional.noise import Noise
from lit_purify.functional.rows import fields
from lit_purify.models import Classifier


class InputMask(SaliencyMask):
    """A rule that cuts the importance of each pixel or feature for the classifier.

    For rows it cuts fields: a one-hot group has the sum of its features' importance and is noised as a whole.

    Args:
        of: The cut: ``TopFraction`` (of the pixels or fields), ``MinMaxThreshold`` or ``SoftmaxThreshold``.
        onehot: Widths of the one-hot groups, which are the last features of a row.
    """

    def __init__(self, of: SaliencyMask, onehot: Sequence[int] = ()) -> None:
        self.of, self.onehot, self.grades, self.power = of, list(onehot), of.grades, of.power

    @abstractmethod
    def importance(self, classifier: Classifier, image: Tensor) -> Tensor:
        """Returns each value's importance (>= 0, shape of ``image``), differentiable if gradients are on."""

    def saliency(self, classifier: Classifier, image: Tensor) -> Tensor:
        """Returns one map: (B, 1, H, W) for images, (B, 1, 1, G) over the G fields of rows."""
        importance = self.importance(classifier, image)
        if image.ndim == 4:
            return importance.sum(dim=1, keepdim=True)
        field = fields(image.shape[1], self.onehot, image.device)
        sums = importance.new_zeros(len(image), int(field[-1]) + 1)
        return sums.index_add(1, field, importance)[:, None, None]

    @override
    def normalized(self, maps: Tensor) -> Tensor:
        return self.of.normalized(maps)

    @override
    def cut(self, maps: Tensor, temperature: float | None) -> Tensor:
        return self.of.cut(maps, temperature)

    @override
    def build(self, classifier: Classifier, image: Tensor, noise: Noise) -> Tensor:
        return self._spread(super().build(classifier, image, noise), image)

    @override
    def relaxed(self, classifier: Classifier, image: Tensor, noise: Noise, temperature: float) -> Tensor:
        return self._spread(super().relaxed(classifier, image, noise, temperature), image)

    def _spread(self, mask: Tensor, image: Tensor) -> Tensor:
        """Copies the values of fields to their features."""
        return mask if image.ndim == 4 else mask[:, 0, 0][:, fields(image.shape[1], self.onehot, image.device)]


class GradientTimesInput(InputMask):
    """Importance |x * gradient of the largest logit in x| (Shrikumar et al., ICML 2017), summed over image channels."""

    @override
    def importance(self, classifier: Classifier, image: Tensor) -> Tensor:
        graph = torch.is_grad_enabled() and image.requires_grad
        with torch.enable_grad():
            leaf = image if graph else image.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(classifier(leaf).amax(dim=1).sum(), leaf, create_graph=graph)
        return (leaf * gradient).abs() if graph else (leaf * gradient).abs().detach()


class FirstLayer(InputMask):
    """Contribution of each feature of a row to the active units u of the first linear layer: sum_u |W_uf x_f|^p."""

    def importance(self, classifier: Classifier, image: Tensor) -> Tensor:
        """Returns the importance (B, F).

        Raises:
            InputError: The classifier's first linear layer does not take the row.
        """
        layer = next((module for module in classifier.network.modules() if isinstance(module, nn.Linear)), None)
        if layer is None or image.ndim != 2 or layer.in_features != image.shape[1]:
            raise InputError("mask: FirstLayer needs rows and a linear layer that takes them: use GradientTimesInput")
        row = classifier.normalize(image)
        active = (layer(row) > 0).to(row.dtype)
        return (active @ layer.weight.abs().pow(self.power)) * row.abs().pow(self.power)
