"""GDMP: rounds of DDPM that are guided towards the image."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from lit_purify.defense.purifiers import GradualPurifier, Step, nonnegative, positive
from lit_purify.functional.diffusion import noised, posterior_variance
from lit_purify.models import Denoiser

REFERENCE = 1 << 20
"""Offset of the step numbers of guidance noise; it leaves the other noise equal to plain DDPM's."""


class GuidedPurifier(GradualPurifier):
    """Rounds of DDPM whose steps are guided towards the round's input ("GDMP", Wang et al., arXiv 2205.14969).

    For a step from t to s: x_s = DDPM(x_t) - guidance * sigma * sqrt((1 - abar_t) / abar_t) * (x_t - r_t), where sigma
    is the standard deviation of DDPM's step and r_t is the round's input noised to t with independent noise. The
    gradient includes the guidance and r_t.

    Args:
        denoiser: Predicts noise.
        level: t of each round, in noising steps.
        steps: Network calls of each round.
        rounds: Number of rounds.
        guidance: Scale; 0 is DDPM. DiffHammer's evaluation uses 2e-3 / eps with the attack's Linf radius eps.
        recompute: See ``Purifier``.
    """

    def __init__(
        self, denoiser: Denoiser, level: int, steps: int, rounds: int, guidance: float, recompute: bool = True
    ) -> None:
        super().__init__(denoiser, [level] * positive("rounds", rounds), [steps] * rounds, "ddpm", recompute)
        self.guidance = nonnegative("guidance", guidance)

    @override
    def step(self, at: Step) -> Tensor:
        abar, weaker = self.denoiser.schedule.at(at.t), self.denoiser.schedule.at(at.s)
        scale = float(self.guidance * (posterior_variance(abar, weaker) * (1.0 - abar) / abar).sqrt())
        stepped = super().step(at)
        if scale == 0.0:
            return stepped
        return stepped - scale * (at.x - noised(at.origin, abar, at.noise.normal(REFERENCE + at.number, at.x)))
