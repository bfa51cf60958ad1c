"""What every attack has in common: its threat model, which is checked on exit."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lit_purify.errors import InputError
from lit_purify.functional.chunks import LogitsFunction
from lit_purify.functional.noise import Noise
from lit_purify.functional.threat import Norm, pixels, violations


class Attack(ABC):
    """Looks for an image in the threat model that the model gets wrong.

    Args:
        norm: ``linf`` or ``l2``.
        eps: Radius of the ball around the image, in pixels of [0, 1]; a number or a fraction such as ``8/255``.
    """

    steps: int
    eot: int
    gradient = "exact"

    def __init__(self, norm: Norm, eps: float | str) -> None:
        self.norm, self.eps = norm, pixels("eps", eps)
        if norm == "linf" and self.eps > 1.0:
            raise InputError(
                f"eps = {eps} is above 1, the whole range of a pixel: images lie in [0, 1], use e.g. 8/255"
            )

    def __call__(self, model: LogitsFunction, image: Tensor, label: Tensor, noise: Noise, chunk: int = 64) -> Tensor:
        """Adversarial images, (B, C, H, W) in [0, 1], detached.

        Args:
            model: From (image, noise) to logits; differentiable.
            image: (B, C, H, W) in [0, 1].
            label: (B,) int64.
            noise: Randomness of the same rows, apart from that of the evaluation.
            chunk: Rows that the model is called with, always this many.

        Raises:
            RuntimeError: The attack left its threat model (a bug in the attack).
        """
        adversarial = self.perturb(model, image, label, noise, chunk).detach()
        bad = violations(adversarial, image, self.norm, self.eps).nonzero().flatten().tolist()
        if bad:
            raise RuntimeError(f"{type(self).__name__} left its threat model ({self.norm} <= {self.eps}) in rows {bad}")
        return adversarial

    @property
    def title(self) -> str:
        """What reports call it."""
        return type(self).__name__

    @abstractmethod
    def perturb(self, model: LogitsFunction, image: Tensor, label: Tensor, noise: Noise, chunk: int) -> Tensor:
        """As ``__call__``, which checks the result."""
