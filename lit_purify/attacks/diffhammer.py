"""DiffHammer: an attack that follows the draws of a purifier that share a vulnerability."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import elu, logsigmoid

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
"""The loss at the border between two classes."""


class DiffHammer(PGD):
    """DiffHammer (Wang et al., NeurIPS 2024): PGD on the draws of noise that share a vulnerability.

    Different draws make a sample vulnerable in different directions, and an average of their gradients (EOT) may serve
    none. Each step purifies the image under ``eot`` draws, and keeps no graph of the purifier. With y_i the purified
    images, L_i their losses (less the loss at the border between two classes), g_i = dL_i / dy_i, and u(.) the
    direction of unit norm in which a linear loss grows fastest (sign for Linf, unit vector for L2):

    1. The start is the draw j with the highest sum_i ELU(L_i + eps <u(g_j), g_i>).
    2. EM from r = g_j, ``rounds`` times: w_i = sigmoid(sharpness (L_i + eps <u(r), g_i>)),
       r = sum_i w_i g_i / sum_i w_i.
    3. Gradient grafting: r is put in at the output of the purifier under draw j, and carried back to the image by a
       single backward pass, J_j^T r.
    4. With v = (k + 1)^-decay in step k = 0, 1, ..., the gradient v g + (1 - v) g_before is followed as in ``PGD``.

    A step costs ``eot`` + 1 purifications, one of them differentiated. The derivative J is that of the attacked
    function: exact, through every step of the purifier, and through the mask where its gradient is not frozen.
    A function in one part (no purifier, another library's defense) shows the image itself: J is then the identity, all
    ``eot`` evaluations are differentiated, and the step follows r.

    The image is judged by the evaluation's own runs. (The released code judges it by the very draws that chose the
    iterate, leaves eps out of w_i, and differentiates a chain of fewer steps than the one that it evaluates.) A patent
    application (CN121999264A, 2024-11) describes similar steps.

    For its three starts on the margin, cross entropy and DLR wrap it into ``Restarts``.

    Args:
        norm: ``linf`` or ``l2``.
        eps: Radius, in pixels of [0, 1]; a number or a fraction such as ``8/255``.
        steps: Gradient steps.
        step_size: Length of a step, in pixels of [0, 1]; a number or a fraction; ``None`` is 2.5 ``eps`` / ``steps``.
        eot: N, draws of noise that each step chooses from.
        loss: ``ce``, ``margin`` or ``dlr``, as in ``PGD``.
        select: ``last`` returns the last iterate, ``best`` the one with the most wrong draws, of equals the one with
            the highest averaged margin. The draws are those of its own step: best is partly luck.
        random_start: Start at a uniform point of the ball instead of at the image.
        restarts: How often to start on the same loss; the best result by fresh draws counts.
        rounds: Of the EM; 0 follows the start.
        sharpness: lambda of the weights.
        decay: Of the weight of a new gradient; 0 forgets the gradients before.
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
        if rounds < 0 or sharpness <= 0.0 or decay < 0.0:
            raise InputError(
                f"rounds = {rounds}, sharpness = {sharpness}, decay = {decay}: use a sharpness above 0, the others "
                "at least 0"
            )
        self.rounds, self.sharpness, self.decay = rounds, sharpness, decay

    @property
    def title(self) -> str:
        """What reports call it."""
        return super().title.replace("PGD", "DiffHammer", 1)

    @property
    def queries(self) -> Queries:
        """What it costs on a purifier."""
        judged = 0 if self._returns_last else self.eot
        return Queries(self.restarts * (self.steps * (self.eot + 1) + judged), self.restarts * self.steps)

    def _look(
        self,
        model: AttackedFunction,
        loss: LossFunction,
        point: Tensor,
        label: Tensor,
        noise: Noise,
        runs: list[int],
        chunk: int,
    ) -> tuple[Draws, Tensor]:
        seen = draws_in_chunks(model, loss, point, label, noise, runs, chunk, purified=True)
        chosen, direction = self.selected(seen.loss, seen.gradient)
        rows = len(runs) * torch.arange(len(point), device=point.device) + chosen
        return seen, carried_in_chunks(model, point, noise.runs(runs).rows(rows), direction, chunk)

    def selected(self, loss: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The draw j of each sample (B,), and the direction r at its purified image (B, C, H, W).

        Args:
            loss: Of N draws of each sample, (B, N).
            gradient: Of the loss in the purified image, (B, N, C, H, W).
        """
        # In float64: sums over pixels may round differently for another B.
        level = loss.double() - _BORDER[self.loss]

        def ahead(direction: Tensor) -> Tensor:
            """The losses (B, N) that a linear model expects where the purified images have moved by eps."""
            along = steepest(direction, self.norm)[:, None] * gradient
            return level + self.eps * along.flatten(2).double().sum(dim=2)

        scores = torch.stack([average(elu(ahead(start))) for start in gradient.unbind(dim=1)], dim=1)
        chosen = scores.argmax(dim=1)
        direction = gradient[torch.arange(len(loss), device=loss.device), chosen]
        for _ in range(self.rounds):
            # Weights that sum to 1, also where all sigmoids are 0 in floating point.
            weights = logsigmoid(self.sharpness * ahead(direction)).softmax(dim=1).to(gradient.dtype)
            direction = loss.shape[1] * average(weights.reshape(*weights.shape, *[1] * (gradient.ndim - 2)) * gradient)
        return chosen, direction

    def _followed(self, gradient: Tensor, before: Tensor, k: int) -> Tensor:
        share = float((k + 1) ** -self.decay)
        return share * gradient + (1.0 - share) * before

    def _score(self, logits: Tensor, loss: Tensor, label: Tensor) -> Tensor:
        return success(logits, label)
