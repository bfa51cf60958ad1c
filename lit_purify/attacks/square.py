"""Square attack: random search without gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from lit_purify.attacks.base import Attack, Best, Queries, check_counts, draws
from lit_purify.errors import InputError
from lit_purify.functional.chunks import AttackedFunction, logits_in_chunks
from lit_purify.functional.images import places
from lit_purify.functional.losses import mean_margin
from lit_purify.functional.noise import CHOICE_STEP, START_STEP, Noise
from lit_purify.functional.threat import Norm, l2_norm, project

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Steps, of 10,000, after which the changed fraction of the image is halved."""
_TINY = 1e-12


class Square(Attack):
    """Square attack (Andriushchenko et al., ECCV 2020, arXiv 1912.00049) on the margin averaged over ``eot`` draws.

    A proposal changes one random square per sample and is kept if the averaged margin increases. The square's area is a
    fraction of the image that begins at ``p`` and is halved on a schedule, scaled to ``steps``. All steps are taken,
    even if a sample is already misclassified. For table rows (Linf only) a proposal changes as many random features.

    Args:
        norm: ``linf`` or ``l2``.
        eps: Radius, in pixels of [0, 1]; a number or a fraction such as ``8/255``.
        steps: Proposals after the initial pattern on the whole image (AutoAttack: 5000).
        eot: Noise draws that judge each proposal.
        p: Fraction of the image that the first squares change.
        paired: Compare proposal and current point on the same new draws, at twice the cost. ``False`` compares with the
            current point's earlier average. For a randomized model this average is partly luck and soon blocks all
            proposals; for a deterministic one it makes no difference.
    """

    gradient = "none"
    scalable = frozenset({"steps", "eot", "eps"})

    def __init__(
        self,
        norm: Norm = "linf",
        eps: float | str = "8/255",
        steps: int = 5000,
        eot: int = 1,
        p: float = 0.8,
        paired: bool = True,
    ) -> None:
        super().__init__(norm, eps)
        check_counts(steps=steps, eot=eot)
        if not 0.0 < p <= 1.0:
            raise InputError(f"p = {p}: use a fraction of the image, above 0 and at most 1")
        self.steps, self.eot, self.p, self.paired = steps, eot, p, paired

    @property
    @override
    def title(self) -> str:
        return f"Square attack on the margin loss, p = {self.p:g}{'' if self.paired else ', unpaired draws'}"

    @property
    @override
    def queries(self) -> Queries:
        return Queries((1 + self.steps * (2 if self.paired else 1)) * self.eot, 0)

    @override
    def perturb(self, model: AttackedFunction, image: Tensor, label: Tensor, noise: Noise, chunk: int) -> Tensor:
        if image.ndim == 2 and self.norm != "linf":
            raise InputError("norm: Square cannot attack table rows in l2: use norm: linf")
        linf = (self._stripes, self._propose_linf) if image.ndim == 4 else (self._signs, self._propose_features)
        start, propose = linf if self.norm == "linf" else (self._tiles, self._propose_l2)

        def margin(point: Tensor, k: int) -> Tensor:
            return mean_margin(logits_in_chunks(model, point, noise, draws(k * self.eot, self.eot), chunk), label)

        proposal, _ = self.shown(start(image, noise.runs([0])), image)
        best = Best(proposal, margin(proposal, 0))
        for k in range(1, self.steps + 1):
            if self.paired:
                best.score = margin(best.image, k)
            proposal = propose(best.image, image, noise.runs([k]), self._area(k - 1, image))
            proposal, _ = self.shown(proposal, image)
            best.offer(proposal, margin(proposal, k))
        return best.image

    def _area(self, k: int, image: Tensor) -> float:
        """Returns the number of pixels of the square after k proposals."""
        halvings = sum(int(k / self.steps * 10000) > step for step in _HALVINGS)
        return self.p / 2**halvings * places(image)[0].numel()

    def _stripes(self, image: Tensor, noise: Noise) -> Tensor:
        """Returns vertical stripes one pixel wide, with each channel at + eps or - eps."""
        return (image + self.eps * _sign(noise.uniform(START_STEP, image[:, :, :1]))).clamp(0.0, 1.0)

    def _propose_linf(self, current: Tensor, image: Tensor, noise: Noise, area: float) -> Tensor:
        """Proposes a square in which each channel is at + eps or - eps."""
        height, width = image.shape[2:]
        side = min(max(round(math.sqrt(area)), 1), height, width)
        uniform = noise.uniform(START_STEP, _room(image, 2 + image.shape[1]))
        _, _, inside = _window(uniform[:, :2], side, image)
        change = torch.where(inside, 2.0 * self.eps * _sign(uniform[:, 2:, None, None]), 0.0)
        return project(current + change, image, "linf", self.eps)

    def _signs(self, image: Tensor, noise: Noise) -> Tensor:
        """Returns rows (B, F) with each feature at + eps or - eps."""
        return self.inside(image + self.eps * _sign(noise.uniform(START_STEP, image)), image)

    def _propose_features(self, current: Tensor, image: Tensor, noise: Noise, area: float) -> Tensor:
        """Proposes + eps or - eps for random features, ``area`` of them on average."""
        chosen = noise.uniform(CHOICE_STEP, image) * image.shape[1] < max(area, 1.0)
        return torch.where(chosen, self._signs(image, noise), current)

    def _tiles(self, image: Tensor, noise: Noise) -> Tensor:
        """Returns tiles of two pyramids each, on a grid of five by five (more on very small images)."""
        batch, channels, height, width = image.shape
        side = max(min(height, width) // 5, 1)
        rows, columns = height // side, width // side
        uniform = noise.uniform(START_STEP, image[:, :1].expand(-1, channels + 1, -1, -1)[:, :, :rows, :columns])
        pyramids = _pyramids(side).to(image)
        turned = (uniform[:, :1] < 0.5)[:, :, :, None, :, None]
        tile = torch.where(turned, pyramids.T[:, None, :], pyramids[:, None, :])
        tiles = (_sign(uniform[:, 1:])[:, :, :, None, :, None] * tile).reshape(batch, channels, rows * side, -1)
        delta = torch.zeros_like(image)
        top, left = (height - rows * side) // 2, (width - columns * side) // 2
        delta[:, :, top : top + rows * side, left : left + columns * side] = tiles
        return self._onto_the_sphere(image, delta)

    def _propose_l2(self, current: Tensor, image: Tensor, noise: Noise, area: float) -> Tensor:
        """Moves the perturbation of a second window, and the unused eps, to pyramids in a first (algorithm 3)."""
        channels, height, width = image.shape[1:]
        side = max(round(math.sqrt(area)), 3)
        side = min(side + 1 - side % 2, height, width)
        uniform = noise.uniform(START_STEP, _room(image, 5 + channels))
        down, right, first = _window(uniform[:, :2], side, image)
        _, _, second = _window(uniform[:, 2:4], side, image)
        pyramids = _pyramids(side).to(image)
        row, column = down.clamp(0, side - 1)[:, :, None], right.clamp(0, side - 1)[:, None, :]
        turned = uniform[:, 4, None, None] < 0.5
        shape = torch.where(turned, pyramids.T[row, column], pyramids[row, column])[:, None]
        delta = current - image
        unused = (self.eps**2 - l2_norm(delta).square()).clamp(min=0.0).reshape(-1, 1, 1, 1)
        available = (_channel_norm(delta * (first | second)).square() + unused / channels).sqrt()
        old = delta * first
        new = _sign(uniform[:, 5:, None, None]) * shape * first + old / (_channel_norm(old) + _TINY)
        new = new / (_channel_norm(new) + _TINY) * available
        return self._onto_the_sphere(image, torch.where(first, new, torch.where(second, 0.0, delta)))

    def _onto_the_sphere(self, image: Tensor, delta: Tensor) -> Tensor:
        return (image + self.eps * delta / (l2_norm(delta).reshape(-1, 1, 1, 1) + _TINY)).clamp(0.0, 1.0)


def _sign(uniform: Tensor) -> Tensor:
    """Maps uniform numbers in [0, 1) to -1 or 1."""
    return torch.where(uniform < 0.5, -1.0, 1.0).to(uniform.dtype)


def _room(image: Tensor, count: int) -> Tensor:
    """Returns an uninitialized tensor (B, count)."""
    return image.new_empty(len(image), count)


def _window(uniform: Tensor, side: int, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a random square for each sample.

    Args:
        uniform: Two numbers in [0, 1) for each sample, (B, 2).
        side: Height and width of the square.
        image: (B, C, H, W).

    Returns:
        Distance of each row and column from the square's first, (B, H) and (B, W), and its pixels, (B, 1, H, W).
    """
    height, width = image.shape[2:]
    down = torch.arange(height, device=image.device) - (uniform[:, :1] * (height - side + 1)).long()
    right = torch.arange(width, device=image.device) - (uniform[:, 1:] * (width - side + 1)).long()
    rows, columns = ((distance >= 0) & (distance < side) for distance in (down, right))
    return down, right, (rows[:, :, None] & columns[:, None, :])[:, None]


def _pyramids(side: int) -> Tensor:
    """Returns two adjacent pyramids of opposite sign and equal norm, (side, side) with norm 1."""
    half = side // 2
    whole = torch.cat([_pyramid(half, side), -_pyramid(side - half, side)])
    return whole / l2_norm(whole[None])


def _pyramid(height: int, width: int) -> Tensor:
    """Returns a pyramid of norm 1: ring m has the value sum of 1 / k^2 over k > m."""
    rings = max(height, width) // 2 + 1
    down = (torch.arange(height) - height // 2).abs()
    right = (torch.arange(width) - width // 2).abs()
    values = torch.arange(1.0, rings + 1.0).pow(-2.0).flip(0).cumsum(0).flip(0)
    steps = values[torch.maximum(down[:, None], right[None, :])]
    return steps / l2_norm(steps[None])


def _channel_norm(delta: Tensor) -> Tensor:
    """Returns the Euclidean norm of each channel of each sample, (B, C, 1, 1)."""
    return l2_norm(delta.flatten(0, 1)).reshape(*delta.shape[:2], 1, 1)
