"""FreqPure: purification that keeps low frequencies of the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lit_purify.defense.purifiers import GradualPurifier, Step, nonnegative, require_images
from lit_purify.models import Denoiser


class FreqPurePurifier(GradualPurifier):
    """DDPM whose clean estimates keep low frequencies of the image (Pei et al., "FreqPure", arXiv 2505.01267).

    At every step, a centered disc of the Fourier transform of the clean estimate gets the amplitude of the round's
    input, and its phase is clipped to within ``phase`` of the input's. With F_0 of the estimate and F of the input, the
    disc becomes F exp(i clip(arg(F_0 conj(F)), -phase, phase)). The predicted noise is unchanged.

    The gradient is undefined where an amplitude is 0; torch returns 0 there.

    Args:
        denoiser: Predicts noise.
        level: t of each round, in noising steps.
        steps: Network calls of each round.
        radius: Radius of the disc, in periods per image; 0 keeps nothing and gives DDPM.
        phase: In radians; 0 keeps the input's phase, pi the estimate's.
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
        require_images(self)
        self.radius, self.phase = nonnegative("radius", radius), nonnegative("phase", phase)

    @override
    def step(self, at: Step) -> Tensor:
        abar, weaker = self.denoiser.schedule.at(at.t), self.denoiser.schedule.at(at.s)
        clean = (at.x - (1.0 - abar).sqrt().to(at.x.dtype) * at.eps) / abar.sqrt().to(at.x.dtype)
        missing = self.recomputed(self.missing, clean, at.origin)
        return super().step(at) + weaker.sqrt().to(at.x.dtype) * missing

    def missing(self, clean: Tensor, origin: Tensor) -> Tensor:
        """Returns the correction of a clean estimate at low frequencies, (B, C, H, W)."""
        inside = (_frequencies(clean) <= self.radius) & (self.radius > 0)
        estimate, kept = torch.fft.fft2(clean), torch.fft.fft2(origin)
        turn = (estimate * kept.conj()).angle().clamp(-self.phase, self.phase)
        return torch.fft.ifft2(
            torch.where(inside, kept * torch.polar(torch.ones_like(turn), turn) - estimate, 0.0)
        ).real


def _frequencies(image: Tensor) -> Tensor:
    """Returns the frequency of each entry of ``torch.fft.fft2``, in periods per image: (H, W) float64."""
    rows, columns = (torch.fft.fftfreq(n, 1.0 / n, dtype=torch.float64, device=image.device) for n in image.shape[-2:])
    return torch.hypot(rows[:, None], columns)
