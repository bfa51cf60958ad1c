"""Starting an attack again, on another loss, for the samples that survived."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_purify.attacks.base import Attack, Best, NotApplicableError, Queries, check_counts, draws
from lit_purify.errors import InputError
from lit_purify.functional.chunks import AttackedFunction, logits_in_chunks
from lit_purify.functional.losses import LossName, named_loss, success
from lit_purify.functional.noise import Noise
from lit_purify.functional.rows import Domain

_APART = 2**24
"""Between the draws of two starts: more than an attack takes."""


class Restarts(Attack):
    """Another attack, started once for each of several losses; only samples that survive are started again.

    After each start the image is judged by fresh draws of the attack's own. A sample survives where at most a share
    ``until`` of them is wrong. Of all starts the image with the most wrong draws counts, of equals the one with the
    highest averaged margin. AutoAttack and DiffHammer restart in this way.

    Args:
        attack: What is started: ``PGD``, ``APGD``, ``DiffHammer`` or another attack that states versions with another
            loss.
        losses: The loss of each start: ``margin``, ``ce`` or ``dlr``. A loss may be named several times.
        judged: Draws that judge the result of a start.
        until: Share of wrong draws, in [0, 1], above which a sample is not started again.
    """

    def __init__(
        self,
        attack: Attack,
        losses: Sequence[LossName] = ("margin", "ce", "dlr"),
        judged: int = 10,
        until: float = 0.5,
    ) -> None:
        super().__init__(attack.norm, attack.eps)
        check_counts(judged=judged)
        if not losses:
            raise InputError("losses is empty: name a loss for each start")
        if not 0.0 <= until <= 1.0:
            raise InputError(f"until = {until} is a share of the draws: use a number in [0, 1]")
        self.attack, self.losses, self.judged, self.until = attack, list(losses), judged, until
        self.steps, self.eot, self.step_size = attack.steps, attack.eot, attack.step_size
        self.restarts = len(losses) * attack.restarts
        self.gradient, self.target = attack.gradient, attack.target
        self.scalable = attack.scalable & {"steps", "eot", "eps", "restarts"}
        self.stopping = f"starts again only where at most {until:.0%} of {judged} draws of its own are wrong"
        for loss in losses:
            named_loss(loss)
        self._starts()

    def stronger(self, **changes: Any) -> Restarts:  # noqa: ANN401
        """See ``Attack``: other steps and draws are those of each start, more ``restarts`` are more starts of each."""
        missing = [name for name in changes if name not in self.scalable]
        if missing:
            raise NotApplicableError(f"{type(self).__name__} states no version with other {' or '.join(missing)}")
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
    def title(self) -> str:
        """What reports call it."""
        return f"{self.attack.title}; started on the losses {', '.join(self.losses)} while a sample survives"

    @property
    def raised(self) -> list[str]:
        """Those of all starts."""
        return list(self.losses)

    @property
    def queries(self) -> Queries:
        """What it costs where a sample survives all starts."""
        each = [start.queries for start in self._starts()]
        forward, backward = (sum(counts) for counts in zip(*each, strict=True))
        return Queries(forward + self.judged * len(each), backward)

    def radius(self, image: Tensor) -> float:
        """That of the attack."""
        return self.attack.radius(image)

    def prepare(self, positions: Sequence[int], domain: Domain | None = None) -> None:
        """See ``Attack``."""
        super().prepare(positions, domain)
        self.attack.prepare(positions, domain)

    def perturb(self, model: AttackedFunction, image: Tensor, label: Tensor, noise: Noise, chunk: int) -> Tensor:
        """See ``Attack``."""
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
    """Noise whose runs are numbered from another one on."""

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
