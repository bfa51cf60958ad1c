"""Variance-preserving noise schedules and the grids of levels for samplers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lit_purify.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """A variance-preserving schedule: x(t) = sqrt(abar_t) u + sqrt(1 - abar_t) eps.

    Args:
        abar: (T + 1,) float64 on the CPU, abar[0] = 1 and strictly decreasing. Position t counts noising steps; 0 is a
            clean image.
        trained: The strongest level the denoiser was trained on; ``None`` if all were, or if it is unknown.
    """

    abar: Tensor
    trained: int | None = None

    def __post_init__(self) -> None:
        falls = bool((self.abar[1:] < self.abar[:-1]).all()) and float(self.abar[-1]) > 0.0
        if len(self.abar) < 2 or not falls:
            raise InputError(
                "the noise schedule does not fall from 1 to above 0: use steps >= 1 and betas within (0, 1)"
            )

    @staticmethod
    def linear(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2) -> Schedule:
        """Returns DDPM's abar_t = prod_{s<=t} (1 - beta_s) with linear betas (Ho et al., NeurIPS 2020, section 4)."""
        return Schedule(_products(torch.linspace(beta_start, beta_end, steps, dtype=torch.float64, device="cpu")))

    @staticmethod
    def cosine(steps: int = 4000) -> Schedule:
        """Returns the cosine schedule: abar_t ~ cos^2, betas at most 0.999 (Nichol & Dhariwal, ICML 2021, eq. 17)."""
        time = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
        wanted = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return Schedule(_products((1.0 - wanted[1:] / wanted[:-1]).clamp(max=0.999)))

    @staticmethod
    def continuous(steps: int = 1000, beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
        """Returns the VP SDE at times t / steps: abar = exp(-integral of beta) (Song et al., ICLR 2021, eq. 29)."""
        time = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
        return Schedule(torch.exp(-0.5 * time**2 * (beta_max - beta_min) - time * beta_min))

    @staticmethod
    def named(
        kind: Literal["linear", "cosine", "continuous"], steps: int, beta_start: float, beta_end: float
    ) -> Schedule:
        """Returns a named schedule. The continuous one multiplies betas by ``steps``, the cosine one ignores them."""
        if kind == "linear":
            return Schedule.linear(steps, beta_start, beta_end)
        if kind == "cosine":
            return Schedule.cosine(steps)
        if kind == "continuous":
            return Schedule.continuous(steps, beta_start * steps, beta_end * steps)
        raise InputError(f"schedule = {kind!r}: use linear, cosine or continuous")

    def levels_of(self, other: Schedule) -> Tensor:
        """Returns the level here with the signal-to-noise ratio of each level of ``other``: (other.steps + 1,) float64.

        Between whole levels the noise-to-signal ratio (standard deviations) is interpolated. Ratios below level 1 give
        level 1, ratios beyond level T give NaN, and level 0 gives 0.
        """
        own, wanted = ((1.0 / schedule.abar - 1.0).sqrt() for schedule in (self, other))
        above = torch.searchsorted(own, wanted).clamp(1, self.steps)
        low, high = own[above - 1], own[above]
        level = (above - 1 + (wanted - low) / (high - low)).clamp(min=1.0)
        level = torch.where(level > self.steps + 1e-6, torch.nan, level)
        return torch.where(other.abar == 1.0, 0.0, level)

    def trained_to(self, level: int | None) -> Schedule:
        """Returns this schedule for a denoiser trained up to ``level``."""
        return replace(self, trained=level)

    @property
    def steps(self) -> int:
        """Number of noising steps T."""
        return len(self.abar) - 1

    def at(self, t: Tensor | int) -> Tensor:
        """Returns abar at levels ``t`` (any shape, integers in 0 .. T), float64."""
        if isinstance(t, int):
            return self.abar[t]
        return self.abar.to(t.device, non_blocking=True)[t.long()]

    def check(self, name: str, t: int, low: int = 0) -> int:
        """Returns ``t``, or raises an ``InputError`` if it is outside ``low`` .. T or above the trained levels."""
        if not low <= t <= self.steps:
            raise InputError(f"{name} = {t} is outside {low} .. {self.steps}: give it in noising steps of the schedule")
        if self.trained is not None and t > self.trained:
            raise InputError(
                f"{name} = {t} is above {self.trained}, the strongest level that the denoiser was trained on: choose a "
                "lower one, or train with a higher max_level"
            )
        return t


def grid(start: int, end: int, steps: int) -> list[int]:
    """Returns ``steps`` + 1 levels from ``start`` down to ``end``, evenly spaced and rounded to whole noising steps.

    Raises:
        InputError: There are fewer whole levels between the two.
    """
    levels = [(start * (steps - k) + end * k) / steps for k in range(steps + 1)] if steps else [float(start)]
    rounded = [round_half_up(level) for level in levels]
    if len(set(rounded)) != len(rounded):
        raise InputError(f"steps = {steps} is more than the {start - end} whole levels from {start} down to {end}")
    return rounded


def _products(beta: Tensor) -> Tensor:
    return torch.cat((beta.new_ones(1), torch.cumprod(1.0 - beta, dim=0)))


def round_half_up(value: float) -> int:
    """Rounds to the nearest whole number, halves up."""
    return int(value + 0.5)
