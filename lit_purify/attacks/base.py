"""What every attack has in common: its threat model, which is checked on exit, and what it costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_purify.errors import InputError
from lit_purify.functional.chunks import LogitsFunction
from lit_purify.functional.noise import Noise
from lit_purify.functional.threat import Norm, pixels, violations


class Queries(NamedTuple):
    """Evaluations of the attacked model for one sample: forward passes, and how many of them are differentiated."""

    forward: int
    backward: int


class Attack(ABC):
    """Looks for an image in the threat model that the model gets wrong.

    Args:
        norm: ``linf`` or ``l2``.
        eps: Radius of the ball around the image, in pixels of [0, 1]; a number or a fraction such as ``8/255``.

    Attributes:
        steps: Points that each start tries one after the other.
        eot: Draws of noise that each of them is judged by.
        gradient: ``exact``, ``none``, or ``surrogate`` where another model than the attacked one is differentiated.
        target: What the attack is handed: the ``defense``, or the bare ``classifier`` behind it.
        stopping: When it ends, in words for the report.
    """

    steps: int
    eot: int
    gradient: Literal["exact", "surrogate", "none"] = "exact"
    target: Literal["defense", "classifier"] = "defense"
    stopping: str = "runs all its steps; does not look at the defense's final runs"

    def __init__(self, norm: Norm, eps: float | str) -> None:
        self.norm, self.eps = norm, pixels("eps", eps)
        if norm == "linf" and self.eps > 1.0:
            raise InputError(
                f"eps = {eps} is above 1, the whole range of a pixel: images lie in [0, 1], use e.g. 8/255"
            )

    def __call__(self, model: LogitsFunction, image: Tensor, label: Tensor, noise: Noise, chunk: int = 64) -> Tensor:
        """Adversarial images, (B, C, H, W) in [0, 1], detached.

        Args:
            model: From (image, noise) to logits; differentiable. (Attacks on the mask also ask for its ``attention``.)
            image: (B, C, H, W) in [0, 1].
            label: (B,) int64.
            noise: Randomness of the same rows, apart from that of the evaluation.
            chunk: Rows that the model is called with, always this many.

        Raises:
            RuntimeError: The attack left its threat model (a bug in the attack).
        """
        adversarial = self.perturb(model, image, label, noise, chunk).detach()
        bad = violations(adversarial, image, self.norm, self.radius(image)).nonzero().flatten().tolist()
        if bad:
            raise RuntimeError(f"{type(self).__name__} left its threat model ({self.norm} <= {self.eps}) in rows {bad}")
        return adversarial

    def radius(self, image: Tensor) -> float:
        """What the norm may be for images of this size: ``eps``."""
        return self.eps

    @property
    def title(self) -> str:
        """What reports call it."""
        return type(self).__name__

    @property
    @abstractmethod
    def queries(self) -> Queries:
        """What it costs."""

    def prepare(self, positions: Sequence[int]) -> None:  # noqa: B027  (most attacks have nothing to prepare)
        """Told before an evaluation which samples it is about.

        Args:
            positions: Their positions in the evaluated split, in order: the ``index`` of the noise that they come with.
        """

    @abstractmethod
    def perturb(self, model: LogitsFunction, image: Tensor, label: Tensor, noise: Noise, chunk: int) -> Tensor:
        """As ``__call__``, which checks the result."""


class Best:
    """For each sample, the candidate with the highest score so far; the first of equals.

    Args:
        image: (B, C, H, W), which stands until a candidate scores above ``score``.
        score: (B,); ``None`` is below every score.
    """

    def __init__(self, image: Tensor, score: Tensor | None = None) -> None:
        self.image = image
        self.score = torch.full((len(image),), -torch.inf, device=image.device) if score is None else score

    def offer(self, candidate: Tensor, score: Tensor) -> None:
        """Takes what is better."""
        better = score > self.score
        self.image = rowwise(better, candidate, self.image)
        self.score = torch.where(better, score, self.score)


def rowwise(condition: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """The samples (B, C, H, W) of one tensor where a condition (B,) holds, those of another elsewhere."""
    return torch.where(condition.reshape(-1, 1, 1, 1), chosen, other)


def draws(first: int, count: int) -> list[int]:
    """Numbers of ``count`` runs of noise, so that no two evaluations of an attack share a draw."""
    return list(range(first, first + count))


def check_counts(**counts: int) -> None:
    """Raises an ``InputError`` when a number of steps, draws or restarts is below 1."""
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"{name} = {value}: use at least 1")
