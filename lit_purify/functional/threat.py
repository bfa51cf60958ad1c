"""The threat model: a norm ball around the image, within the range [0, 1]."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from lit_purify.errors import InputError
from lit_purify.functional.images import each

Norm = Literal["linf", "l2"]
TOLERANCE = 1e-5
"""Rounding allowed beyond eps: relative to eps + 1, since images are float32 numbers of size 1."""


def pixels(name: str, value: float | str) -> float:
    """Parses a size in pixels of [0, 1], given as a number or as a fraction such as ``8/255``.

    Raises:
        InputError: It is neither, or not above 0.
    """
    try:
        size = float(Fraction(value))
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(f"{name} = {value!r} is not a number or a fraction such as 8/255") from error
    if not 0.0 < size < math.inf:
        raise InputError(f"{name} = {value} must be above 0; images lie in [0, 1], so 8/255 is usual for linf")
    return size


def linf_norm(delta: Tensor) -> Tensor:
    """Returns the largest absolute change of each sample, (B,), in pixels of [0, 1]."""
    return delta.flatten(1).abs().amax(dim=1)


def l2_norm(delta: Tensor) -> Tensor:
    """Returns the Euclidean norm of each sample's change, (B,)."""
    return delta.flatten(1).double().square().sum(dim=1).sqrt().to(delta.dtype)


def project(adversarial: Tensor, image: Tensor, norm: Norm, eps: float) -> Tensor:
    """Projects onto the ball, then clips to [0, 1], which cannot leave the ball again."""
    delta = adversarial - image
    delta = delta.clamp(-eps, eps) if norm == "linf" else delta * each(eps / l2_norm(delta).clamp(min=eps), delta)
    return (image + delta).clamp(0.0, 1.0)


def steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """Returns the unit direction of steepest ascent: the sign for Linf, the normalized gradient for L2."""
    if norm == "linf":
        return gradient.sign()
    length = each(l2_norm(gradient), gradient)
    return torch.where(length > 0, gradient / torch.where(length > 0, length, 1.0), 0.0)


def violations(adversarial: Tensor, image: Tensor, norm: Norm, eps: float) -> Tensor:
    """Marks samples outside the threat model, (B,) bool: norm above eps, a value outside [0, 1], or NaN."""
    delta = adversarial - image
    size = linf_norm(delta) if norm == "linf" else l2_norm(delta)
    low, high = adversarial.flatten(1).amin(dim=1), adversarial.flatten(1).amax(dim=1)
    return ~((size <= eps + TOLERANCE * (1.0 + eps)) & (low >= 0.0) & (high <= 1.0))
