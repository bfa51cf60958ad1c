"""Purifiers that noise strongly where the classifier looks and weakly elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lit_purify.defense.masks import Mask
from lit_purify.defense.purifiers import Purifier, Trace, needed, positive
from lit_purify.errors import InputError
from lit_purify.functional.diffusion import noised, renoised, step_back, to_diffusion, to_image
from lit_purify.functional.levels import LevelMap, holding
from lit_purify.functional.noise import Noise
from lit_purify.functional.schedule import grid, round_half_up
from lit_purify.models import Denoiser

Resampling = Literal["none", "single", "release", "multi"]


class HeterogeneousPurifier(Purifier):
    """Strong noise on the mask, weak noise elsewhere, removed by one scalar-level denoiser (Pei et al., CVPR 2025).

    The sample starts at ``high`` everywhere. At every grid level t >= ``low`` the pixels outside the mask are replaced
    by the input noised to t; below ``low`` the whole image is denoised together. *Resampling* mends the seam that each
    replacement leaves at the border of the mask:

    - ``none``: not at all;
    - ``single`` (the paper): noise the merged image forward to t + U in one jump, return to t in one DDIM step: one
      more call at each level in [low, high) (at ``high`` everything is input plus noise: there is no seam);
    - ``release`` (the released code): from t + U go straight to the next grid level, at every level above ``low``,
      also ``high``: no more calls;
    - ``multi`` (RePaint, Lugmayr et al., CVPR 2022): as ``single``, but back from t + U in ``resampling_steps`` steps,
      each merged again.

    Args:
        denoiser: Predicts noise.
        mask: Rule that gives the mask, from the attention of the defended classifier.
        high: t_l, level on the mask, in noising steps.
        low: t_s, level elsewhere; below ``high``.
        steps: Grid steps from ``high`` to ``end``; ``low`` is on the grid.
        resampling: How seams are mended.
        jump: U, in noising steps.
        resampling_steps: Small steps of ``multi``, at most ``jump``.
        end: Level at which the walk ends; 1 in the released code, whose last image keeps the noise of one step.
        recompute: See ``Purifier``.
    """

    mask: Mask

    def __init__(
        self,
        denoiser: Denoiser,
        mask: Mask,
        high: int,
        low: int,
        steps: int,
        resampling: Resampling = "single",
        jump: int = 10,
        resampling_steps: int = 10,
        end: int = 0,
        recompute: bool = True,
    ) -> None:
        super().__init__(denoiser, recompute)
        _check_order(denoiser, high, low)
        if not 0 <= end < low < high:
            raise InputError(f"low = {low} (t_s): this sampler needs 0 <= end = {end} < low < high = {high}")
        if mask.grades != 1:
            raise InputError("mask: this sampler knows strong and weak noise alone; use VariableIntensityPurifier")
        if positive("steps", steps) < 2:
            raise InputError(f"steps = {steps}: use at least 2, one above low and one below")
        self.mask, self.high, self.low, self.end, self.resampling = mask, high, low, end, resampling
        self.jump = 0 if resampling == "none" else positive("jump", jump)
        denoiser.schedule.check("high + jump", high + self.jump)
        self.resampling_steps = positive("resampling_steps", resampling_steps) if resampling == "multi" else 1
        self._back(high)
        above = min(steps - 1, max(1, round(steps * (high - low) / (high - end))))
        self.upper = grid(high, low, above)
        self.lower = grid(low, end, steps - above)

    def trace(self, image: Tensor, noise: Noise, mask: Tensor | None = None) -> Trace:
        """Walks from ``high`` to ``low`` on the mask, then from ``low`` to 0 everywhere."""
        at = self.denoiser.schedule.at
        mask = needed(mask)
        u = to_diffusion(image)
        draws = _Draws(noise, u)
        x = noised(u, at(self.high), draws.next())
        # What is noised how strongly, to look at; the sampler draws the weak noise anew at every level.
        start = x * mask + noised(u, at(self.low), draws.next()) * (1.0 - mask)

        def merge(x: Tensor, t: int) -> Tensor:
            return x * mask + noised(u, at(t), draws.next()) * (1.0 - mask)

        def mend(x: Tensor, t: int) -> Tensor:
            x = renoised(x, at(t), at(t + self.jump), draws.next())
            back = self._back(t)
            for k, (a, b) in enumerate(itertools.pairwise(back)):
                x = self.ddim(merge(x, a) if k else x, a, b)
            return x

        for t, s in zip(self.upper, self.upper[1:], strict=False):
            x = merge(x, t)
            if self.resampling == "release":
                x = self.ddim(renoised(x, at(t), at(t + self.jump), draws.next()), t + self.jump, s)
            else:
                if self.resampling != "none" and t < self.high:
                    x = mend(x, t)
                x = self.ddim(x, t, s)
        if self.resampling != "release":
            x = merge(x, self.low)
            if self.resampling != "none":
                x = mend(x, self.low)
        for t, s in zip(self.lower, self.lower[1:], strict=False):
            x = self.calling(last=s == self.lower[-1]).ddim(x, t, s)
        return Trace(to_image(x), to_image(start), mask)

    @property
    def start(self) -> list[int]:
        """On the mask and elsewhere."""
        return [self.upper[0], self.lower[0]]

    def _back(self, t: int) -> list[int]:
        """The levels that resampling walks from t + U back to t."""
        return grid(t + self.jump, t, self.resampling_steps) if self.jump else [t]

    @property
    def levels(self) -> list[int]:
        """The grid levels at which the denoiser is called; resampling adds t + U to them."""
        return self.upper[:-1] + self.lower[:-1]

    @property
    def nfe(self) -> int:
        """One call a grid step, and those of resampling."""
        mended = len(self.upper) - 1 if self.resampling in ("single", "multi") else 0
        return len(self.levels) + mended * self.resampling_steps


class VariableIntensityPurifier(Purifier):
    """Strong noise on the mask, weak noise elsewhere, removed by a denoiser that reads a map of levels.

    Every pixel's level falls to 0 in proportion, t_k(pixel) = t(pixel) (1 - k / K), so that nothing is merged and
    nothing mended. With a constant map it is DDIM. A mask of L grades gives levels low + (high - low) g / L.

    The noised images and steps of the grades are blended, for one grade M x(high) + (1 - M) x(low), which for a hard
    mask picks one of them bit for bit, and through which a relaxed mask has a gradient. The map that the denoiser is
    told is that of the nearest grade, and held: no gradient goes through it.

    Args:
        denoiser: Predicts noise, given a level map; trained on such maps.
        mask: Rule that gives the mask, from the attention of the defended classifier.
        high: Level on the mask, in noising steps.
        low: Level elsewhere, 0 .. ``high``.
        steps: K, network calls.
        recompute: See ``Purifier``.
    """

    mask: Mask

    def __init__(
        self,
        denoiser: Denoiser,
        mask: Mask,
        high: int,
        low: int,
        steps: int,
        recompute: bool = True,
    ) -> None:
        super().__init__(denoiser, recompute)
        _check_order(denoiser, high, low)
        self.mask, self.high, self.low = mask, high, low
        # Also refuses more steps than there are levels.
        self.grid = grid(high, 0, positive("steps", steps))
        self.steps = steps

    def walks(self, grades: int) -> list[list[int]]:
        """The K + 1 levels walked by each grade, from that of ``low`` to that of ``high``."""
        starts = [round_half_up(self.low + (self.high - self.low) * grade / grades) for grade in range(grades + 1)]
        # Unlike a grid, a walk may stay at a level: a weak one has fewer than K.
        return [
            [round_half_up(start * (self.steps - k) / self.steps) for k in range(self.steps + 1)] for start in starts
        ]

    def trace(self, image: Tensor, noise: Noise, mask: Tensor | None = None) -> Trace:
        """Noises by the map, then lets the whole map fall to 0."""
        at = self.denoiser.schedule.at
        mask, grades = needed(mask), self.mask.grades
        u = to_diffusion(image)
        draw = noise.normal(0, u)
        # Between the grades below and above; at a grade of its own (up to rounding) it is that grade alone.
        below = (mask.detach() * grades + 1e-4).long().clamp(max=grades - 1)
        above = mask * grades - below
        shares = [(below == grade) * (1.0 - above) + (below + 1 == grade) * above for grade in range(grades + 1)]
        nearest = holding((mask.detach() * grades).round().long(), grades + 1)

        def blend(of_grades: Sequence[Tensor]) -> Tensor:
            return torch.stack([share * x for share, x in zip(shares, of_grades, strict=True)]).sum(dim=0)

        walks = self.walks(grades)
        x = start = blend([noised(u, at(walk[0]), draw) for walk in walks])
        for k in range(self.steps):
            # Filled, not copied: a GPU would have to be waited for.
            levels = torch.cat([below.new_full((len(x), 1), walk[k]) for walk in walks], dim=1)
            eps = self.calling(last=k == self.steps - 1).predict(x, LevelMap(levels, nearest))
            x = blend([step_back(x, eps, at(walk[k]), at(walk[k + 1])) for walk in walks])
        return Trace(to_image(x), to_image(start), mask)

    @property
    def start(self) -> list[int]:
        """Of every grade."""
        return [walk[0] for walk in reversed(self.walks(self.mask.grades))]

    @property
    def levels(self) -> list[int]:
        """Levels on the mask."""
        return self.grid[:-1]

    @property
    def nfe(self) -> int:
        """One call a step."""
        return len(self.levels)


class _Draws:
    """Hands out the draws of one purification in the order of its program: the same order at every replay."""

    def __init__(self, noise: Noise, like: Tensor) -> None:
        self.noise, self.like, self.step = noise, like, -1

    def next(self) -> Tensor:
        self.step += 1
        return self.noise.normal(self.step, self.like)


def _check_order(denoiser: Denoiser, high: int, low: int) -> None:
    denoiser.schedule.check("high", high, low=1)
    denoiser.schedule.check("low", low)
    if low > high:
        raise InputError(f"low = {low} (t_s) is above high = {high} (t_l): the mask gets the strong noise; swap them")
