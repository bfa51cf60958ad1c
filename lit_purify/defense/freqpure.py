"""Purification that keeps the image's low frequencies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_purify.defense.purifiers import GradualPurifier, Step, not_negative, pictures_only
from lit_purify.functional.spectrum import distances
from lit_purify.models import Denoiser


class FreqPurePurifier(GradualPurifier):
    """DDPM whose estimates keep low frequencies of the image (Pei et al., "FreqPure", arXiv 2505.01267).

    At every step, within a centered disc of the Fourier transform, the estimate of the clean image gets the amplitude
    of what the round began with, and its phase is clipped to ``phase`` around that one's. With F_0 of the estimate and
    F of the input that is F exp(i clip(arg(F_0 conj(F)), -phase, phase)). The predicted noise stays as it is.

    An amplitude of 0 has no phase: there the gradient is not defined, and what torch gives is 0.

    Args:
        denoiser: Predicts noise.
        level: t of each round, in noising steps.
        steps: Network calls of each round.
        radius: Of the disc, in frequencies (periods per image); 0 keeps nothing, and is DDPM.
        phase: In radians; 0 keeps the input's phase, pi that of the estimate.
        recompute: See ``Purifier``.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        level: Sequence[int],
        steps: Sequence[int],
        radius: float,
        phase: float = 0.3,
        recompute: bool = True,
    ) -> None:
        super().__init__(denoiser, level, steps, "ddpm", recompute)
        pictures_only(self)
        self.radius, self.phase = not_negative("radius", radius), not_negative("phase", phase)

    def step(self, at: Step) -> Tensor:
        """One step of DDPM, from the corrected estimate."""
        abar, weaker = self.denoiser.schedule.at(at.t), self.denoiser.schedule.at(at.s)
        clean = (at.x - (1.0 - abar).sqrt().to(at.x.dtype) * at.eps) / abar.sqrt().to(at.x.dtype)
        missing = self.recomputed(self.missing, clean, at.given)
        return super().step(at) + weaker.sqrt().to(at.x.dtype) * missing

    def missing(self, clean: Tensor, given: Tensor) -> Tensor:
        """What an estimate of the clean image lacks of the input's low frequencies, (B, C, H, W)."""
        inside = (distances(clean) <= self.radius) & (self.radius > 0)
        estimate, kept = torch.fft.fft2(clean), torch.fft.fft2(given)
        turn = (estimate * kept.conj()).angle().clamp(-self.phase, self.phase)
        return torch.fft.ifft2(
            torch.where(inside, kept * torch.polar(torch.ones_like(turn), turn) - estimate, 0.0)
        ).real
