"""Fourier frequencies of images."""

from __future__ import annotations

import torch
from torch import Tensor


def distances(image: Tensor) -> Tensor:
    """Returns the frequency of each entry of ``torch.fft.fft2``, in periods per image: (H, W) float64."""
    rows, columns = (torch.fft.fftfreq(n, 1.0 / n, dtype=torch.float64, device=image.device) for n in image.shape[-2:])
    return torch.hypot(rows[:, None], columns)
