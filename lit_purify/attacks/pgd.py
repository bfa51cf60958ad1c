"""Projected gradient descent with expectation over transformation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_purify.attacks.base import Attack, Best, Queries, check_counts, draws
from lit_purify.errors import InputError, notice
from lit_purify.functional.chunks import (
    AttackedFunction,
    Draws,
    LossFunction,
    average,
    draws_in_chunks,
    gradient_in_chunks,
    logits_in_chunks,
)
from lit_purify.functional.images import each
from lit_purify.functional.losses import LossName, log_probabilities, named_loss
from lit_purify.functional.noise import START_STEP, Noise
from lit_purify.functional.threat import Norm, l2_norm, pixels, steepest

Aggregate = Literal["mean", "worst", "vote"]


class PGD(Attack):
    """PGD (Madry et al., ICLR 2018) on the loss averaged over ``eot`` draws of noise (Athalye et al., ICML 2018).

    Every step uses fresh draws. Linf steps follow the sign of the gradient, L2 steps the gradient normalized for each
    sample. It runs all its steps, whether or not a sample is broken on the way.

    Where draws disagree, the average gradient of all of them may serve none. With p the softmax probability of the
    label under a draw, ``aggregate`` weights the draws of a sample at each step by

    - ``mean``: 1, as above.
    - ``worst``: 1 - p, the draws that are wrong or nearly so; the idea of DiffHammer (Wang et al., NeurIPS 2024): find
      the purifications that share a vulnerability, then follow their gradients alone. For one wrong run among N.
    - ``vote``: p, the draws that still vote for the label; with ``ce`` this is exactly the gradient of -log of the mean
      of p over draws, the loss of the averaged vote. For most of N runs wrong.

    A mask is a threshold, through which no gradient leads: an attack that follows gradients alone never finds out what
    is gained where the noise falls on other pixels. So ``shift_steps`` first lower the overlap sum(m(x') m(x)) /
    sum(m(x)) of the relaxed mask m of the attacked image with that of the original one, in the same ball; the steps on
    the loss go on from there. Where there is no mask that an image can move, they do nothing.

    Args:
        norm: ``linf`` or ``l2``.
        eps: Radius, in pixels of [0, 1]; a number or a fraction such as ``8/255``.
        steps: Gradient steps.
        step_size: Length of a step, in pixels of [0, 1]; a number or a fraction; ``None`` is 2.5 ``eps`` / ``steps``.
        eot: Draws that each gradient averages over.
        loss: ``ce`` is cross entropy, ``margin`` the largest wrong logit minus the right one, ``dlr`` the margin over
            the gap between the first and the third logit.
        select: ``best`` returns the iterate with the highest averaged loss seen, ``last`` the last one. With another
            ``aggregate`` than ``mean``, the odds of the mean of 1 - p take the place of the averaged loss.
        random_start: Start at a uniform point of the ball instead of at the image.
        restarts: How often to start; the restart whose result has the highest averaged loss counts.
        aggregate: What the draws of a sample count: ``mean``, ``worst`` or ``vote``.
        sign: L2 steps follow the sign of the gradient too, ``step_size`` for each pixel, as in the released code of Lee
            & Kim (2023) and of Pei et al. (2025). Such a step is not the steepest.
        shift_steps: Steps on the mask. Each costs a gradient of the classifier's features, and no network call.
    """

    scalable = frozenset({"steps", "eot", "restarts", "loss", "aggregate", "eps"})
    step_size: float
    loss: LossName

    def __init__(
        self,
        norm: Norm = "linf",
        eps: float | str = "8/255",
        steps: int = 20,
        step_size: float | str | None = None,
        eot: int = 1,
        loss: LossName = "margin",
        select: Literal["best", "last"] = "last",
        random_start: bool = True,
        restarts: int = 1,
        aggregate: Aggregate = "mean",
        sign: bool = False,
        shift_steps: int = 0,
    ) -> None:
        super().__init__(norm, eps)
        check_counts(steps=steps, eot=eot, restarts=restarts)
        if shift_steps < 0:
            raise InputError(f"shift_steps = {shift_steps}: use 0 for none, or how many move the mask")
        if aggregate != "mean" and eot == 1:
            raise InputError(f"aggregate = {aggregate!r} weights the draws of a sample: use eot of 2 or more")
        self.steps, self.eot, self.restarts = steps, eot, restarts
        self.step_size = 2.5 * self.eps / steps if step_size is None else pixels("step_size", step_size)
        if steps * self.step_size < 0.999 * self.eps:
            notice(f"{steps} steps of {self.step_size:.3g} cannot cross eps = {self.eps:.3g}: set more or longer steps")
        self.loss = loss
        self.select, self.random_start, self.aggregate = select, random_start, aggregate
        self.step_norm: Norm = "linf" if sign else norm
        self.shift_steps = shift_steps

    @property
    def title(self) -> str:
        """What reports call it."""
        start = "a random point" if self.random_start else "the image"
        restarts = f", {self.restarts} restarts" if self.restarts > 1 else ""
        weights = {"mean": "", "worst": ", draws weighted by success", "vote": ", draws weighted by failure"}
        signs = ", signs as steps" if self.step_norm != self.norm else ""
        shift = f", after {self.shift_steps} steps that move the mask" if self.shift_steps else ""
        return (
            f"PGD on the {self.loss} loss from {start}, step {self.step_size:.4g}{signs}, {self.select} "
            f"iterate{restarts}{weights[self.aggregate]}{shift}"
        )

    @property
    def queries(self) -> Queries:
        """What it costs."""
        backward = self.steps * self.eot * self.restarts
        return Queries(backward if self._returns_last else backward + self.eot * self.restarts, backward)

    @property
    def _returns_last(self) -> bool:
        return self.select == "last" and self.restarts == 1

    def perturb(self, model: AttackedFunction, image: Tensor, label: Tensor, noise: Noise, chunk: int) -> Tensor:
        """See ``Attack``."""
        best, loss_function = Best(image), named_loss(self.loss)
        for restart in range(self.restarts):
            first = restart * (self.steps + 1) * self.eot
            runs = [draws(first + k * self.eot, self.eot) for k in range(self.steps + 1)]
            adversarial = self._begin(model, image, noise.runs([restart]), chunk)
            followed = torch.zeros_like(image)
            for k in range(self.steps):
                shown, back = self.shown(adversarial, image)
                seen, gradient = self._look(model, loss_function, shown, label, noise, runs[k], chunk)
                if self.select == "best":
                    best.offer(shown, self._score(seen.logits, seen.loss, label))
                followed = self._followed(back(gradient), followed, k)
                adversarial = adversarial + self.step_size * steepest(followed, self.step_norm)
                adversarial = self.inside(adversarial, image)
            adversarial, _ = self.shown(adversarial, image)
            if self._returns_last:
                return adversarial
            logits = logits_in_chunks(model, adversarial, noise, runs[self.steps], chunk)
            loss = torch.stack([loss_function(draw, label) for draw in logits.unbind(dim=1)], dim=1)
            best.offer(adversarial, self._score(logits, loss, label))
        return best.image

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
        """What the draws of a step show at a point, and the gradient there."""
        seen = draws_in_chunks(model, loss, point, label, noise, runs, chunk)
        return seen, self._gradient(seen, label)

    def _followed(self, gradient: Tensor, before: Tensor, k: int) -> Tensor:
        """What step k follows, given the gradient, and what the step before has followed."""
        return gradient

    def _gradient(self, seen: Draws, label: Tensor) -> Tensor:
        if self.aggregate == "mean":
            return average(seen.gradient)
        wrong, right = log_probabilities(seen.logits, label)
        weights = (wrong if self.aggregate == "worst" else right).softmax(dim=1).to(seen.gradient.dtype)
        return average(weights.reshape(*weights.shape, *[1] * (seen.gradient.ndim - 2)) * seen.gradient)

    def _score(self, logits: Tensor, loss: Tensor, label: Tensor) -> Tensor:
        if self.aggregate == "mean":
            return average(loss)
        wrong, right = log_probabilities(logits, label)
        return (wrong.logsumexp(dim=1) - right.logsumexp(dim=1)).to(loss.dtype)

    def _begin(self, model: AttackedFunction, image: Tensor, noise: Noise, chunk: int) -> Tensor:
        """The first iterate, with the mask moved off that of the image."""
        point, relaxed = self._start(image, noise) if self.random_start else image, model.relaxed
        if relaxed is None or not self.shift_steps:
            return point

        def moved(mask: Tensor, original: Tensor) -> Tensor:
            return -(mask * original).sum(dim=1) / original.sum(dim=1).clamp(min=1.0)

        look = AttackedFunction(lambda image, noise: relaxed(image, noise).flatten(1))
        original = logits_in_chunks(look, image, noise, [0], chunk)[:, 0]
        for _ in range(self.shift_steps):
            _, gradient = gradient_in_chunks(look, moved, point, original, noise, [0], chunk)
            point = self.inside(point + self.step_size * steepest(gradient, self.norm), image)
        return point

    def _start(self, image: Tensor, noise: Noise) -> Tensor:
        """A uniform point of the ball, moved into [0, 1]."""
        if self.norm == "linf":
            return self.inside(image + self.eps * (2.0 * noise.uniform(START_STEP, image) - 1.0), image)
        direction = noise.normal(START_STEP, image)
        # The radius takes another draw: the same key would tie it to the direction.
        radius = noise.uniform(START_STEP - 1, image.flatten(1)[:, 0]) ** (1.0 / image[0].numel())
        direction = direction / each(l2_norm(direction), image)
        return self.inside(image + self.eps * each(radius, image) * direction, image)
