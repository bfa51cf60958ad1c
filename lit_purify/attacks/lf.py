"""LF: per-pixel filters against the vote, under a perceptual threat model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

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
"""How far from 0 and 1 pixels are kept where they are shifted."""
_SLACK = 1e-5
"""Rounding allowed on top of the distance."""


class LF(Attack):
    """Low-frequency attack on the vote (Kassis et al., "DiffBreak", NeurIPS 2025; from its equations).

    The image is shifted, and filtered several times: x' = F_K(... F_1(s(s^-1(x) + delta))) with a sigmoid s. Every
    pixel has a kernel of its own in each filter, a softmax over its taps, equal for opposite taps. Taps count by how
    alike the colors of the original are, exp(-|x_p - x_q|_1^2 / (2 color^2)), and sum to 1 again: what is smoothed is
    one surface. Adam raises the margin averaged over ``eot`` draws, less ``penalty`` times the distance where it is
    ``eps`` or more; the gradient of each sample is cut to norm 1.

    Of the iterates whose distance is below ``eps``, the one with the most wrong draws counts, of equals the one with
    the highest averaged margin. So the threat model is perceptual: the Lp norms of the change are recorded, not bound.

    Args:
        distance: From the original: ``LPIPS`` as in the paper, or ``SSIM``, which needs no weights.
        eps: Distance that is allowed; the paper's is 0.05 of LPIPS.
        steps: Steps of Adam.
        eot: Copies, draws that each step averages over.
        kernels: Sides of the filters, odd numbers, in order.
        filter_rate: Step of Adam for the kernels.
        shift_rate: Step of Adam for the shift.
        color: Difference of colors that a filter reaches over, in pixels of [0, 1].
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
        # Any image of the range: the distance is what is bound.
        super().__init__("linf", 1.0)
        self.eps = pixels("eps", eps)
        check_counts(steps=steps, eot=eot)
        if any(side < 1 or side % 2 == 0 for side in kernels):
            raise InputError(f"kernels = {list(kernels)}: use odd numbers")
        if min(filter_rate, shift_rate, color, penalty) <= 0.0:
            raise InputError("filter_rate, shift_rate, color and penalty: use numbers above 0")
        self.distance, self.steps, self.eot, self.kernels = distance, steps, eot, list(kernels)
        self.filter_rate, self.shift_rate, self.color, self.penalty = filter_rate, shift_rate, color, penalty

    @property
    def threat(self) -> str:
        """The distance."""
        return self.distance.name

    @property
    def title(self) -> str:
        """What reports call it."""
        sides = ", ".join(map(str, self.kernels)) or "none"
        return f"LF on the margin loss, filters {sides}, the iterate within reach that most draws get wrong"

    @property
    def queries(self) -> Queries:
        """What it costs."""
        return Queries((self.steps + 1) * self.eot, self.steps * self.eot)

    def outside(self, adversarial: Tensor, image: Tensor, chunk: int) -> Tensor:
        """By the distance."""
        far = self._far(adversarial, image, chunk) > self.eps + _SLACK
        low, high = adversarial.flatten(1).amin(dim=1), adversarial.flatten(1).amax(dim=1)
        return far | ~((low >= 0.0) & (high <= 1.0))

    def perturb(self, model: AttackedFunction, image: Tensor, label: Tensor, noise: Noise, chunk: int) -> Tensor:
        """See ``Attack``."""
        if image.ndim != 4:
            raise InputError("LF filters images: attack rows of tables with PGD or CAPGD")
        self.distance.check(image)
        taps = [side * side // 2 + 1 for side in self.kernels]
        shapes = [(count, *image.shape[2:]) for count in taps]
        filters = [image.new_zeros(len(image), *shape).requires_grad_() for shape in shapes]
        with torch.no_grad():
            for kernel, side in zip(filters, self.kernels, strict=True):
                # The last tap of a half is the center.
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
            seen = draws_in_chunks(model, margin_loss, point, label, noise, runs, chunk)
            best.offer(point, torch.where(near, success(seen.logits, label), -torch.inf))
            gradients = self._gradients(values, image, average(seen.gradient), chunk)
            length = torch.stack([l2_norm(gradient) for gradient in gradients]).square().sum(dim=0).sqrt()
            for value, gradient in zip(values, gradients, strict=True):
                value.grad = -gradient / each(length.clamp(min=1.0), gradient)
            adam.step()
        return best.image

    def _made(self, values: Sequence[Tensor], image: Tensor, chunk: int) -> Tensor:
        """The images (B, C, H, W) that kernels and shift make."""
        with torch.no_grad():
            parts = [
                self._filtered([value[rows] for value in values], image[rows])[:real]
                for rows, real in chunks(len(image), chunk, image.device)
            ]
        return torch.cat(parts)

    def _gradients(self, values: Sequence[Tensor], image: Tensor, direction: Tensor, chunk: int) -> list[Tensor]:
        """Of <direction, x'> less the penalty, in kernels and shift."""
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
        """Distances (B,)."""
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
    """Each pixel's neighbors, row by row, (B, side^2, C, H, W); ``fill`` beyond the border."""
    height, width = image.shape[2:]
    padded = pad(image, [side // 2] * 4, value=fill)
    places = [(down, right) for down in range(side) for right in range(side)]
    return torch.stack([padded[:, :, d : d + height, r : r + width] for d, r in places], dim=1)
