"""Rounds of noise that are guided towards the image."""

from __future__ import annotations

from torch import Tensor

from lit_purify.defense.purifiers import GradualPurifier, Step, not_negative, positive
from lit_purify.functional.diffusion import noised, posterior_variance
from lit_purify.models import Denoiser

REFERENCE = 1 << 20
"""Added to the number of a step: the draws of what it is guided to. So those of the step are those of plain DDPM."""


class GuidedPurifier(GradualPurifier):
    """Rounds of DDPM, each step of which is drawn to what the round began with ("GDMP", Wang et al., arXiv 2205.14969).

    From level t to s, with r_t the round's input noised to t by noise of its own and sigma the standard deviation of
    DDPM's step: x_s = DDPM(x_t) - guidance * sigma * sqrt((1 - abar_t) / abar_t) * (x_t - r_t).

    The gradient goes through the guidance as well, also through r_t.

    Args:
        denoiser: Predicts noise.
        level: t of each round, in noising steps.
        steps: Network calls of each round.
        rounds: How many.
        guidance: The scale; 0 is DDPM. In DiffHammer's evaluation 2e-3 / eps, with the attack's Linf radius eps.
        recompute: See ``Purifier``.
    """

    def __init__(
        self, denoiser: Denoiser, level: int, steps: int, rounds: int, guidance: float, recompute: bool = True
    ) -> None:
        super().__init__(denoiser, [level] * positive("rounds", rounds), [steps] * rounds, "ddpm", recompute)
        self.guidance = not_negative("guidance", guidance)

    def step(self, at: Step) -> Tensor:
        """One step of DDPM and its guidance."""
        abar, weaker = self.denoiser.schedule.at(at.t), self.denoiser.schedule.at(at.s)
        scale = float(self.guidance * (posterior_variance(abar, weaker) * (1.0 - abar) / abar).sqrt())
        stepped = super().step(at)
        if scale == 0.0:
            return stepped
        return stepped - scale * (at.x - noised(at.given, abar, at.noise.normal(REFERENCE + at.number, at.x)))
