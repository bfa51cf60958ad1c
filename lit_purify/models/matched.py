"""A denoiser with levels of another schedule."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lit_purify.errors import InputError
from lit_purify.functional.levels import LevelMap
from lit_purify.functional.schedule import Schedule
from lit_purify.models.denoiser import Denoiser


class MatchedSchedule(Denoiser):
    """A denoiser with levels in noising steps of another schedule.

    One set of levels then means the same noise for networks with different schedules. The denoiser is called at the
    level with the same signal-to-noise ratio, which may lie between two levels of its own schedule; stronger levels
    than its strongest do not exist. Use it for evaluation, and fine-tune a denoiser in its own schedule.

    Args:
        denoiser: The denoiser.
        schedule: The schedule of the levels; the default is DDPM's.
        steps: T of that schedule.
        beta_start: First beta of that schedule.
        beta_end: Last beta of that schedule.

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
        wanted, own = Schedule.named(schedule, steps, beta_start, beta_end), denoiser.schedule
        levels = own.levels_of(wanted)
        # Neither part of the state_dict nor rounded with the network, like the schedule's abar.
        self.levels = levels[torch.isfinite(levels)]
        if len(self.levels) < 2:
            raise InputError(
                f"schedule = {schedule}: its levels all exceed the denoiser's strongest: use another schedule"
            )
        trained = None if own.trained is None else int((self.levels <= own.trained).sum()) - 1
        self.schedule = Schedule(wanted.abar[: len(self.levels)], trained)
        self.denoiser: Denoiser = denoiser
        self.channels, self.size, self.onehot = denoiser.channels, denoiser.size, denoiser.onehot
        self.origin = denoiser.origin
        self.eval()

    @property
    @override
    def title(self) -> str:
        return f"{self.denoiser.title}, levels matched to another schedule"

    def forward(self, x: Tensor, t: Tensor | LevelMap) -> Tensor:
        """Predicts the noise, see ``Denoiser``; the denoiser's level is interpolated between whole levels."""
        own = LevelMap(self._own(t.levels), t.weights) if isinstance(t, LevelMap) else self._own(t)
        return self.denoiser(x, own)

    def _own(self, t: Tensor) -> Tensor:
        levels, below = self.levels.to(t.device, non_blocking=True), t.long()
        above = (below + 1).clamp(max=self.schedule.steps)
        return torch.lerp(levels[below], levels[above], t.double() - below)
