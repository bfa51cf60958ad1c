"""Attention masks from a classifier's activations (Pei et al., CVPR 2025, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def saliency(features: Sequence[Tensor], size: tuple[int, int], power: float = 2.0) -> Tensor:
    """Returns the saliency G_m = sum_c |A_m,c|^p of every block, resized to the image by ``enlarged``.

    Args:
        features: K activations (B, C_m, h_m, w_m).
        size: (H, W) of the image.
        power: p.

    Returns:
        (B, K, H, W), not negative.
    """
    # Squaring gives the same bits as pow(2) in a tenth of the time.
    raised = [feature.square() if power == 2.0 else feature.abs().pow(power) for feature in features]
    maps = [each.sum(dim=1, keepdim=True) for each in raised]
    return torch.cat([enlarged(m, size) for m in maps], dim=1)


def enlarged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes maps (B, 1, h, w) bilinearly to (B, 1, H, W), without plateaus at the borders of coarse maps.

    Bilinear interpolation repeats the outermost cells beyond their centers, so a whole corner of the image gets the
    value of the corner cell. Maps with fewer than 7x7 cells of more than 4 pixels each therefore decay at the border
    towards their minimum. Finer maps, as in published evaluations (8x8 at 32 pixels, 7x7 at 224), are resized as
    published.
    """
    resized = interpolate(maps, size=size, mode="bilinear", align_corners=False)
    cells = maps.shape[-2:]
    if min(cells) >= 7 or all(pixels <= 4 * count for pixels, count in zip(size, cells, strict=True)):
        return resized
    low = maps.amin(dim=(-2, -1), keepdim=True)
    rows, columns = (_fading(count, pixels, maps) for count, pixels in zip(cells, size, strict=True))
    return low + rows[:, None] * columns * (resized - low)


def _fading(cells: int, pixels: int, like: Tensor) -> Tensor:
    """Returns 1 between the centers of the outermost cells, decreasing by 1 per cell beyond them."""
    place = (torch.arange(pixels, device=like.device, dtype=like.dtype) + 0.5) * cells / pixels - 0.5
    return 1.0 - torch.maximum(-place, place - (cells - 1)).clamp(min=0.0)


def softmax_normalize(maps: Tensor) -> Tensor:
    """Applies a softmax over the pixels of each map (B, K, H, W), so that each sums to 1 (the paper's form)."""
    return maps.flatten(2).softmax(dim=2).reshape(maps.shape)


def minmax_normalize(maps: Tensor) -> Tensor:
    """Scales each map (B, K, H, W) to [0, 1] (the released code's form); a constant map becomes 0."""
    low, high = maps.amin(dim=(2, 3), keepdim=True), maps.amax(dim=(2, 3), keepdim=True)
    span = high - low
    return torch.where(span > 0, (maps - low) / torch.where(span > 0, span, 1.0), 0.0)


def threshold_union(maps: Tensor, tau: float) -> Tensor:
    """Returns the mask M = union_m [G_m > tau], (B, 1, H, W) in {0, 1}."""
    return (maps > tau).any(dim=1, keepdim=True).to(maps.dtype)


def top_fraction(maps: Tensor, fraction: float) -> Tensor:
    """Selects the round(fraction H W) pixels with the largest max_m G_m: (B, 1, H, W) in {0, 1}.

    Args:
        maps: (B, K, H, W) in [0, 1].
        fraction: In [0, 1].
    """
    # Resized maps have plateaus whose pixels differ by rounding only. Rounding must not decide among them.
    score = (maps.amax(dim=1, keepdim=True) * 2.0**20).round()
    return top_count(score, torch.full((len(score),), round(fraction * score[0].numel()), device=score.device))


def top_count(score: Tensor, count: Tensor) -> Tensor:
    """Selects the ``count`` (B,) pixels with the largest score (B, 1, H, W); ties go to the first in reading order."""
    order = score.flatten(1).argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(order.shape[1], device=score.device).expand_as(order)
    chosen = torch.zeros_like(score.flatten(1)).scatter(1, order, (ranks < count[:, None]).to(score.dtype))
    return chosen.reshape(score.shape)


def soft_threshold_union(maps: Tensor, tau: float, temperature: float) -> Tensor:
    """Relaxes ``threshold_union`` with sigmoids: M = 1 - prod_m (1 - sigmoid((G_m - tau) / temperature)).

    Args:
        maps: (B, K, H, W).
        tau: Threshold.
        temperature: In units of the maps; the limit 0 is the hard rule.

    Returns:
        (B, 1, H, W) in [0, 1], differentiable.
    """
    # sigmoid(-z) equals 1 - sigmoid(z) without cancellation.
    return 1.0 - ((tau - maps) / temperature).sigmoid().prod(dim=1, keepdim=True)


def soft_top_fraction(maps: Tensor, fraction: float, temperature: float) -> Tensor:
    """Relaxes ``top_fraction`` with a sigmoid at each image's quantile; no gradient passes through the quantile.

    Args:
        maps: (B, K, H, W) in [0, 1].
        fraction: In (0, 1).
        temperature: In units of the maps; the limit 0 is the hard rule.

    Returns:
        (B, 1, H, W) in [0, 1], differentiable.
    """
    score = maps.amax(dim=1, keepdim=True)
    ordered = score.detach().flatten(1).sort(dim=1, descending=True).values
    # Halfway between the last selected pixel and the first that is not.
    last = round(fraction * ordered.shape[1])
    threshold = ordered[:, [max(last - 1, 0), min(last, ordered.shape[1] - 1)]].mean(dim=1)
    return ((score - threshold.reshape(-1, 1, 1, 1)) / temperature).sigmoid()


def random_shapes(like: Tensor, draws: Tensor, count: int = 3) -> Tensor:
    """Returns unions of up to ``count`` random ellipses, (B, 1, H, W) in {0, 1}, as masks for denoiser training.

    Args:
        like: (B, C, H, W); sets size, type and device.
        draws: Uniform in [0, 1), (B, 6 count).
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
    # The first ellipse always counts, each further one in half of the images.
    used = used < 0.5
    used[:, 0] = True
    return (inside & used).any(dim=1, keepdim=True).to(like.dtype)
