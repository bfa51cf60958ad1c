"""Level maps: which pixel is noised how strongly."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_purify.errors import InputError

MAX_DISTINCT = 64


def two_level(mask: Tensor, high: Tensor | int, low: Tensor | int) -> Tensor:
    """``high`` where the mask is 1, ``low`` elsewhere: (B, 1, H, W) int64 levels in noising steps."""
    high, low = (torch.as_tensor(level, device=mask.device).reshape(-1, 1, 1, 1) for level in (high, low))
    return torch.where(mask > 0.5, high, low).long()


def decompose(levels: Tensor) -> tuple[Tensor, Tensor | None]:
    """A level map as its distinct levels and where each of them holds.

    An embedding of the level is then computed once for each distinct level instead of once for each pixel, and a linear
    function of it spread over the pixels by the weights; both are exact.

    Args:
        levels: (B,) or (B, 1, H, W), in noising steps.

    Returns:
        Distinct levels (B, L), L at least 2, and weights (B, L, H, W) in {0, 1} that sum to 1 over L; ``None`` in place
        of the weights when every image has one level only. Images with fewer than L levels repeat one with weight 0.
        (At least 2: kernels round differently for one row and for several, and an image of one level must not depend on
        whether there are images of two beside it.)

    Raises:
        InputError: An image has more than 64 distinct levels.
    """
    if levels.ndim == 1:
        return levels[:, None].expand(-1, 2), None
    flat = levels.flatten(1)
    ordered, order = flat.sort(dim=1)
    rank = torch.zeros_like(order)
    rank[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(dim=1)
    count = int(rank.max()) + 1
    if count > MAX_DISTINCT:
        raise InputError(
            f"a level map has {count} distinct levels in one image, the most is {MAX_DISTINCT}: round its levels"
        )
    distinct = ordered[:, :1].expand(-1, max(2, count)).scatter(1, rank, ordered)
    if count == 1:
        return distinct, None
    place = torch.empty_like(rank).scatter_(1, order, rank)
    weights = torch.nn.functional.one_hot(place, count).movedim(-1, 1)
    return distinct, weights.reshape(levels.shape[0], count, *levels.shape[-2:])
