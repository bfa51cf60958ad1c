"""Level maps: the noise level of each pixel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_purify.errors import InputError

MAX_DISTINCT = 64


class LevelMap(NamedTuple):
    """The distinct levels of each image and the pixels of each level.

    A network embeds each distinct level once instead of each pixel, and spreads a linear function of the embedding over
    the pixels by the weights. Both are exact.

    Attributes:
        levels: (B, L) in noising steps, L >= 2. Kernels round differently for one row and for several, so an image with
            one level must not depend on whether the batch has images with two.
        weights: (B, L, H, W) in {0, 1} with sum 1 over L; (B, L, F) for table rows.
    """

    levels: Tensor
    weights: Tensor

    @property
    def dense(self) -> Tensor:
        """Level of each pixel, (B, 1, H, W), or of each feature, (B, F)."""
        levels = self.levels.reshape(*self.levels.shape, *[1] * (self.weights.ndim - 2))
        return (levels * self.weights).sum(dim=1, keepdim=self.weights.ndim == 4)

    def rows(self, rows: Tensor | slice) -> LevelMap:
        """Returns the map of a selection of images."""
        return LevelMap(self.levels[rows], self.weights[rows])


def holding(grade: Tensor, count: int) -> Tensor:
    """One-hot encodes grades 0 .. count - 1: images (B, 1, H, W) to (B, count, H, W), rows (B, F) to (B, count, F)."""
    return torch.cat([(grade if grade.ndim == 4 else grade[:, None]) == k for k in range(count)], dim=1)


def two_level(mask: Tensor, high: Tensor | int, low: Tensor | int) -> LevelMap:
    """Sets ``high`` where the mask (B, 1, H, W) is 1 and ``low`` elsewhere; levels for all images or each (B,)."""
    both = [torch.as_tensor(level, device=mask.device).expand(len(mask)) for level in (low, high)]
    return LevelMap(torch.stack(both, dim=1).long(), holding((mask > 0.5).long(), 2))


def decompose(levels: Tensor) -> LevelMap:
    """Builds a level map from levels (B, 1, H, W). Images with fewer distinct levels repeat one with weight 0.

    The number of distinct levels is read from the device, so a GPU synchronizes. Purifiers and trainings avoid this
    call.

    Raises:
        InputError: An image has more than 64 distinct levels.
    """
    ordered, order = levels.flatten(1).sort(dim=1)
    rank = torch.zeros_like(order)
    rank[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(dim=1)
    count = int(rank.max()) + 1
    if count > MAX_DISTINCT:
        raise InputError(
            f"a level map has {count} distinct levels in one image, the most is {MAX_DISTINCT}: round its levels"
        )
    count = max(2, count)
    distinct = ordered[:, :1].expand(-1, count).scatter(1, rank, ordered)
    place = torch.empty_like(rank).scatter_(1, order, rank)
    return LevelMap(distinct, holding(place.reshape(levels.shape), count))
