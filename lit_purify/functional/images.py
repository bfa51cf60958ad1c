"""Images and rows of tables as tensors in [0, 1]: shapes, resizing, augmentation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from lit_purify.errors import InputError


def each(values: Tensor, like: Tensor) -> Tensor:
    """Reshapes one number per sample, (B,), to broadcast with samples (B, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def sample_shape(channels: int, size: int) -> tuple[int, ...]:
    """Returns (channels, size, size) for images, or (size,) for table rows (no channels, ``size`` features)."""
    return (channels, size, size) if channels else (size,)


def places(image: Tensor) -> Tensor:
    """Returns a tensor of the shape of masks and levels: (B, 1, H, W) for images, (B, F) for table rows."""
    return image[:, :1] if image.ndim == 4 else image


def resize(image: Tensor, size: int, shorter: int | None = None) -> Tensor:
    """Resizes the shorter side of images (bilinear, antialiased) and crops the center.

    Args:
        image: (B, C, H, W) in [0, 1].
        size: Height and width of the result, in pixels.
        shorter: Target of the shorter side, at least ``size``; ``None`` means ``size``.

    Raises:
        InputError: ``size`` is not positive.
    """
    if size < 1:
        raise InputError(f"size = {size}: use at least 1 pixel")
    shorter = size if shorter is None else shorter
    height, width = image.shape[-2:]
    scale = shorter / min(height, width)
    target = (max(shorter, round(height * scale)), max(shorter, round(width * scale)))
    if target != (height, width):
        image = interpolate(image, size=target, mode="bilinear", align_corners=False, antialias=True).clamp(0.0, 1.0)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return image[..., top : top + size, left : left + size]


def shift(image: Tensor, draws: Tensor, pixels: int) -> Tensor:
    """Moves each image by -pixels .. pixels in both directions and repeats its border.

    Args:
        image: (B, C, H, W).
        draws: Uniform in [0, 1), (B, 2): the shift in height and in width.
        pixels: Largest shift.
    """
    if pixels == 0:
        return image
    height, width = image.shape[-2:]
    padded = pad(image, (pixels, pixels, pixels, pixels), mode="replicate")
    offset = (draws * (2 * pixels + 1)).long()
    rows = offset[:, 0, None] + torch.arange(height, device=image.device)
    columns = offset[:, 1, None] + torch.arange(width, device=image.device)
    batch = torch.arange(len(image), device=image.device)[:, None, None]
    return padded.movedim(1, -1)[batch, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def flip(image: Tensor, draws: Tensor) -> Tensor:
    """Mirrors half of the images left to right; ``draws`` uniform in [0, 1), (B, 1)."""
    return torch.where(draws.reshape(-1, 1, 1, 1) < 0.5, image.flip(-1), image)


def check_shape(taker: str, image: Tensor, shape: tuple[int, ...]) -> None:
    """Raises an ``InputError`` if images or rows are not (B, *``shape``)."""
    if tuple(image.shape[1:]) != shape:
        raise InputError(
            f"the {taker} takes images of shape {shape}, the data has {tuple(image.shape[1:])}: give both one size and "
            "as many channels"
        )


def check_unit_range(image: Tensor, slack: float = 0.0) -> None:
    """Raises an ``InputError`` unless images (B, C, H, W) or rows (B, F) are floats in [0, 1], up to ``slack``."""
    if image.ndim not in (2, 4) or not image.is_floating_point():
        shapes = "floats (B, C, H, W), or rows (B, F)"
        raise InputError(f"images have shape {tuple(image.shape)} and type {image.dtype}: give {shapes}")
    low, high = (float(end) for end in image.detach().aminmax()) if image.numel() else (0.0, 0.0)
    if not -slack <= low <= high <= 1.0 + slack:
        remedy = "divide bytes by 255; of [-1, 1] take (x + 1) / 2"
        raise InputError(f"images must be in [0, 1], found {low:.4g} .. {high:.4g}: {remedy}")
