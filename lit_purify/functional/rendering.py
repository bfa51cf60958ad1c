"""Images to look at."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor

TINT = (0.95, 0.35, 0.10)
"""Color of what a mask covers."""
PANELS = ("original", "adversarial", "noised", "purified")
"""Images that show a sample, in order; its mask is a layer over the adversarial one."""


def overlaid(image: Tensor, mask: Tensor, strength: float = 0.45) -> Tensor:
    """Colors the masked pixels: image (..., 3, H, W) and mask (..., 1, H, W) in [0, 1]."""
    tint = torch.tensor(TINT, dtype=image.dtype).reshape(3, 1, 1)
    return image + strength * mask * (tint - image)


def enlarged(images: Tensor, pixels: int = 128) -> Tensor:
    """Images (..., H, W) enlarged without smoothing, to at least so many pixels of height."""
    scale = max(1, -(-pixels // images.shape[-2]))
    return repeat(images, "... h w -> ... (h s) (w t)", s=scale, t=scale)


def panels(images: Tensor, mask: Tensor, overlay: int, gap: int = 4) -> Tensor:
    """Images side by side, enlarged without smoothing, with the mask drawn over one of them.

    Args:
        images: (n, C, H, W) in [0, 1], gray or color.
        mask: (1, H, W) in {0, 1}.
        overlay: Which image carries the mask.
        gap: White pixels between panels.

    Returns:
        (3, h, n w + (n - 1) gap) in [0, 1].
    """
    color = images.expand(-1, 3, -1, -1).clone()
    color[overlay] = overlaid(color[overlay], mask)
    large = torch.nn.functional.pad(enlarged(color), (0, gap), value=1.0)
    return rearrange(large, "n c h w -> c h (n w)")[..., :-gap]


def picture_name(defense: str, attack: str, index: int) -> str:
    """File name of a sample's pictures, without its ending: another one for each (defense, attack, index).

    Names of defenses and attacks may hold letters, digits, '-', '_', '.' and '/', but no ',' and no '+'.
    """
    defense, attack = (name.translate({ord("."): ",", ord("/"): "+"}) for name in (defense, attack))
    return f"{defense}.{attack}.{index:06d}"
