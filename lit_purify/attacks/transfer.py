"""Transfer attacks: computed on the bare classifier, evaluated on the defense."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import override

from lit_purify.attacks.base import Attack, Queries
from lit_purify.functional.chunks import AttackedFunction
from lit_purify.functional.noise import Noise
from lit_purify.functional.rows import Domain


class Transfer(Attack):
    """Another attack, run on the bare classifier (Papernot et al., arXiv 1605.07277).

    A defense that resists attacks on itself but not this one hides its gradient (gradient masking). The attack must
    receive the classifier, see ``target``.

    Args:
        attack: The attack to run.
    """

    target = "classifier"

    def __init__(self, attack: Attack) -> None:
        super().__init__(attack.norm, attack.eps)
        self.attack, self.steps, self.eot = attack, attack.steps, attack.eot
        self.gradient = "surrogate" if attack.gradient == "exact" else attack.gradient

    @property
    @override
    def title(self) -> str:
        return f"{self.attack.title}; on the bare classifier"

    @property
    @override
    def raised(self) -> list[str]:
        return self.attack.raised

    @property
    def queries(self) -> Queries:
        """Query cost, in evaluations of the classifier."""
        return self.attack.queries

    @override
    def radius(self, image: Tensor) -> float:
        return self.attack.radius(image)

    @override
    def prepare(self, positions: Sequence[int], domain: Domain | None = None) -> None:
        super().prepare(positions, domain)
        self.attack.prepare(positions, domain)

    @override
    def perturb(self, model: AttackedFunction, image: Tensor, label: Tensor, noise: Noise, chunk: int) -> Tensor:
        return self.attack.perturb(model, image, label, noise, chunk)
