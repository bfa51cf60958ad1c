"""Attacks on the bare classifier, shown to the defense."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lit_purify.attacks.base import Attack, Queries
from lit_purify.functional.chunks import AttackedFunction
from lit_purify.functional.noise import Noise
from lit_purify.functional.rows import Domain


class Transfer(Attack):
    """Another attack, run on the bare classifier (Papernot et al., arXiv 1605.07277).

    A defense that stands against attacks on itself and falls to this one hides its gradient. It must be handed the
    classifier, as ``target`` says.

    Args:
        attack: What is run.
    """

    target = "classifier"

    def __init__(self, attack: Attack) -> None:
        super().__init__(attack.norm, attack.eps)
        self.attack, self.steps, self.eot = attack, attack.steps, attack.eot
        self.gradient = "surrogate" if attack.gradient == "exact" else attack.gradient

    @property
    def title(self) -> str:
        """What reports call it."""
        return f"{self.attack.title}; on the bare classifier"

    @property
    def raised(self) -> list[str]:
        """Those of the attack."""
        return self.attack.raised

    @property
    def queries(self) -> Queries:
        """Of the classifier."""
        return self.attack.queries

    def radius(self, image: Tensor) -> float:
        """That of the attack."""
        return self.attack.radius(image)

    def prepare(self, positions: Sequence[int], domain: Domain | None = None) -> None:
        """See ``Attack``."""
        super().prepare(positions, domain)
        self.attack.prepare(positions, domain)

    def perturb(self, model: AttackedFunction, image: Tensor, label: Tensor, noise: Noise, chunk: int) -> Tensor:
        """See ``Attack``."""
        return self.attack.perturb(model, image, label, noise, chunk)
