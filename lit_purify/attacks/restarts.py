"""Restarts of an attack, on several losses, for the samples that survive."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lit_purify.attacks.base import Attack, AttackWrapper, Best, NotApplicableError, Queries, check_counts, draws
from lit_purify.errors import InputError
from lit_purify.functional.chunks import AttackedFunction, logits_in_chunks
from lit_purify.functional.losses import LossName, named_loss, success
from lit_purify.functional.noise import Noise

_APART = 2**24
"""Distance between the run numbers of two starts, above the number of draws of an attack."""


class Restarts(AttackWrapper):
    """Another attack, started once for each of several losses; only surviving samples are started again.

    After each start, new draws judge the image. A sample survives if at most a fraction ``until`` of them is wrong. The
    result is the image with the most wrong draws of all starts, with ties decided by the averaged margin. AutoAttack
    and DiffHammer restart in this way.

    Args:
        attack: ``PGD``, ``APGD``, ``DiffHammer`` or another attack that offers other losses.
        losses: The loss of each start: ``margin``, ``ce`` or ``dlr``; a loss may occur several times.
        judged: Draws that judge the result of a start.
        until: Fraction of wrong draws, in [0, 1], above which a sample is not started again.
    """

    def __init__(
        self,
        attack: Attack,
        losses: Sequence[LossName] = ("margin", "ce", "dlr"),
        judged: int = 10,
        until: float = 0.5,
    ) -> None:
        super().__init__(attack)
        check_counts(judged=judged)
        if not losses:
            raise InputError("losses is empty: give a loss for each start")
        if not 0.0 <= until <= 1.0:
            raise InputError(f"until = {until}: use a fraction of the draws in [0, 1]")
        self.losses, self.judged, self.until, self.step_size = list(losses), judged, until, attack.step_size
        self.restarts = len(losses) * attack.restarts
        self.gradient, self.target = attack.gradient, attack.target
        self.scalable = attack.scalable & {"steps", "eot", "eps", "restarts"}
        self.stopping = f"starts again only where at most {until:.0%} of {judged} draws of its own are wrong"
        for loss in losses:
            named_loss(loss)
        self._starts()

    def stronger(self, **changes: Any) -> Restarts:  # noqa: ANN401
        """Returns a stronger version, see ``Attack``; ``restarts`` is the total, the rest applies to each start."""
        missing = [name for name in changes if name not in self.scalable]
        if missing:
            raise NotApplicableError(f"{type(self).__name__} has no version with other {' or '.join(missing)}")
        if "restarts" in changes:
            changes["restarts"] = -(-changes["restarts"] // len(self.losses))
        other = copy.copy(self)
        other.attack = self.attack.stronger(**changes)
        vars(other).update({name: getattr(other.attack, name) for name in ("steps", "eot", "eps", "step_size")})
        other.restarts = len(self.losses) * other.attack.restarts
        return other

    def _starts(self) -> list[Attack]:
        try:
            return [self.attack.stronger(loss=loss) for loss in self.losses]
        except NotApplicableError as error:
            raise InputError(f"attack: {error}: use PGD, APGD or DiffHammer") from error

    @property
    @override
    def title(self) -> str:
        return f"{self._starts()[0].title}; started on the losses {', '.join(self.losses)} while a sample survives"

    @property
    @override
    def raised(self) -> list[str]:
        return list(self.losses)

    @property
    def queries(self) -> Queries:
        """Query cost for a sample that survives all starts."""
        each = [start.queries for start in self._starts()]
        forward, backward = (sum(counts) for counts in zip(*each, strict=True))
        return Queries(forward + self.judged * len(each), backward)

    @override
    def perturb(self, model: AttackedFunction, image: Tensor, label: Tensor, noise: Noise, chunk: int) -> Tensor:
        best, left = Best(image), torch.arange(len(image), device=image.device)
        for k, attack in enumerate(self._starts()):
            if not len(left):
                break
            own = _Apart(noise.rows(left), k * _APART)
            found = attack.perturb(model, image[left], label[left], own, chunk)
            logits = logits_in_chunks(model, found, own, draws(_APART // 2, self.judged), chunk)
            best.offer(
                best.image.index_copy(0, left, found),
                torch.full_like(best.score, -torch.inf).index_copy(0, left, success(logits, label[left])),
            )
            wrong = (logits.argmax(dim=2) != label[left, None]).sum(dim=1)
            left = left[wrong <= self.until * self.judged]
        return best.image


@dataclass(frozen=True)
class _Apart:
    """Noise with an offset of the run numbers."""

    noise: Noise
    first: int

    def normal(self, step: int, like: Tensor) -> Tensor:
        return self.noise.normal(step, like)

    def uniform(self, step: int, like: Tensor) -> Tensor:
        return self.noise.uniform(step, like)

    def rows(self, rows: Tensor) -> _Apart:
        return replace(self, noise=self.noise.rows(rows))

    def runs(self, runs: list[int]) -> Noise:
        return self.noise.runs([self.first + run for run in runs])
