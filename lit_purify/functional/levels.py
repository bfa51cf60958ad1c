"""Level maps: which pixel is noised how strongly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_purify.errors import InputError

MAX_DISTINCT = 64


class LevelMap(NamedTuple):
    """Levels of pixels: the distinct ones of each image, and where each of them holds.

    An embedding of the level is then computed once for each distinct level instead of once for each pixel, and a linear
    function of it spread over the pixels by the weights; both are exact.

    Attributes:
        levels: (B, L), in noising steps. L is at least 2: kernels round differently for one row and for several, and an
            image of one level must not depend on whether there are images of two beside it.
        weights: (B, L, H, W) of 0 and 1, with a sum of 1 over L; for rows of tables (B, L, F).
    """

    levels: Tensor
    weights: Tensor

    @property
    def dense(self) -> Tensor:
        """The level of each pixel, (B, 1, H, W), or of each feature, (B, F)."""
        levels = self.levels.reshape(*self.levels.shape, *[1] * (self.weights.ndim - 2))
        return (levels * self.weights).sum(dim=1, keepdim=self.weights.ndim == 4)

    def rows(self, rows: Tensor | slice) -> LevelMap:
        """The map of some images."""
        return LevelMap(self.levels[rows], self.weights[rows])


def holding(grade: Tensor, count: int) -> Tensor:
    """Where each of ``count`` grades holds, (B, ``count``, H, W) of 0 and 1; ``grade`` (B, 1, H, W) counts from 0.

    Of rows the grade is (B, F), and the result (B, ``count``, F).
    """
    return torch.cat([(grade if grade.ndim == 4 else grade[:, None]) == k for k in range(count)], dim=1)


def two_level(mask: Tensor, high: Tensor | int, low: Tensor | int) -> LevelMap:
    """``high`` where the mask (B, 1, H, W) is 1, ``low`` elsewhere; of all images, or of each (B,)."""
    both = [torch.as_tensor(level, device=mask.device).expand(len(mask)) for level in (low, high)]
    return LevelMap(torch.stack(both, dim=1).long(), holding((mask > 0.5).long(), 2))


def decompose(levels: Tensor) -> LevelMap:
    """The map of given levels (B, 1, H, W); images with fewer distinct ones than others repeat one with weight 0.

    How many there are is asked of the device, which a GPU has to stop for: purifiers and trainings know it beforehand.

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
