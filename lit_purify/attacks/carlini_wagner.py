"""The attack of Carlini and Wagner: the smallest misclassified perturbation."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lit_purify.attacks.base import Attack, Best, Queries, check_counts, draws, rowwise
from lit_purify.errors import InputError
from lit_purify.functional.chunks import AttackedFunction, gradient_in_chunks, logits_in_chunks
from lit_purify.functional.images import each
from lit_purify.functional.losses import margin_loss, mean_margin
from lit_purify.functional.noise import Noise
from lit_purify.functional.threat import l2_norm, pixels

_DECAY, _SQUARED_DECAY, _TINY = 0.9, 0.999, 1e-8


class CarliniWagnerL2(Attack):
    """Untargeted L2 attack of Carlini & Wagner, "Towards evaluating the robustness of neural networks" (S&P 2017).

    Adam minimizes |delta|^2 + c max(confidence - margin, 0), with the margin averaged over ``eot`` draws. The constant
    c is searched for each sample: multiplied by ten until a search succeeds, then bisected between failure and success.
    Images are clipped to [0, 1] after each step, one of the paper's three ways (section V.B).

    The result is the nearest iterate whose averaged margin exceeds the confidence or, without one, the iterate with the
    highest margin. It is projected on the ball of radius ``eps``. A nearest point lies on the border of its class, so a
    randomized model needs a confidence above 0.

    Args:
        eps: L2 radius, in pixels of [0, 1].
        steps: Steps of each search.
        searches: Number of values of c.
        step_size: Adam's learning rate, in pixels of [0, 1].
        c: The first constant.
        confidence: Required averaged margin, in units of logits.
        eot: Noise draws averaged in each step.
    """

    scalable = frozenset({"steps", "eot", "eps"})
    step_size: float

    def __init__(
        self,
        eps: float | str = 0.5,
        steps: int = 100,
        searches: int = 6,
        step_size: float | str = 0.01,
        c: float = 0.1,
        confidence: float = 0.0,
        eot: int = 1,
    ) -> None:
        super().__init__("l2", eps)
        check_counts(steps=steps, searches=searches, eot=eot)
        if c <= 0.0 or confidence < 0.0:
            raise InputError(f"c = {c}, confidence = {confidence}: use c above 0 and a confidence of at least 0")
        self.steps, self.searches, self.eot = steps, searches, eot
        self.step_size, self.c, self.confidence = pixels("step_size", step_size), c, confidence

    @property
    @override
    def title(self) -> str:
        return f"Carlini-Wagner L2, {self.searches} searches, confidence {self.confidence:g}, nearest success"

    @property
    @override
    def queries(self) -> Queries:
        backward = self.searches * self.steps * self.eot
        return Queries(backward + self.searches * self.eot, backward)

    @override
    def perturb(self, model: AttackedFunction, image: Tensor, label: Tensor, noise: Noise, chunk: int) -> Tensor:
        nearest, highest = Best(image), Best(image)
        c = torch.full((len(image),), self.c, device=image.device)
        low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
        for search in range(self.searches):
            found = torch.zeros_like(c, dtype=torch.bool)
            delta, mean, square = (torch.zeros_like(image) for _ in range(3))
            for k in range(self.steps + 1):
                runs, point = draws((search * (self.steps + 1) + k) * self.eot, self.eot), image + delta
                if k < self.steps:
                    loss, gradient = gradient_in_chunks(model, margin_loss, point, label, noise, runs, chunk)
                else:
                    loss = mean_margin(logits_in_chunks(model, point, noise, runs, chunk), label)
                success = loss > self.confidence
                found |= success
                nearest.offer(point, torch.where(success, -l2_norm(delta), -torch.inf))
                highest.offer(point, loss)
                if k < self.steps:
                    pull = each(c, image) * rowwise(loss <= self.confidence, gradient, torch.zeros_like(gradient))
                    downhill = 2.0 * delta - pull
                    mean = _DECAY * mean + (1.0 - _DECAY) * downhill
                    square = _SQUARED_DECAY * square + (1.0 - _SQUARED_DECAY) * downhill * downhill
                    unbiased = mean / (1.0 - _DECAY ** (k + 1))
                    scale = (square / (1.0 - _SQUARED_DECAY ** (k + 1))).sqrt() + _TINY
                    delta = (point - self.step_size * unbiased / scale).clamp(0.0, 1.0) - image
            low, high = torch.where(found, low, c), torch.where(found, c, high)
            c = torch.where(high.isinf(), 10.0 * c, (low + high) / 2.0)
        point = rowwise(nearest.score > -torch.inf, nearest.image, highest.image)
        return self.inside(point, image)
