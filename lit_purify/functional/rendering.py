"""Images for reports and previews."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor

TINT = (0.95, 0.35, 0.10)
"""Color of masked pixels."""
_GAP = 4
PANELS = ("original", "adversarial", "noised", "purified")
"""Images shown for a sample, in order. The mask is drawn over the adversarial image."""


def overlaid(image: Tensor, mask: Tensor, strength: float = 0.45) -> Tensor:
    """Colors the masked pixels: image (..., 3, H, W) and mask (..., 1, H, W) in [0, 1]."""
    tint = torch.tensor(TINT, dtype=image.dtype).reshape(3, 1, 1)
    return image + strength * mask * (tint - image)


def enlarged(images: Tensor, pixels: int = 128) -> Tensor:
    """Enlarges images (..., H, W) without smoothing to a height of at least ``pixels``."""
    scale = max(1, -(-pixels // images.shape[-2]))
    return repeat(images, "... h w -> ... (h s) (w t)", s=scale, t=scale)


def panels(images: Tensor, mask: Tensor, overlay: int) -> Tensor:
    """Places images side by side, enlarged without smoothing, with the mask drawn over one of them.

    Args:
        images: (n, C, H, W) in [0, 1], gray or color.
        mask: (1, H, W) in {0, 1}.
        overlay: Position of the image that carries the mask.

    Returns:
        (3, h, n w + 4 (n - 1)) in [0, 1], with four white pixels between panels.
    """
    color = images.expand(-1, 3, -1, -1).clone()
    color[overlay] = overlaid(color[overlay], mask)
    large = torch.nn.functional.pad(enlarged(color), (0, _GAP), value=1.0)
    return rearrange(large, "n c h w -> c h (n w)")[..., :-_GAP]


def picture_name(defense: str, attack: str, index: int) -> str:
    """Returns a unique file name, without extension, for the pictures of (defense, attack, index).

    The names of defenses and attacks may contain letters, digits, '-', '_', '.' and '/', but neither ',' nor '+'.
    """
    defense, attack = (name.translate({ord("."): ",", ord("/"): "+"}) for name in (defense, attack))
    return f"{defense}.{attack}.{index:06d}"
