"""Square attack: random search, without gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_purify.attacks.base import Attack, Best, Queries, check_counts, draws
from lit_purify.errors import InputError
from lit_purify.functional.chunks import AttackedFunction, logits_in_chunks
from lit_purify.functional.images import places
from lit_purify.functional.losses import mean_margin
from lit_purify.functional.noise import START_STEP, Noise
from lit_purify.functional.threat import Norm, l2_norm, project

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Steps, of 10,000, after which the changed fraction of the image is halved."""
_TINY = 1e-12


class Square(Attack):
    """Square attack (Andriushchenko et al., ECCV 2020, arXiv 1912.00049) on the margin averaged over ``eot`` draws.

    A proposal changes one square at a random place, of its own for each sample, and stays when the averaged margin
    rises. The square's area is a fraction of the image that begins at ``p`` and is halved on a schedule, scaled to
    ``steps``. It runs all its steps, whether or not a sample is broken on the way. Of rows it changes as many
    features anywhere (Linf alone).

    Args:
        norm: ``linf`` or ``l2``.
        eps: Radius, in pixels of [0, 1]; a number or a fraction such as ``8/255``.
        steps: Proposals after the start, a pattern on the whole image (AutoAttack: 5000).
        eot: Draws that each proposal is judged by.
        p: Fraction of the image that the first squares change.
        paired: Compare proposal and standing point on the same fresh draws, at twice the cost. ``False`` compares with
            the average that the standing point once had: for a randomized model that is partly luck and soon lets
            nothing pass; for a deterministic one it makes no difference.
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
            raise InputError(f"p = {p} is a fraction of the image: use a number above 0, at most 1")
        self.steps, self.eot, self.p, self.paired = steps, eot, p, paired

    @property
    def title(self) -> str:
        """What reports call it."""
        return f"Square attack on the margin loss, p = {self.p:g}{'' if self.paired else ', unpaired draws'}"

    @property
    def queries(self) -> Queries:
        """What it costs."""
        return Queries((1 + self.steps * (2 if self.paired else 1)) * self.eot, 0)

    def perturb(self, model: AttackedFunction, image: Tensor, label: Tensor, noise: Noise, chunk: int) -> Tensor:
        """See ``Attack``."""
        if image.ndim == 2 and self.norm != "linf":
            raise InputError("Square: rows of tables have no squares: use norm: linf, which changes single features")
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
        """Pixels that the square should have after k proposals."""
        halvings = sum(int(k / self.steps * 10000) > step for step in _HALVINGS)
        return self.p / 2**halvings * places(image)[0].numel()

    def _stripes(self, image: Tensor, noise: Noise) -> Tensor:
        """Vertical stripes one pixel wide, each channel of each at + eps or - eps."""
        return (image + self.eps * _sign(noise.uniform(START_STEP, image[:, :, :1]))).clamp(0.0, 1.0)

    def _propose_linf(self, standing: Tensor, image: Tensor, noise: Noise, area: float) -> Tensor:
        """A square in which each channel is at + eps or - eps."""
        height, width = image.shape[2:]
        side = min(max(round(math.sqrt(area)), 1), height, width)
        uniform = noise.uniform(START_STEP, _room(image, 2 + image.shape[1]))
        _, _, inside = _window(uniform[:, :2], side, image)
        change = torch.where(inside, 2.0 * self.eps * _sign(uniform[:, 2:, None, None]), 0.0)
        return project(standing + change, image, "linf", self.eps)

    def _signs(self, image: Tensor, noise: Noise) -> Tensor:
        """Each feature of rows (B, F) at + eps or - eps."""
        return self.inside(image + self.eps * _sign(noise.uniform(START_STEP, image)), image)

    def _propose_features(self, standing: Tensor, image: Tensor, noise: Noise, area: float) -> Tensor:
        """Features drawn at random, ``area`` of them on average, each at + eps or - eps."""
        chosen = noise.uniform(START_STEP - 1, image) * image.shape[1] < max(area, 1.0)
        return torch.where(chosen, self._signs(image, noise), standing)

    def _tiles(self, image: Tensor, noise: Noise) -> Tensor:
        """Tiles of two pyramids each, on a grid of five by five (more on the smallest images)."""
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

    def _propose_l2(self, standing: Tensor, image: Tensor, noise: Noise, area: float) -> Tensor:
        """The perturbation of a second window, and what is left of eps, goes into pyramids in a first (algorithm 3)."""
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
        delta = standing - image
        unused = (self.eps**2 - l2_norm(delta).square()).clamp(min=0.0).reshape(-1, 1, 1, 1)
        available = (_channel_norm(delta * (first | second)).square() + unused / channels).sqrt()
        old = delta * first
        new = _sign(uniform[:, 5:, None, None]) * shape * first + old / (_channel_norm(old) + _TINY)
        new = new / (_channel_norm(new) + _TINY) * available
        return self._onto_the_sphere(image, torch.where(first, new, torch.where(second, 0.0, delta)))

    def _onto_the_sphere(self, image: Tensor, delta: Tensor) -> Tensor:
        return (image + self.eps * delta / (l2_norm(delta).reshape(-1, 1, 1, 1) + _TINY)).clamp(0.0, 1.0)


def _sign(uniform: Tensor) -> Tensor:
    """-1 or 1, from uniform numbers in [0, 1)."""
    return torch.where(uniform < 0.5, -1.0, 1.0).to(uniform.dtype)


def _room(image: Tensor, count: int) -> Tensor:
    """A tensor (B, count), for its shape."""
    return image.new_empty(len(image), count)


def _window(uniform: Tensor, side: int, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A square of each sample at a uniform place.

    Args:
        uniform: Two numbers in [0, 1) for each sample, (B, 2).
        side: Its height and width.
        image: (B, C, H, W).

    Returns:
        Each row's and column's distance from the square's first, (B, H) and (B, W), and what is inside, (B, 1, H, W).
    """
    height, width = image.shape[2:]
    down = torch.arange(height, device=image.device) - (uniform[:, :1] * (height - side + 1)).long()
    right = torch.arange(width, device=image.device) - (uniform[:, 1:] * (width - side + 1)).long()
    rows, columns = ((distance >= 0) & (distance < side) for distance in (down, right))
    return down, right, (rows[:, :, None] & columns[:, None, :])[:, None]


def _pyramids(side: int) -> Tensor:
    """Two pyramids of equal norm and opposite sign side by side, of norm 1 together, (side, side)."""
    half = side // 2
    whole = torch.cat([_pyramid(half, side), -_pyramid(side - half, side)])
    return whole / l2_norm(whole[None])


def _pyramid(height: int, width: int) -> Tensor:
    """Steps that fall off from the center, of norm 1: in ring m, the sum of 1 / k^2 over k > m."""
    rings = max(height, width) // 2 + 1
    down = (torch.arange(height) - height // 2).abs()
    right = (torch.arange(width) - width // 2).abs()
    values = torch.arange(1.0, rings + 1.0).pow(-2.0).flip(0).cumsum(0).flip(0)
    steps = values[torch.maximum(down[:, None], right[None, :])]
    return steps / l2_norm(steps[None])


def _channel_norm(delta: Tensor) -> Tensor:
    """Euclidean norm of each channel of each sample, (B, C, 1, 1)."""
    return l2_norm(delta.flatten(0, 1)).reshape(*delta.shape[:2], 1, 1)
