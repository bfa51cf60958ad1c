"""Constrained auto-PGD: an attack on table rows that respects the constraints of the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lit_purify.attacks.apgd import APGD
from lit_purify.errors import InputError
from lit_purify.functional.losses import LossName
from lit_purify.functional.noise import Noise
from lit_purify.functional.threat import Norm, project

_MARGIN = 0.95
"""Fraction of the radius used by the iterates; the repair may need the rest."""


class CAPGD(APGD):
    """CAPGD (Simonetto et al., NeurIPS 2024) on the loss averaged over ``eot`` draws of noise.

    APGD on the changeable features, on the loss minus a penalty for violated relations. It starts once at the row, then
    at random points. Every point is repaired before the model sees it, and the gradient includes the repair, so that
    the attack judges exactly what the defense receives. (The original repairs only equations during the attack and the
    rest at the end.) The data defines the constraints; without constraints this is APGD with these starts.

    Args:
        norm: ``linf`` or ``l2``, of features that are scaled to [0, 1].
        eps: Radius.
        steps: Steps of each start.
        eot: Noise draws averaged in each step.
        loss: ``ce``, ``margin`` or ``dlr``, as in ``PGD``.
        restarts: Number of starts.
        select: The returned row, see ``APGD``.
        penalty: Weight of the penalty.
    """

    def __init__(
        self,
        norm: Norm = "linf",
        eps: float | str = 0.1,
        steps: int = 10,
        eot: int = 1,
        loss: LossName = "margin",
        restarts: int = 2,
        select: Literal["best", "last"] = "best",
        penalty: float = 1.0,
    ) -> None:
        super().__init__(norm, eps, steps, eot, loss, 0, restarts, select)
        if penalty < 0.0:
            raise InputError(f"penalty = {penalty} is negative: use 0 or more")
        self.penalty = penalty

    @property
    @override
    def title(self) -> str:
        return f"CAPGD on the {self.loss} loss, {self.restarts} starts, the first at the row, {self.select} iterate"

    @override
    def inside(self, point: Tensor, image: Tensor) -> Tensor:
        if self.domain is None:
            return super().inside(point, image)
        return self.domain.project(project(point, image, self.norm, _MARGIN * self.eps), image)

    def shown(self, point: Tensor, image: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Returns the input and backward pass of ``Attack.shown``, minus the gradient of the penalty."""
        repaired, back = super().shown(point, image)
        if self.domain is None or not self.domain.relations or not self.penalty:
            return repaired, back
        with torch.enable_grad():
            leaf = point.detach().requires_grad_()
            (downhill,) = torch.autograd.grad(self.domain.penalty(leaf, image).sum(), leaf)
        return repaired, lambda gradient: back(gradient) - self.penalty * downhill

    def _start(self, image: Tensor, noise: Noise, start: int = 0) -> Tensor:
        return image if start == 0 else super()._start(image, noise, start)
