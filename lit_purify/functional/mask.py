"""Attention masks from a classifier's activations (Pei et al., CVPR 2025, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def saliency(features: Sequence[Tensor], size: tuple[int, int], power: float = 2.0) -> Tensor:
    """G_m = sum_c |A_m,c|^p of every block, resized to the image (``enlarged``).

    Args:
        features: K activations (B, C_m, h_m, w_m).
        size: (H, W) of the image.
        power: p.

    Returns:
        (B, K, H, W), not negative.
    """
    # A square has the bits of that power, in a tenth of the time.
    raised = [feature.square() if power == 2.0 else feature.abs().pow(power) for feature in features]
    maps = [each.sum(dim=1, keepdim=True) for each in raised]
    return torch.cat([enlarged(m, size) for m in maps], dim=1)


def enlarged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, 1, h, w) bilinearly resized to (B, 1, H, W), without plateaus at the borders of coarse ones.

    Bilinear interpolation repeats the outermost cells beyond their centers: a whole corner of the image then has the
    value of the corner cell. Maps of fewer than 7x7 cells, of more than 4 pixels each, fall there as they do between
    two cells, towards their least value. Maps as fine as in published evaluations (8x8 at 32 pixels, 7x7 at 224) are
    resized as published.
    """
    resized = interpolate(maps, size=size, mode="bilinear", align_corners=False)
    cells = maps.shape[-2:]
    if min(cells) >= 7 or all(pixels <= 4 * count for pixels, count in zip(size, cells, strict=True)):
        return resized
    low = maps.amin(dim=(-2, -1), keepdim=True)
    rows, columns = (_fading(count, pixels, maps) for count, pixels in zip(cells, size, strict=True))
    return low + rows[:, None] * columns * (resized - low)


def _fading(cells: int, pixels: int, like: Tensor) -> Tensor:
    """1 between the centers of the outermost cells, falling by 1 over the length of a cell beyond them."""
    place = (torch.arange(pixels, device=like.device, dtype=like.dtype) + 0.5) * cells / pixels - 0.5
    return 1.0 - torch.maximum(-place, place - (cells - 1)).clamp(min=0.0)


def softmax_normalize(maps: Tensor) -> Tensor:
    """Softmax over the pixels of each map (B, K, H, W): each sums to 1 (the paper's form)."""
    return maps.flatten(2).softmax(dim=2).reshape(maps.shape)


def minmax_normalize(maps: Tensor) -> Tensor:
    """Each map (B, K, H, W) scaled to [0, 1] (the released code's form); a constant map becomes 0."""
    low, high = maps.amin(dim=(2, 3), keepdim=True), maps.amax(dim=(2, 3), keepdim=True)
    span = high - low
    return torch.where(span > 0, (maps - low) / torch.where(span > 0, span, 1.0), 0.0)


def threshold_union(maps: Tensor, tau: float) -> Tensor:
    """M = union_m [G_m > tau], (B, 1, H, W) in {0, 1}."""
    return (maps > tau).any(dim=1, keepdim=True).to(maps.dtype)


def top_fraction(maps: Tensor, fraction: float) -> Tensor:
    """The ``fraction`` of the pixels with the largest max_m G_m, exactly round(fraction H W) of them.

    Args:
        maps: (B, K, H, W) in [0, 1].
        fraction: In [0, 1].
    """
    # Resized maps have plateaus, whose pixels differ by rounding alone: that must not choose among them.
    score = (maps.amax(dim=1, keepdim=True) * 2.0**20).round()
    return top_count(score, torch.full((len(score),), round(fraction * score[0].numel()), device=score.device))


def top_count(score: Tensor, count: Tensor) -> Tensor:
    """The ``count`` (B,) pixels with the largest score (B, 1, H, W); of equal ones the first in reading order."""
    order = score.flatten(1).argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(order.shape[1], device=score.device).expand_as(order)
    chosen = torch.zeros_like(score.flatten(1)).scatter(1, order, (ranks < count[:, None]).to(score.dtype))
    return chosen.reshape(score.shape)


def soft_threshold_union(maps: Tensor, tau: float, temperature: float) -> Tensor:
    """``threshold_union`` with each threshold a sigmoid: M = 1 - prod_m (1 - sigmoid((G_m - tau) / temperature)).

    Args:
        maps: (B, K, H, W).
        tau: Threshold.
        temperature: In the units of the maps; towards 0 this is the hard rule.

    Returns:
        (B, 1, H, W) in [0, 1], differentiable.
    """
    # sigmoid(-z) is 1 - sigmoid(z), without the loss of digits.
    return 1.0 - ((tau - maps) / temperature).sigmoid().prod(dim=1, keepdim=True)


def soft_top_fraction(maps: Tensor, fraction: float, temperature: float) -> Tensor:
    """``top_fraction`` with a sigmoid at each image's quantile, which is held: no gradient goes through it.

    Args:
        maps: (B, K, H, W) in [0, 1].
        fraction: In (0, 1).
        temperature: In the units of the maps; towards 0 this is the hard rule.

    Returns:
        (B, 1, H, W) in [0, 1], differentiable.
    """
    score = maps.amax(dim=1, keepdim=True)
    ordered = score.detach().flatten(1).sort(dim=1, descending=True).values
    # Halfway between the last pixel that the hard rule chooses and the first that it does not.
    last = round(fraction * ordered.shape[1])
    threshold = ordered[:, [max(last - 1, 0), min(last, ordered.shape[1] - 1)]].mean(dim=1)
    return ((score - threshold.reshape(-1, 1, 1, 1)) / temperature).sigmoid()


def random_shapes(like: Tensor, draws: Tensor, count: int = 3) -> Tensor:
    """Unions of up to ``count`` random ellipses, (B, 1, H, W) in {0, 1}: masks to train a denoiser on.

    Args:
        like: (B, C, H, W), gives size, type and device.
        draws: Uniform numbers in [0, 1), (B, 6 count).
        count: Ellipses in the union.
    """
    height, width = like.shape[-2:]
    y = torch.linspace(0.0, 1.0, height, device=like.device, dtype=like.dtype)[None, None, :, None]
    x = torch.linspace(0.0, 1.0, width, device=like.device, dtype=like.dtype)[None, None, None, :]
    cy, cx, ry, rx, angle, used = draws.reshape(-1, count, 6, 1, 1).unbind(dim=2)
    angle, ry, rx = angle * torch.pi, 0.05 + 0.45 * ry, 0.05 + 0.45 * rx
    dy, dx = y - cy, x - cx
    along, across = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
    inside = (along / rx) ** 2 + (across / ry) ** 2 <= 1.0
    # The first ellipse always counts; each further one in half of the images.
    used = used < 0.5
    used[:, 0] = True
    return (inside & used).any(dim=1, keepdim=True).to(like.dtype)
