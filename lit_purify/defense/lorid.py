"""LoRID: rounds of weak noise and a low-rank projection of the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from torch import Tensor
from typing_extensions import override

from lit_purify.defense.purifiers import Approximation, GradualPurifier, positive, require_images
from lit_purify.errors import InputError
from lit_purify.functional.diffusion import to_diffusion
from lit_purify.functional.tucker import low_rank
from lit_purify.models import Denoiser


class LoRIDPurifier(GradualPurifier):
    """Rounds of weak noise and a Tucker projection ("LoRID", Zollicoffer et al., AAAI 2025, arXiv 2409.08255).

    Each round noises to ``level`` and returns by DDPM. The projection keeps ``ranks`` leading directions of each mode
    of the tensor of overlapping patches (patches, channels, rows, columns) and averages overlapping patches. In the
    paper's text it precedes the rounds, in its formula it follows them.

    The exact gradient includes the projection's directions (eigenvectors). ``Approximate`` offers cheaper gradients:
    ``constant_projection`` holds the directions constant, ``identity_projection`` skips the projection.

    Args:
        denoiser: Predicts noise.
        level: t of each round, in noising steps.
        steps: Network calls of each round.
        rounds: Number of rounds.
        ranks: Ranks of patches, channels, rows and columns; a rank of at least the mode's size keeps all of it.
        order: Whether the projection comes ``before`` or ``after`` the rounds.
        patch: Height and width of a patch, in pixels.
        stride: Distance between patches, in pixels; the patches must reach the border of the image.
        sweeps: Sweeps of higher-order orthogonal iteration (HOOI); 0 is one pass of HOSVD.
        recompute: See ``Purifier``.
    """

    approximations = ("constant_projection", "identity_projection")

    def __init__(
        self,
        denoiser: Denoiser,
        level: int,
        steps: int,
        rounds: int,
        ranks: Sequence[int],
        order: Literal["before", "after"] = "before",
        patch: int = 8,
        stride: int = 4,
        sweeps: int = 1,
        recompute: bool = True,
    ) -> None:
        super().__init__(denoiser, [level] * positive("rounds", rounds), [steps] * rounds, "ddpm", recompute)
        require_images(self)
        if len(ranks) != 4 or min(ranks) < 1:
            raise InputError(f"ranks = {list(ranks)}: use 4 numbers >= 1: patches, channels, rows, columns")
        if not 1 <= stride <= patch <= denoiser.size or (denoiser.size - patch) % stride:
            raise InputError(
                f"patch = {patch}, stride = {stride} do not cover {denoiser.size} pixels: use a stride "
                f"of at most {patch} that divides {denoiser.size - patch}"
            )
        if sweeps < 0:
            raise InputError(f"sweeps = {sweeps}: use 0 or more")
        self.ranks, self.order, self.patch, self.stride, self.sweeps = ranks, order, patch, stride, sweeps
        self.approximation: Approximation | None = None

    @override
    def entering(self, u: Tensor) -> Tensor:
        return self.projected(u) if self.order == "before" else u

    @override
    def leaving(self, x: Tensor) -> Tensor:
        return self.projected(x) if self.order == "after" else x

    def projected(self, u: Tensor) -> Tensor:
        """Projects images (B, C, H, W) in diffusion space; the projection itself runs in [0, 1]."""
        held = self.approximation is not None

        def project(u: Tensor) -> Tensor:
            return to_diffusion(low_rank(u * 0.5 + 0.5, self.ranks, self.patch, self.stride, self.sweeps, held))

        if self.approximation == "identity_projection":
            return u + (project(u.detach()) - u.detach())
        return self.recomputed(project, u)

    @override
    def approximated(self, how: Approximation) -> Self:
        super().approximated(how)
        return self._with(approximation=how)
