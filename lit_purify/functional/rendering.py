"""Images to look at."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor

TINT = (0.95, 0.35, 0.10)
"""Color of what a mask covers."""
GAP = 4
"""White pixels between panels."""


def overlaid(image: Tensor, mask: Tensor, strength: float = 0.45) -> Tensor:
    """Colors the masked pixels: image (..., 3, H, W) and mask (..., 1, H, W) in [0, 1]."""
    tint = torch.tensor(TINT, dtype=image.dtype).reshape(3, 1, 1)
    return image + strength * mask * (tint - image)


def panels(images: Tensor, mask: Tensor, overlay: int, pixels: int = 128, gap: int = GAP) -> Tensor:
    """Images side by side, enlarged without smoothing, with the mask drawn over one of them.

    Args:
        images: (n, C, H, W) in [0, 1], gray or color.
        mask: (1, H, W) in {0, 1}.
        overlay: Which image carries the mask.
        pixels: Least height of a panel.
        gap: White pixels between panels.

    Returns:
        (3, h, n w + (n - 1) gap) in [0, 1].
    """
    color = images.expand(-1, 3, -1, -1).clone()
    color[overlay] = overlaid(color[overlay], mask)
    scale = max(1, -(-pixels // images.shape[-2]))
    large = repeat(color, "n c h w -> n c (h s) (w t)", s=scale, t=scale)
    large = torch.nn.functional.pad(large, (0, gap), value=1.0)
    return rearrange(large, "n c h w -> c h (n w)")[..., :-gap]


def spans(width: int, count: int, gap: int = GAP) -> list[tuple[int, int]]:
    """First column of each of ``count`` panels in an image of ``panels``, and the column after its last."""
    each = (width - (count - 1) * gap) // count
    return [(k * (each + gap), k * (each + gap) + each) for k in range(count)]
