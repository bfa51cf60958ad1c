"""Transfer attacks: computed on the bare classifier, evaluated on the defense."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from lit_purify.attacks.base import Attack, AttackWrapper, Queries
from lit_purify.functional.chunks import AttackedFunction
from lit_purify.functional.noise import Noise


class Transfer(AttackWrapper):
    """Another attack, run on the bare classifier (Papernot et al., arXiv 1605.07277).

    A defense that resists attacks on itself but not this one hides its gradient (gradient masking). The attack must
    receive the classifier, see ``target``.

    Args:
        attack: The attack to run.
    """

    target = "classifier"

    def __init__(self, attack: Attack) -> None:
        super().__init__(attack)
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
    def perturb(self, model: AttackedFunction, image: Tensor, label: Tensor, noise: Noise, chunk: int) -> Tensor:
        return self.attack.perturb(model, image, label, noise, chunk)
