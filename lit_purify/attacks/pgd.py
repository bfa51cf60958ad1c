"""Projected gradient descent with expectation over transformation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

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
from lit_purify.functional.noise import CHOICE_STEP, START_STEP, Noise
from lit_purify.functional.threat import Norm, l2_norm, pixels, steepest

Aggregate = Literal["mean", "worst", "vote"]


class PGD(Attack):
    """PGD (Madry et al., ICLR 2018) on the loss averaged over ``eot`` draws of noise (Athalye et al., ICML 2018).

    Every step uses new draws. Linf steps follow the sign of the gradient, L2 steps the gradient normalized per sample.
    All steps are taken, even if a sample is already misclassified.

    Where draws disagree, their average gradient may help with none of them. With p the softmax probability of the label
    under a draw, ``aggregate`` weights the draws of a sample at each step by

    - ``mean``: 1.
    - ``worst``: 1 - p, which emphasizes wrong draws; the idea of DiffHammer (Wang et al., NeurIPS 2024). It aims at one
      wrong run among N.
    - ``vote``: p, which emphasizes draws that still vote for the label; with ``ce`` this is the exact gradient of
      -log of the mean of p over draws, the loss of the averaged vote. It aims at most of N runs.

    A mask is a threshold without a useful gradient, so gradients do not show what moving the noise to other pixels
    would gain. ``shift_steps`` therefore first minimize the overlap sum(m(x') m(x)) / sum(m(x)) of the relaxed mask m
    of the attacked image with that of the original, in the same ball; the steps on the loss continue from there.
    Without a mask that the image can move, they do nothing.

    Args:
        norm: ``linf`` or ``l2``.
        eps: Radius, in pixels of [0, 1]; a number or a fraction such as ``8/255``.
        steps: Gradient steps.
        step_size: Length of a step, in pixels of [0, 1]; a number or a fraction; ``None`` is 2.5 ``eps`` / ``steps``.
        eot: Noise draws averaged in each gradient.
        loss: ``ce`` is cross entropy, ``margin`` the largest wrong logit minus the right one, ``dlr`` the margin over
            the gap between the first and the third logit.
        select: ``best`` returns the iterate with the highest averaged loss, ``last`` the last one. If ``aggregate`` is
            not ``mean``, the odds of the mean of 1 - p replace the averaged loss.
        random_start: Start at a uniform point of the ball instead of at the image.
        restarts: Number of starts; the result with the highest averaged loss is returned.
        aggregate: Weights of the draws of a sample: ``mean``, ``worst`` or ``vote``.
        sign: L2 steps follow the sign of the gradient too, with ``step_size`` per pixel, as in the released code of Lee
            & Kim (2023) and of Pei et al. (2025). Such a step is not the steepest.
        shift_steps: Steps on the mask. Each costs a gradient of the classifier's features and no denoiser call.
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
            raise InputError(f"shift_steps = {shift_steps}: use 0 or more steps to move the mask")
        if aggregate != "mean" and eot == 1:
            raise InputError(f"aggregate = {aggregate!r} with eot = 1 has nothing to weight: use eot of 2 or more")
        self.steps, self.eot, self.restarts = steps, eot, restarts
        self.step_size = 2.5 * self.eps / steps if step_size is None else pixels("step_size", step_size)
        if steps * self.step_size < 0.999 * self.eps:
            notice(f"{steps} steps of {self.step_size:.3g} cannot cross eps = {self.eps:.3g}: set more or longer steps")
        self.loss = loss
        self.select, self.random_start, self.aggregate = select, random_start, aggregate
        self.step_norm: Norm = "linf" if sign else norm
        self.shift_steps = shift_steps

    @property
    @override
    def title(self) -> str:
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
    @override
    def queries(self) -> Queries:
        backward = self.steps * self.eot * self.restarts
        return Queries(backward if self._returns_last else backward + self.eot * self.restarts, backward)

    @property
    def _returns_last(self) -> bool:
        return self.select == "last" and self.restarts == 1

    @override
    def perturb(self, model: AttackedFunction, image: Tensor, label: Tensor, noise: Noise, chunk: int) -> Tensor:
        best, loss_function = Best(image), named_loss(self.loss)
        for restart in range(self.restarts):
            first = restart * (self.steps + 1) * self.eot
            runs = [draws(first + k * self.eot, self.eot) for k in range(self.steps + 1)]
            adversarial = self._begin(model, image, noise.runs([restart]), chunk)
            followed = torch.zeros_like(image)
            for k in range(self.steps):
                shown, back = self.shown(adversarial, image)
                drawn, gradient = self._observe(model, loss_function, shown, label, noise, runs[k], chunk)
                if self.select == "best":
                    best.offer(shown, self._score(drawn.logits, drawn.loss, label))
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
        """Returns the draws of a step at a point, and the gradient there."""
        drawn = draws_in_chunks(model, loss, point, label, noise, runs, chunk)
        return drawn, self._gradient(drawn, label)

    def _followed(self, gradient: Tensor, before: Tensor, k: int) -> Tensor:
        """Returns the direction of step k, given the gradient and the previous direction."""
        return gradient

    def _gradient(self, drawn: Draws, label: Tensor) -> Tensor:
        if self.aggregate == "mean":
            return average(drawn.gradient)
        wrong, right = log_probabilities(drawn.logits, label)
        weights = (wrong if self.aggregate == "worst" else right).softmax(dim=1).to(drawn.gradient.dtype)
        return average(weights.reshape(*weights.shape, *[1] * (drawn.gradient.ndim - 2)) * drawn.gradient)

    def _score(self, logits: Tensor, loss: Tensor, label: Tensor) -> Tensor:
        if self.aggregate == "mean":
            return average(loss)
        wrong, right = log_probabilities(logits, label)
        return (wrong.logsumexp(dim=1) - right.logsumexp(dim=1)).to(loss.dtype)

    def _begin(self, model: AttackedFunction, image: Tensor, noise: Noise, chunk: int) -> Tensor:
        """Returns the first iterate, after the steps that move the mask."""
        point, relaxed = self._start(image, noise) if self.random_start else image, model.relaxed
        if relaxed is None or not self.shift_steps:
            return point

        def moved(mask: Tensor, original: Tensor) -> Tensor:
            return -(mask * original).sum(dim=1) / original.sum(dim=1).clamp(min=1.0)

        overlap = AttackedFunction(lambda image, noise: relaxed(image, noise).flatten(1))
        original = logits_in_chunks(overlap, image, noise, [0], chunk)[:, 0]
        for _ in range(self.shift_steps):
            _, gradient = gradient_in_chunks(overlap, moved, point, original, noise, [0], chunk)
            point = self.inside(point + self.step_size * steepest(gradient, self.norm), image)
        return point

    def _start(self, image: Tensor, noise: Noise) -> Tensor:
        """Returns a uniform point of the ball, clipped to [0, 1]."""
        if self.norm == "linf":
            return self.inside(image + self.eps * (2.0 * noise.uniform(START_STEP, image) - 1.0), image)
        direction = noise.normal(START_STEP, image)
        # The radius needs another step number: the same key would correlate it with the direction.
        radius = noise.uniform(CHOICE_STEP, image.flatten(1)[:, 0]) ** (1.0 / image[0].numel())
        direction = direction / each(l2_norm(direction), image)
        return self.inside(image + self.eps * each(radius, image) * direction, image)
