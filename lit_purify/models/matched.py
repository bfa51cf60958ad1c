"""A denoiser whose levels are stated in another schedule."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_purify.errors import InputError
from lit_purify.functional.schedule import Schedule
from lit_purify.models.denoiser import Denoiser


class MatchedSchedule(Denoiser):
    """The same denoiser, with levels in noising steps of another schedule.

    So one set of levels means the same noise for networks of different schedules. A level is handed on as the one of
    the same signal-to-noise ratio, which may lie between two whole levels of the denoiser's own schedule. Levels that
    are stronger than its strongest do not exist.

    Args:
        denoiser: The denoiser.
        schedule: The schedule that levels are stated in; the default is that of DDPM, the field's usual one.
        steps: T of that schedule.
        beta_start: Its first beta.
        beta_end: Its last beta.

    Raises:
        InputError: The two schedules have no level in common.
    """

    levels: Tensor

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Literal["linear", "cosine", "continuous"] = "linear",
        steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 2e-2,
    ) -> None:
        super().__init__()
        wanted = Schedule.named(schedule, steps, beta_start, beta_end)
        levels = denoiser.schedule.levels_of(wanted)
        reachable = int(torch.isfinite(levels).sum())
        if reachable < 2:
            raise InputError(f"schedule = {schedule}: all its levels are stronger than the strongest of the denoiser's")
        self.denoiser, self.schedule = denoiser, Schedule(wanted.abar[:reachable])
        self.channels, self.size, self.origin = denoiser.channels, denoiser.size, denoiser.origin
        self.register_buffer("levels", levels[:reachable], persistent=False)

    @property
    def title(self) -> str:
        """What reports call it."""
        return f"{self.denoiser.title}, levels matched to another schedule"

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predicted noise; see ``Denoiser``. ``t`` must be whole."""
        return self.denoiser(x, self.levels[t.long()])
