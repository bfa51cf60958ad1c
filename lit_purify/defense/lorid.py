"""Rounds of weak noise together with a projection of the image on a tensor of low rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from torch import Tensor

from lit_purify.defense.purifiers import Approximation, GradualPurifier, pictures_only, positive
from lit_purify.errors import InputError
from lit_purify.functional.diffusion import to_diffusion
from lit_purify.functional.tucker import low_rank
from lit_purify.models import Denoiser


class LoRIDPurifier(GradualPurifier):
    """Several rounds of weak noise, and a Tucker projection ("LoRID", Zollicoffer et al., AAAI 2025, arXiv 2409.08255).

    Each round noises to ``level`` and returns by DDPM. The projection takes the overlapping patches of an image as one
    tensor (patches, channels, rows, columns), keeps ``ranks`` leading directions of each mode, and puts the patches
    back by averaging. The paper's text has it before the rounds, its formula after them.

    The gradient goes through the projection's directions (eigenvectors). Cheaper gradients for an attack, named in its
    results, are those of ``Approximate``: ``constant_projection`` holds the directions, ``identity_projection`` leaves
    the projection out.

    Args:
        denoiser: Predicts noise.
        level: t of each round, in noising steps.
        steps: Network calls of each round.
        rounds: How many.
        ranks: Of patches, channels, rows and columns; a rank of the mode's size or more keeps all of it.
        order: Of the projection: ``before`` or ``after`` the rounds.
        patch: Height and width of a patch, in pixels.
        stride: Between patches, in pixels; they must reach the border of the image.
        sweeps: Of the higher-order orthogonal iteration (HOOI); 0 is one pass of HOSVD.
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
        pictures_only(self)
        if len(ranks) != 4 or min(ranks) < 1:
            raise InputError(f"ranks = {list(ranks)}: give four of at least 1, of patches, channels, rows and columns")
        if order not in ("before", "after"):
            raise InputError(f"order = {order!r}: use before or after")
        if not 1 <= stride <= patch <= denoiser.size or (denoiser.size - patch) % stride:
            raise InputError(
                f"patch = {patch}, stride = {stride} do not cover {denoiser.size} pixels: the stride must be at most "
                "the patch, and divide what it leaves"
            )
        if sweeps < 0:
            raise InputError(f"sweeps = {sweeps}: use 0 or more")
        self.ranks, self.order, self.patch, self.stride, self.sweeps = ranks, order, patch, stride, sweeps
        self.through: Approximation | None = None

    def entering(self, u: Tensor) -> Tensor:
        """The projected image, if that comes before the rounds."""
        return self.projected(u) if self.order == "before" else u

    def leaving(self, x: Tensor) -> Tensor:
        """The projected result, if that comes after the rounds."""
        return self.projected(x) if self.order == "after" else x

    def projected(self, u: Tensor) -> Tensor:
        """The projection of images (B, C, H, W), made in [0, 1]; in diffusion space before and after."""
        held = self.through is not None

        def project(u: Tensor) -> Tensor:
            return to_diffusion(low_rank(u * 0.5 + 0.5, self.ranks, self.patch, self.stride, self.sweeps, held))

        if self.through == "identity_projection":
            return u + (project(u.detach()) - u.detach())
        return self.recomputed(project, u)

    def approximated(self, how: Approximation) -> Self:
        """See ``Purifier``."""
        super().approximated(how)
        return self._with(through=how)
