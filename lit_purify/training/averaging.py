"""The average of the weights that a training exports."""

from __future__ import annotations

from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from lit_purify.errors import InputError


class Averaging(WeightAveraging):
    """Exponential moving average of the weights, updated at every step.

    After n updates the decay is ``min(decay, (1 + n) / (10 + n))``: the average of a short training is not its start.

    Args:
        decay: In (0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0.0 < decay < 1.0:
            raise InputError(f"average = {decay} is outside (0, 1), and not 0 (none)")

        def average(mean: Tensor, current: Tensor, updates: Tensor) -> Tensor:
            return current.lerp(mean, ((1 + updates) / (10 + updates)).clamp(max=decay).to(mean.dtype))

        super().__init__(use_buffers=False, avg_fn=average)
