"""Variance-preserving noise schedules and the grids of levels that samplers walk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_purify.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """A variance-preserving schedule: x(t) = sqrt(abar_t) u + sqrt(1 - abar_t) eps.

    Args:
        abar: (T + 1,) float64, abar[0] = 1 and strictly falling. Position t counts noising steps: 0 is a clean image.
    """

    abar: Tensor

    @staticmethod
    def linear(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2) -> Schedule:
        """abar_t = prod_{s<=t} (1 - beta_s), beta linear (Ho et al., "DDPM", NeurIPS 2020, section 4)."""
        beta = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        return Schedule(torch.cat((torch.ones(1, dtype=torch.float64), torch.cumprod(1.0 - beta, dim=0))))

    @property
    def steps(self) -> int:
        """T, the number of noising steps."""
        return len(self.abar) - 1

    def at(self, t: Tensor | int) -> Tensor:
        """Abar at levels ``t`` (any shape, integers in 0 .. T), float64."""
        if isinstance(t, int):
            return self.abar[t]
        return self.abar.to(t.device)[t.long()]

    def check(self, name: str, t: int, low: int = 0) -> int:
        """``t`` itself when it lies in ``low`` .. T; an ``InputError`` that names it otherwise."""
        if not low <= t <= self.steps:
            raise InputError(f"{name} = {t} is outside {low} .. {self.steps}: give it in noising steps of the schedule")
        return t


def grid(start: int, end: int, steps: int) -> list[int]:
    """``steps`` + 1 levels from ``start`` down to ``end``, evenly spaced and rounded to whole noising steps.

    Raises:
        InputError: There are not so many whole levels between the two.
    """
    levels = [(start * (steps - k) + end * k) / steps for k in range(steps + 1)] if steps else [float(start)]
    rounded = [_round_half_up(level) for level in levels]
    if len(set(rounded)) != len(rounded):
        raise InputError(f"steps = {steps} is more than the {start - end} whole levels from {start} down to {end}")
    return rounded


def fraction_of(levels: Tensor, k: int, steps: int) -> Tensor:
    """The map t_k = t (1 - k / steps) of whole levels; for a constant map the same levels as ``grid(t, 0, steps)``."""
    return torch.floor(levels.double() * (steps - k) / steps + 0.5).to(levels.dtype)


def _round_half_up(value: float) -> int:
    return int(value + 0.5)
