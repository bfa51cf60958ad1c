"""A denoiser whose levels are stated in another schedule."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_purify.errors import InputError
from lit_purify.functional.levels import LevelMap
from lit_purify.functional.schedule import Schedule
from lit_purify.models.denoiser import Denoiser


class MatchedSchedule(Denoiser):
    """The same denoiser, with levels in noising steps of another schedule.

    For evaluation; fine-tune the denoiser in its own schedule. One set of levels then means the same noise for networks
    of different schedules. A level is handed on as the one of the same signal-to-noise ratio, which may lie between two
    whole levels of the denoiser's own schedule. Levels that are stronger than its strongest do not exist.

    Args:
        denoiser: The denoiser.
        schedule: The schedule that levels are stated in; the default is that of DDPM, the field's usual one.
        steps: T of that schedule.
        beta_start: Its first beta.
        beta_end: Its last beta.

    Raises:
        InputError: The two schedules have no level in common.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Literal["linear", "cosine", "continuous"] = "linear",
        steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 2e-2,
    ) -> None:
        super().__init__()
        if isinstance(denoiser, MatchedSchedule):
            denoiser = denoiser.denoiser
        wanted = Schedule.named(schedule, steps, beta_start, beta_end)
        levels = denoiser.schedule.levels_of(wanted)
        reachable = int(torch.isfinite(levels).sum())
        if reachable < 2:
            raise InputError(f"schedule = {schedule}: all its levels are stronger than the strongest of the denoiser's")
        self.denoiser: Denoiser = denoiser
        self.schedule = Schedule(wanted.abar[:reachable])
        if denoiser.schedule.trained is not None:
            self.schedule = self.schedule.trained_to(int((levels <= denoiser.schedule.trained).sum()) - 1)
        self.channels, self.size, self.origin = denoiser.channels, denoiser.size, denoiser.origin
        # Like the schedule's abar: neither part of the state_dict, nor rounded when the network is.
        self.levels = levels[:reachable]
        self.eval()

    @property
    def title(self) -> str:
        """What reports call it."""
        return f"{self.denoiser.title}, levels matched to another schedule"

    def forward(self, x: Tensor, t: Tensor | LevelMap) -> Tensor:
        """Predicted noise; see ``Denoiser``. Between whole levels the denoiser's level is interpolated."""
        own = LevelMap(self._own(t.levels), t.weights) if isinstance(t, LevelMap) else self._own(t)
        return self.denoiser(x, own)

    def _own(self, t: Tensor) -> Tensor:
        levels = self.levels.to(t.device, non_blocking=True)
        below = t.floor().long() if t.is_floating_point() else t.long()
        above = (below + 1).clamp(max=self.schedule.steps)
        return torch.lerp(levels[below], levels[above], t.double() - below)
