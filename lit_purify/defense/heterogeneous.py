"""Heterogeneous purifiers: strong noise where the classifier's attention is high, weak noise elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lit_purify.defense.masks import Mask
from lit_purify.defense.purifiers import Purifier, Trace, positive, required_mask
from lit_purify.errors import InputError
from lit_purify.functional.diffusion import noised, renoised, step_back, to_diffusion, to_image
from lit_purify.functional.levels import LevelMap, holding
from lit_purify.functional.noise import Noise
from lit_purify.functional.schedule import grid, round_half_up
from lit_purify.models import Denoiser

Resampling = Literal["none", "single", "release", "multi"]


class HeterogeneousPurifier(Purifier):
    """Strong noise on the mask, weak noise elsewhere, removed by one scalar-level denoiser (Pei et al., CVPR 2025).

    The sample starts at ``high`` everywhere. At every grid level t >= ``low`` the input noised to t replaces the pixels
    outside the mask; below ``low`` the whole image is denoised. *Resampling* repairs the seam that each replacement
    leaves at the border of the mask:

    - ``none``: no repair;
    - ``single`` (the paper): noise the merged image from t to t + U in one jump and return in one DDIM step. This adds
      one call at each level in [low, high); at ``high`` there is no seam;
    - ``release`` (the released code): go from t + U straight to the next grid level, at every level above ``low``
      including ``high``, without additional calls;
    - ``multi`` (RePaint, Lugmayr et al., CVPR 2022): as ``single``, but return in ``resampling_steps`` steps and merge
      at each.

    Args:
        denoiser: Predicts noise.
        mask: Mask rule; it uses the attention of the defended classifier.
        high: t_l, level on the mask, in noising steps.
        low: t_s, level elsewhere; below ``high``.
        steps: Grid steps from ``high`` to ``end``; ``low`` is on the grid.
        resampling: How seams are repaired.
        jump: U, in noising steps.
        resampling_steps: Steps from t + U back to t with ``multi``, at most ``jump``.
        end: Last level; 1 in the released code, whose result keeps the noise of one step.
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
            raise InputError("mask: this sampler takes masks of one grade only: use VariableIntensityPurifier")
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
        mask = required_mask(mask)
        u = to_diffusion(image)
        draws = _Draws(noise, u)
        x = noised(u, at(self.high), draws.next())
        # Only for display: the sampler draws new weak noise at every level.
        start = x * mask + noised(u, at(self.low), draws.next()) * (1.0 - mask)

        def merge(x: Tensor, t: int) -> Tensor:
            return x * mask + noised(u, at(t), draws.next()) * (1.0 - mask)

        def resample(x: Tensor, t: int) -> Tensor:
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
                    x = resample(x, t)
                x = self.ddim(x, t, s)
        if self.resampling != "release":
            x = merge(x, self.low)
            if self.resampling != "none":
                x = resample(x, self.low)
        for t, s in zip(self.lower, self.lower[1:], strict=False):
            x = self.calling(last=s == self.lower[-1]).ddim(x, t, s)
        return Trace(to_image(x), to_image(start), mask)

    @property
    def start(self) -> list[int]:
        """The levels on the mask and elsewhere."""
        return [self.upper[0], self.lower[0]]

    def _back(self, t: int) -> list[int]:
        """Returns the levels of resampling from t + U back to t."""
        return grid(t + self.jump, t, self.resampling_steps) if self.jump else [t]

    @property
    def levels(self) -> list[int]:
        """Grid levels at which the denoiser is called; resampling adds calls at t + U."""
        return self.upper[:-1] + self.lower[:-1]

    @property
    def nfe(self) -> int:
        """Denoiser calls: one per grid step, plus those of resampling."""
        mended = len(self.upper) - 1 if self.resampling in ("single", "multi") else 0
        return len(self.levels) + mended * self.resampling_steps


class VariableIntensityPurifier(Purifier):
    """Strong noise on the mask, weak noise elsewhere, removed by a denoiser that takes level maps.

    All levels decrease to 0 in proportion, t_k(pixel) = t(pixel) (1 - k / K), so that there are no seams. A constant
    map gives DDIM. A mask with L grades gives the levels low + (high - low) g / L.

    Noised images and steps of the grades are blended, for one grade M x(high) + (1 - M) x(low). A hard mask selects one
    of them bit for bit; a relaxed mask gets a gradient. The denoiser receives the level map of the nearest grade,
    through which no gradient passes.

    Args:
        denoiser: Predicts noise at a level map; trained on such maps.
        mask: Mask rule; it uses the attention of the defended classifier.
        high: Level on the mask, in noising steps.
        low: Level elsewhere, 0 .. ``high``.
        steps: K, the number of denoiser calls.
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
        # Also raises if there are more steps than levels.
        self.grid = grid(high, 0, positive("steps", steps))
        self.steps = steps

    def walks(self, grades: int) -> list[list[int]]:
        """Returns the K + 1 levels of each grade, from the grade at ``low`` to the one at ``high``."""
        starts = [round_half_up(self.low + (self.high - self.low) * grade / grades) for grade in range(grades + 1)]
        # Unlike a grid, a walk may repeat a level: weak levels have fewer than K.
        return [
            [round_half_up(start * (self.steps - k) / self.steps) for k in range(self.steps + 1)] for start in starts
        ]

    def trace(self, image: Tensor, noise: Noise, mask: Tensor | None = None) -> Trace:
        """Noises by the level map, then denoises it to 0."""
        at = self.denoiser.schedule.at
        mask, grades = required_mask(mask), self.mask.grades
        u = to_diffusion(image)
        draw = noise.normal(0, u)
        # Each pixel blends the grades below and above it; at a grade (up to rounding) it has that grade alone.
        below = (mask.detach() * grades + 1e-4).long().clamp(max=grades - 1)
        above = mask * grades - below
        shares = [(below == grade) * (1.0 - above) + (below + 1 == grade) * above for grade in range(grades + 1)]
        nearest = holding((mask.detach() * grades).round().long(), grades + 1)

        def blend(of_grades: Sequence[Tensor]) -> Tensor:
            return torch.stack([share * x for share, x in zip(shares, of_grades, strict=True)]).sum(dim=0)

        walks = self.walks(grades)
        x = start = blend([noised(u, at(walk[0]), draw) for walk in walks])
        for k in range(self.steps):
            # Filling avoids a copy from the host, for which a GPU would synchronize.
            levels = torch.cat([below.new_full((len(x), 1), walk[k]) for walk in walks], dim=1)
            eps = self.calling(last=k == self.steps - 1).predict(x, LevelMap(levels, nearest))
            x = blend([step_back(x, eps, at(walk[k]), at(walk[k + 1])) for walk in walks])
        return Trace(to_image(x), to_image(start), mask)

    @property
    def start(self) -> list[int]:
        """The levels of all grades, strongest first."""
        return [walk[0] for walk in reversed(self.walks(self.mask.grades))]

    @property
    def levels(self) -> list[int]:
        """The levels on the mask."""
        return self.grid[:-1]

    @property
    def nfe(self) -> int:
        """Denoiser calls, one per step."""
        return len(self.levels)


class _Draws:
    """Numbers the draws of one purification in program order, the same at every replay."""

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
