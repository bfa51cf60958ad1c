"""DiffHammer: an attack that follows noise draws with a shared vulnerability."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import elu, logsigmoid
from typing_extensions import override

from lit_purify.attacks.base import Queries
from lit_purify.attacks.pgd import PGD
from lit_purify.errors import InputError
from lit_purify.functional.chunks import (
    AttackedFunction,
    Draws,
    LossFunction,
    average,
    carried_in_chunks,
    draws_in_chunks,
)
from lit_purify.functional.losses import LossName, success
from lit_purify.functional.noise import Noise
from lit_purify.functional.threat import Norm, steepest

_BORDER = {"margin": 0.0, "dlr": 0.0, "ce": math.log(2.0)}
"""The loss on the border between two classes."""


class DiffHammer(PGD):
    """DiffHammer (Wang et al., NeurIPS 2024): PGD on noise draws that share a vulnerability.

    Different draws make a sample vulnerable in different directions, and their average gradient (EOT) may help with
    none. Each step purifies the image under ``eot`` draws without a graph of the purifier. Let y_i be the purified
    images, L_i their losses (minus the loss on the border between two classes), g_i = dL_i / dy_i, and u(.) the unit
    direction of steepest ascent (sign for Linf, unit vector for L2):

    1. The start is the draw j with the highest sum_i ELU(L_i + eps <u(g_j), g_i>).
    2. EM from r = g_j, ``rounds`` times: w_i = sigmoid(sharpness (L_i + eps <u(r), g_i>)),
       r = sum_i w_i g_i / sum_i w_i.
    3. Gradient grafting: r is inserted at the output of the purifier under draw j and carried back to the image by one
       backward pass, J_j^T r.
    4. With v = (k + 1)^-decay in step k = 0, 1, ..., the step follows v g + (1 - v) g_before as in ``PGD``.

    A step costs ``eot`` + 1 purifications, one of them differentiated. J is the exact Jacobian of the attacked
    function, through every step of the purifier, and through the mask unless its gradient is frozen. Without a separate
    purifier (a classifier, another library's defense) J is the identity, all ``eot`` evaluations are differentiated,
    and the step follows r.

    The evaluation judges the image by its own runs. (The released code judges it by the draws that chose the iterate,
    omits eps in w_i, and differentiates fewer steps than it evaluates.) A patent application (CN121999264A, 2024-11)
    describes similar steps.

    The paper's three starts on the margin, cross entropy and DLR are ``Restarts`` of this attack.

    Args:
        norm: ``linf`` or ``l2``.
        eps: Radius, in pixels of [0, 1]; a number or a fraction such as ``8/255``.
        steps: Gradient steps.
        step_size: Length of a step, in pixels of [0, 1]; a number or a fraction; ``None`` is 2.5 ``eps`` / ``steps``.
        eot: N, noise draws in each step.
        loss: ``ce``, ``margin`` or ``dlr``, as in ``PGD``.
        select: ``last`` returns the last iterate; ``best`` the one with the most wrong draws in its own step, with ties
            decided by the averaged margin, so best is partly luck.
        random_start: Start at a uniform point of the ball instead of at the image.
        restarts: Number of starts on the same loss; new draws choose the best result.
        rounds: EM iterations; 0 follows the start.
        sharpness: Factor in the sigmoid of the weights (lambda in the paper).
        decay: Decay of the weight of a new gradient; 0 ignores previous gradients.
    """

    scalable = frozenset({"steps", "eot", "restarts", "loss", "eps"})

    def __init__(
        self,
        norm: Norm = "linf",
        eps: float | str = "8/255",
        steps: int = 50,
        step_size: float | str | None = None,
        eot: int = 10,
        loss: LossName = "margin",
        select: Literal["best", "last"] = "last",
        random_start: bool = True,
        restarts: int = 1,
        rounds: int = 5,
        sharpness: float = 5.0,
        decay: float = 0.5,
    ) -> None:
        super().__init__(norm, eps, steps, step_size, eot, loss, select, random_start, restarts)
        if not (rounds >= 0 and sharpness > 0.0 and decay >= 0.0):
            raise InputError(
                f"rounds = {rounds}, sharpness = {sharpness}, decay = {decay}: use a sharpness above 0, the others "
                "0 or more"
            )
        self.rounds, self.sharpness, self.decay = rounds, sharpness, decay

    @property
    @override
    def title(self) -> str:
        return super().title.replace("PGD", "DiffHammer", 1)

    @property
    def queries(self) -> Queries:
        """Query cost for one sample, for a model with a purifier."""
        judged = 0 if self._returns_last else self.eot
        return Queries(self.restarts * (self.steps * (self.eot + 1) + judged), self.restarts * self.steps)

    def _observe(
        self,
        model: AttackedFunction,
        loss: LossFunction,
        point: Tensor,
        label: Tensor,
        noise: Noise,
        runs: list[int],
        chunk: int,
    ) -> tuple[Draws, Tensor]:
        drawn = draws_in_chunks(model, loss, point, label, noise, runs, chunk, purified=True)
        chosen, direction = self.selected(drawn.loss, drawn.gradient)
        rows = len(runs) * torch.arange(len(point), device=point.device) + chosen
        return drawn, carried_in_chunks(model, point, noise.runs(runs).rows(rows), direction, chunk)

    def selected(self, loss: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the draw j of each sample (B,) and the direction r at its purified image (B, C, H, W).

        Args:
            loss: (B, N), for N draws of each sample.
            gradient: (B, N, C, H, W), gradient of the loss in the purified image.
        """
        # In float64, because sums over pixels may round differently for another B.
        level = loss.double() - _BORDER[self.loss]

        def ahead(direction: Tensor) -> Tensor:
            """Returns the losses (B, N) of a linear model after a step of eps at the purified images."""
            along = steepest(direction, self.norm)[:, None] * gradient
            return level + self.eps * along.flatten(2).double().sum(dim=2)

        scores = torch.stack([average(elu(ahead(start))) for start in gradient.unbind(dim=1)], dim=1)
        chosen = scores.argmax(dim=1)
        direction = gradient[torch.arange(len(loss), device=loss.device), chosen]
        for _ in range(self.rounds):
            # softmax of logsigmoid: the weights sum to 1 even if all sigmoids underflow.
            weights = logsigmoid(self.sharpness * ahead(direction)).softmax(dim=1).to(gradient.dtype)
            direction = loss.shape[1] * average(weights.reshape(*weights.shape, *[1] * (gradient.ndim - 2)) * gradient)
        return chosen, direction

    def _followed(self, gradient: Tensor, before: Tensor, k: int) -> Tensor:
        share = float((k + 1) ** -self.decay)
        return share * gradient + (1.0 - share) * before

    def _score(self, logits: Tensor, loss: Tensor, label: Tensor) -> Tensor:
        return success(logits, label)
