"""Forward noising and reverse steps (DDIM, DDPM, Euler-Maruyama) at one level or a map of levels.

``abar`` arguments are float64, 0-dimensional or broadcastable to the image. Coefficients are computed in float64 and
rounded once, so that one level and a constant level map give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_diffusion(image: Tensor) -> Tensor:
    """Maps [0, 1] to [-1, 1]."""
    return image * 2.0 - 1.0


def to_image(u: Tensor) -> Tensor:
    """Maps [-1, 1] to [0, 1] and clips values outside."""
    return (u * 0.5 + 0.5).clamp(0.0, 1.0)


def noised(u: Tensor, abar: Tensor, eps: Tensor) -> Tensor:
    """Noises a clean image: x(t) = sqrt(abar_t) u + sqrt(1 - abar_t) eps (Ho et al. 2020, eq. 4)."""
    return abar.sqrt().to(u.dtype) * u + (1.0 - abar).sqrt().to(u.dtype) * eps


def renoised(x: Tensor, abar_from: Tensor, abar_to: Tensor, eps: Tensor) -> Tensor:
    """Noises a sample from one level to a stronger one in one jump, x(t) to x(t + U)."""
    ratio = abar_to / abar_from
    return ratio.sqrt().to(x.dtype) * x + (1.0 - ratio).sqrt().to(x.dtype) * eps


def euler_back(x: Tensor, eps: Tensor, abar_from: Tensor, abar_to: Tensor, noise: Tensor) -> Tensor:
    """Takes one Euler-Maruyama step of the reverse VP SDE (Song et al., "Score-based", ICLR 2021, eq. 6 and 11).

    With b the integral of beta over the step, -ln(abar_from / abar_to), and the score -eps / sqrt(1 - abar_from):
    x + b (x / 2 - eps / sqrt(1 - abar_from)) + sqrt(b) noise.

    Args:
        x: Sample at the stronger level, (B, C, H, W) in diffusion space.
        eps: Noise that the denoiser predicts in ``x``, same shape.
        abar_from: abar of the stronger level.
        abar_to: abar of the weaker level.
        noise: Standard normal, same shape.
    """
    b = (abar_to / abar_from).log()
    score = b / (1.0 - abar_from).sqrt()
    return (1.0 + b / 2.0).to(x.dtype) * x - score.to(x.dtype) * eps + b.sqrt().to(x.dtype) * noise


def posterior_variance(abar_from: Tensor, abar_to: Tensor) -> Tensor:
    """Returns the variance of a DDPM step to a weaker level (Ho et al. 2020, eq. 7)."""
    return (1.0 - abar_to) / (1.0 - abar_from) * (1.0 - abar_from / abar_to)


def step_back(
    x: Tensor, eps: Tensor, abar_from: Tensor, abar_to: Tensor, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """Steps to a weaker level, given the predicted noise (Song et al., "DDIM", ICLR 2021, eq. 12 and 16).

    Args:
        x: Sample at the stronger level, (B, C, H, W) in diffusion space.
        eps: Noise that the denoiser predicts in ``x``, same shape.
        abar_from: abar of the stronger level.
        abar_to: abar of the weaker level.
        eta: 0 is DDIM, 1 is DDPM on the same grid.
        noise: Standard normal, same shape; required for ``eta`` > 0.
    """
    variance = eta**2 * posterior_variance(abar_from, abar_to)
    a = (abar_to / abar_from).sqrt()
    b = (1.0 - abar_to - variance).clamp(min=0.0).sqrt() - a * (1.0 - abar_from).sqrt()
    # Where both levels are 0 the formula divides 0 by 0; the pixel is clean and stays unchanged.
    b = torch.where(abar_from == 1.0, 0.0, b)
    stepped = a.to(x.dtype) * x + b.to(x.dtype) * eps
    if noise is None:
        return stepped
    return stepped + torch.where(abar_from == 1.0, 0.0, variance).sqrt().to(x.dtype) * noise
