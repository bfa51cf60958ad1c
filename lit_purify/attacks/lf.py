"""LF: per-pixel filters against the majority vote, under a perceptual threat model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from lit_purify.attacks.base import Attack, Best, Queries, check_counts, draws
from lit_purify.attacks.perceptual import Distance
from lit_purify.errors import InputError
from lit_purify.functional.chunks import AttackedFunction, average, chunks, draws_in_chunks, logits_in_chunks
from lit_purify.functional.images import each
from lit_purify.functional.losses import margin_loss, success
from lit_purify.functional.noise import Noise
from lit_purify.functional.threat import l2_norm, pixels

_CENTER = 0.99
"""Weight of a pixel itself before the first step."""
_INSIDE = 1e-6
"""Distance that shifted pixels keep from 0 and 1."""
_SLACK = 1e-5
"""Rounding allowed beyond the distance."""


class LF(Attack):
    """Low-frequency attack on the vote (Kassis et al., "DiffBreak", NeurIPS 2025; from its equations).

    The image is shifted and filtered several times: x' = F_K(... F_1(s(s^-1(x) + delta))) with a sigmoid s. Every pixel
    has its own kernel in each filter, a softmax over its taps, equal for opposite taps. Taps are weighted by the
    similarity of the original's colors, exp(-|x_p - x_q|_1^2 / (2 color^2)), and normalized to sum 1, so that filters
    smooth within one surface. Adam maximizes the margin averaged over ``eot`` draws, minus ``penalty`` times the
    distance where it is at least ``eps``; the gradient of each sample is clipped to norm 1.

    The result is the iterate with a distance below ``eps`` that has the most wrong draws, with ties decided by the
    averaged margin. The threat model is perceptual: Lp norms of the change are recorded but not bounded.

    Args:
        distance: Distance from the original: ``LPIPS`` as in the paper, or ``SSIM``, which needs no weights.
        eps: Largest distance; 0.05 of LPIPS in the paper.
        steps: Steps of Adam.
        eot: Noise draws averaged in each step.
        kernels: Side lengths of the filters (odd numbers), in order.
        filter_rate: Adam's learning rate for the kernels.
        shift_rate: Adam's learning rate for the shift.
        color: Color difference that a filter crosses, in pixels of [0, 1].
        penalty: Weight of the distance.
    """

    scalable = frozenset({"steps", "eot", "eps"})

    def __init__(
        self,
        distance: Distance,
        eps: float | str = 0.05,
        steps: int = 100,
        eot: int = 8,
        kernels: Sequence[int] = (5, 7, 5, 3),
        filter_rate: float = 0.05,
        shift_rate: float = 0.008,
        color: float = 0.05,
        penalty: float = 100.0,
    ) -> None:
        # The distance bounds the change, so any image in the range is allowed.
        super().__init__("linf", 1.0)
        self.eps = pixels("eps", eps)
        check_counts(steps=steps, eot=eot)
        if any(side < 1 or side % 2 == 0 for side in kernels):
            raise InputError(f"kernels = {list(kernels)}: use odd numbers")
        if not all(value > 0.0 for value in (filter_rate, shift_rate, color, penalty)):
            raise InputError("filter_rate, shift_rate, color and penalty: use numbers above 0")
        if not isinstance(distance, Distance):
            raise InputError(f"distance = {distance!r}: use a distance such as SSIM()")
        self.distance, self.steps, self.eot, self.kernels = distance, steps, eot, list(kernels)
        self.filter_rate, self.shift_rate, self.color, self.penalty = filter_rate, shift_rate, color, penalty

    @property
    @override
    def threat(self) -> str:
        return self.distance.name

    @property
    @override
    def title(self) -> str:
        sides = ", ".join(map(str, self.kernels)) or "none"
        return f"LF on the margin loss, filters {sides}, the iterate within reach that most draws get wrong"

    @property
    @override
    def queries(self) -> Queries:
        return Queries((self.steps + 1) * self.eot, self.steps * self.eot)

    @override
    def outside(self, adversarial: Tensor, image: Tensor, chunk: int) -> Tensor:
        near = self._far(adversarial, image, chunk) <= self.eps + _SLACK
        low, high = adversarial.flatten(1).amin(dim=1), adversarial.flatten(1).amax(dim=1)
        return ~(near & (low >= 0.0) & (high <= 1.0))

    @override
    def perturb(self, model: AttackedFunction, image: Tensor, label: Tensor, noise: Noise, chunk: int) -> Tensor:
        if image.ndim != 4:
            raise InputError("LF filters images: attack table rows with PGD or CAPGD")
        self.distance.check(image)
        taps = [side * side // 2 + 1 for side in self.kernels]
        shapes = [(count, *image.shape[2:]) for count in taps]
        filters = [image.new_zeros(len(image), *shape).requires_grad_() for shape in shapes]
        with torch.no_grad():
            for kernel, side in zip(filters, self.kernels, strict=True):
                # The last tap of a half kernel is the center.
                kernel[:, -1] = math.log(_CENTER / (1.0 - _CENTER) * max(1, side * side - 1))
        shift = torch.zeros_like(image).requires_grad_()
        values = [*filters, shift]
        groups = [{"params": filters, "lr": self.filter_rate}, {"params": [shift], "lr": self.shift_rate}]
        adam = torch.optim.Adam([group for group in groups if group["params"]])
        best = Best(image)
        for k in range(self.steps + 1):
            runs, point = draws(k * self.eot, self.eot), self._made(values, image, chunk)
            near = self._far(point, image, chunk) < self.eps
            if k == self.steps:
                logits = logits_in_chunks(model, point, noise, runs, chunk)
                best.offer(point, torch.where(near, success(logits, label), -torch.inf))
                break
            drawn = draws_in_chunks(model, margin_loss, point, label, noise, runs, chunk)
            best.offer(point, torch.where(near, success(drawn.logits, label), -torch.inf))
            gradients = self._gradients(values, image, average(drawn.gradient), chunk)
            length = torch.stack([l2_norm(gradient) for gradient in gradients]).square().sum(dim=0).sqrt()
            for value, gradient in zip(values, gradients, strict=True):
                value.grad = -gradient / each(length.clamp(min=1.0), gradient)
            adam.step()
        return best.image

    def _made(self, values: Sequence[Tensor], image: Tensor, chunk: int) -> Tensor:
        """Returns the images (B, C, H, W) for given kernels and shift."""
        with torch.no_grad():
            parts = [
                self._filtered([value[rows] for value in values], image[rows])[:real]
                for rows, real in chunks(len(image), chunk, image.device)
            ]
        return torch.cat(parts)

    def _gradients(self, values: Sequence[Tensor], image: Tensor, direction: Tensor, chunk: int) -> list[Tensor]:
        """Returns the gradient of <direction, x'> minus the penalty, in kernels and shift."""
        parts = []
        for rows, real in chunks(len(image), chunk, image.device):
            with torch.enable_grad():
                own = [value[rows].detach().requires_grad_() for value in values]
                point = self._filtered(own, image[rows])
                far = self.distance(point, image[rows])
                gain = (point * direction[rows]).flatten(1).sum(dim=1)
                total = (gain - self.penalty * torch.where(far >= self.eps, far, 0.0)).sum()
                parts.append([gradient[:real] for gradient in torch.autograd.grad(total, own)])
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    def _far(self, point: Tensor, image: Tensor, chunk: int) -> Tensor:
        """Returns distances (B,)."""
        with torch.no_grad():
            rows = chunks(len(image), chunk, image.device)
            return torch.cat([self.distance(point[which], image[which])[:real] for which, real in rows])

    def _filtered(self, values: Sequence[Tensor], image: Tensor) -> Tensor:
        *filters, shift = values
        # 2x - 1 = tanh(z / 2) where x = sigmoid(z).
        point = torch.sigmoid(torch.logit(image, eps=_INSIDE) + 2.0 * shift)
        for kernel, side in zip(filters, self.kernels, strict=True):
            around = partial(_neighbors, side=side)
            unlike = (around(image, fill=math.inf) - image[:, None]).abs().sum(dim=2)
            weight = torch.cat([kernel, kernel[:, :-1].flip(1)], dim=1).softmax(dim=1)
            weight = weight * torch.exp(-unlike.square() / (2.0 * self.color**2))
            weight = weight / weight.sum(dim=1, keepdim=True)
            point = (weight[:, :, None] * around(point, fill=0.0)).sum(dim=1)
        return point.clamp(0.0, 1.0)


def _neighbors(image: Tensor, side: int, fill: float) -> Tensor:
    """Returns each pixel's neighbors, row by row, (B, side^2, C, H, W), with ``fill`` beyond the border."""
    height, width = image.shape[2:]
    padded = pad(image, [side // 2] * 4, value=fill)
    places = [(down, right) for down in range(side) for right in range(side)]
    return torch.stack([padded[:, :, d : d + height, r : r + width] for d, r in places], dim=1)
