"""Projected gradient descent with expectation over transformation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_purify.attacks.base import Attack
from lit_purify.errors import InputError
from lit_purify.functional.chunks import LogitsFunction, gradient_in_chunks, logits_in_chunks
from lit_purify.functional.losses import cross_entropy_loss, margin_loss
from lit_purify.functional.noise import START_STEP, Noise
from lit_purify.functional.threat import Norm, l2_norm, pixels, project, steepest


class PGD(Attack):
    """PGD (Madry et al., ICLR 2018) on the loss averaged over ``eot`` draws of noise (Athalye et al., ICML 2018).

    Every step uses fresh draws. Linf steps follow the sign of the gradient, L2 steps the gradient normalized for each
    sample. It runs all its steps, whether or not a sample is broken on the way.

    Args:
        norm: ``linf`` or ``l2``.
        eps: Radius, in pixels of [0, 1]; a number or a fraction such as ``8/255``.
        steps: Gradient steps.
        step_size: Length of a step, in pixels of [0, 1]; a number or a fraction.
        eot: Draws that each gradient averages over.
        loss: ``ce`` is cross entropy, ``margin`` the largest wrong logit minus the right one.
        select: ``best`` returns the iterate with the highest averaged loss seen, ``last`` the last one.
        random_start: Start at a uniform point of the ball instead of at the image.
        restarts: How often to start; the restart whose result has the highest averaged loss counts.
    """

    def __init__(
        self,
        norm: Norm,
        eps: float | str,
        steps: int,
        step_size: float | str,
        eot: int = 1,
        loss: Literal["ce", "margin"] = "ce",
        select: Literal["best", "last"] = "last",
        random_start: bool = True,
        restarts: int = 1,
    ) -> None:
        super().__init__(norm, eps)
        for name, value in (("steps", steps), ("eot", eot), ("restarts", restarts)):
            if value < 1:
                raise InputError(f"{name} = {value}: use at least 1")
        self.steps, self.eot, self.restarts = steps, eot, restarts
        self.step_size = pixels("step_size", step_size)
        self.loss_name = loss
        self.loss = cross_entropy_loss if loss == "ce" else margin_loss
        self.select, self.random_start = select, random_start

    @property
    def title(self) -> str:
        """What reports call it."""
        start = "a random point" if self.random_start else "the image"
        restarts = f", {self.restarts} restarts" if self.restarts > 1 else ""
        return (
            f"PGD on the {self.loss_name} loss from {start}, step {self.step_size:.4g}, {self.select} iterate{restarts}"
        )

    def perturb(self, model: LogitsFunction, image: Tensor, label: Tensor, noise: Noise, chunk: int) -> Tensor:
        """See ``Attack``."""
        best, best_loss = image, torch.full((len(image),), -torch.inf, device=image.device)

        def keep(candidate: Tensor, loss: Tensor) -> None:
            nonlocal best, best_loss
            better = loss > best_loss
            best = torch.where(better.reshape(-1, 1, 1, 1), candidate, best)
            best_loss = torch.where(better, loss, best_loss)

        for restart in range(self.restarts):
            first = restart * (self.steps + 1) * self.eot
            runs = [list(range(first + k * self.eot, first + (k + 1) * self.eot)) for k in range(self.steps + 1)]
            adversarial = self._start(image, noise.runs([restart])) if self.random_start else image
            for k in range(self.steps):
                loss, gradient = gradient_in_chunks(model, self.loss, adversarial, label, noise, runs[k], chunk)
                if self.select == "best":
                    keep(adversarial, loss)
                adversarial = adversarial + self.step_size * steepest(gradient, self.norm)
                adversarial = project(adversarial, image, self.norm, self.eps)
            if self.select == "last" and self.restarts == 1:
                return adversarial
            logits = logits_in_chunks(model, adversarial, noise, runs[self.steps], chunk)
            by_draw = [self.loss(draw, label) for draw in logits.unbind(dim=1)]
            keep(adversarial, sum(by_draw[1:], by_draw[0]) / self.eot)
        return best

    def _start(self, image: Tensor, noise: Noise) -> Tensor:
        """A uniform point of the ball, moved into [0, 1]."""
        if self.norm == "linf":
            return project(image + self.eps * (2.0 * noise.uniform(START_STEP, image) - 1.0), image, "linf", self.eps)
        direction = noise.normal(START_STEP, image)
        # The radius takes another draw: the same key would tie it to the direction.
        radius = noise.uniform(START_STEP - 1, image[:, :1, :1, :1]) ** (1.0 / image[0].numel())
        direction = direction / l2_norm(direction).reshape(-1, 1, 1, 1)
        return project(image + self.eps * radius * direction, image, "l2", self.eps)
