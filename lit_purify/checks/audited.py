"""One defense under one attack, and its comparison with other attacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from lit_purify.attacks import Attack, NotApplicableError, Queries
from lit_purify.checks.findings import Comparison, Finding, Verdict, holm, sign_flip
from lit_purify.checks.gradcheck import Samples, check_gradient
from lit_purify.defense import AttackView, DefendedClassifier
from lit_purify.functional.chunks import AttackedFunction, draws_in_chunks, logits_in_chunks
from lit_purify.functional.images import each
from lit_purify.functional.losses import margin_loss
from lit_purify.functional.noise import ATTACK, EVALUATION, START_STEP, KeyedNoise, Noise
from lit_purify.functional.rows import Domain
from lit_purify.functional.statistics import outcomes, paired_difference
from lit_purify.functional.threat import l2_norm, project

LEVEL, TOLERANCE = 0.05, 0.05
"""Probability that a sound defense fails by its comparisons; allowed overstatement of robust accuracy."""
AVERAGE, WORST, MAJORITY = range(3)
RULES = ("average accuracy", "worst-of-N accuracy", "accuracy of the vote")

Model = AttackView | DefendedClassifier | AttackedFunction
Fact = tuple[str, float, float | None, Verdict | bool, str]
"""Check, figure, limit, verdict (or whether it passed) and reason of a ``Finding``."""


class RandomNoise(Attack):
    """Random noise on the border of the ball: random signs, or for L2 a random direction."""

    gradient, steps, eot, queries = "none", 1, 0, Queries(0, 0)

    @override
    def perturb(self, model: AttackedFunction, image: Tensor, label: Tensor, noise: Noise, chunk: int) -> Tensor:
        direction = noise.normal(START_STEP, image)
        length = each(l2_norm(direction), image)
        shift = self.eps * (direction.sign() if self.norm == "linf" else direction / length)
        return project(image + shift, image, self.norm, self.eps)


@dataclass
class Audited:
    """One defense under one attack, on some samples: the input of the audit's checks.

    A comparison evaluates the same samples, under the same evaluation noise, for a second attack that should not be
    stronger. It fails if the configured attack overstates robust accuracy by more than ``TOLERANCE`` and the paired
    differences are significant at ``LEVEL``, by an exact sign-flip test with Holm's correction over all comparisons of
    the defense. A sound defense thus fails by its comparisons with a probability of at most 5 %. A difference above the
    tolerance that is not significant is a ``note`` that asks for more samples.

    Attributes:
        name: Name of the defense.
        view: The defense, and the view that the attack differentiates.
        attack: The configured attack.
        image: (B, C, H, W) in [0, 1].
        label: (B,).
        index: Positions of the samples in their split, (B,).
        seed: Seed of all noise.
        runs: N, the number of evaluations of every image.
        chunk: Rows in each call of the networks.
        proposals: Steps of the black-box attack.
        domain: Constraints on table rows.
        recall: (name, computation) -> outcomes; returns the recorded results of an interrupted audit.
        exact: Whether the attack follows the exact gradient of the defense.
        drawn: The noise draws that the attack used.
    """

    name: str
    view: AttackView
    attack: Attack
    image: Tensor
    label: Tensor
    index: Tensor
    seed: int = 0
    runs: int = 8
    chunk: int = 64
    proposals: int = 100
    domain: Domain | None = None
    recall: Callable[[str, Callable[[], Tensor]], Tensor] = lambda name, compute: compute()
    exact: bool = field(default=False, init=False)
    drawn: set[int] = field(default_factory=set, init=False)

    def findings(self, checks: Iterable[Callable[[Audited], Iterator[Fact | Comparison]]]) -> Iterator[Finding]:
        """Yields the findings of the gradient and of all checks, in order; comparisons come last."""
        sound, compared, name = True, [], self.name
        for finding in check_gradient(name, self.view.defended, self.moved):
            sound = sound and finding.passed
            yield finding
        try:
            self._probe()
        except RuntimeError as error:
            if sound:
                raise
            yield Finding(name, "attackable", 0.0, 1.0, "fail", f"no attack can follow this gradient: {error}")
            return
        for check in checks:
            for found in check(self):
                if isinstance(found, Comparison):
                    compared.append(found)
                else:
                    title, figure, limit, how, reason = found
                    how = how if isinstance(how, str) else "pass" if how else "fail"
                    yield Finding(name, title, figure, limit, how, reason)
        chances = iter(holm([sign_flip(c.excess, self.runs) for c in compared if c.excess is not None]))
        for found in compared:
            if found.excess is None:
                yield Finding(name, found.check, 0.0, None, "not applicable", found.other)
                continue
            gap, chance = paired_difference(torch.zeros_like(found.excess), found.excess), next(chances)
            how = judged(gap.value, chance)
            tail = {"pass": "", "fail": f": {found.meaning}"}.get(how, ": undecided, use more samples")
            lost = f"[{100 * gap.low:+.1f}, {100 * gap.high:+.1f}] points more of the {RULES[found.rule]} lost"
            reason = f"{found.other}: {lost}, p = {chance:.2g}{tail}"
            yield Finding(name, found.check, gap.value, TOLERANCE, how, reason)

    def compare(self, check: str, attack: Attack, model: Model, other: str, meaning: str, rule: int = 0) -> Comparison:
        """Compares the configured attack with another one on a model; further arguments as in ``Comparison``."""
        left = self.recall(f"{self.name}: {check}", lambda: self.outcomes(self.attacked_by(attack, model)))
        excess = self.reference - left.to(self.reference)
        return Comparison(check, excess[:, rule], rule, other, meaning)

    def compare_stronger(self, check: str, other: str, meaning: str, **changes: object) -> Comparison:
        """Compares the configured attack with a stronger version of itself, if there is one."""
        try:
            return self.compare(check, self.attack.stronger(**changes), self.view, other, meaning)
        except NotApplicableError as error:
            return Comparison(check, None, AVERAGE, str(error), meaning)

    def attacked_by(self, attack: Attack, model: Model, noise: Noise | None = None) -> Tensor:
        """Returns adversarial images."""
        attack.prepare(self.index.tolist(), self.domain)
        return attack(model, self.image, self.label, noise or self.noise(ATTACK), self.chunk)

    def outcomes(
        self, image: Tensor, defended: DefendedClassifier | None = None, noise: Noise | None = None, first: int = 0
    ) -> Tensor:
        """Returns the outcomes in the defense by the average, worst and majority rule, (B, 3)."""
        runs, function = list(range(first, first + self.runs)), (defended or self.view.defended).attacked()
        logits = logits_in_chunks(function, image, noise or self.noise(EVALUATION), runs, self.chunk)
        return outcomes(logits.argmax(dim=2), self.label)

    def noise(self, stream: int) -> KeyedNoise:
        """Returns the noise of all samples."""
        return KeyedNoise(self.seed, self.index, torch.zeros_like(self.index), stream)

    def _probe(self) -> None:
        """Computes logits (B, n, classes) of some draws, for the attack (with gradient) and for the defense."""
        noise, model, draws = self.noise(ATTACK), self.view.function, list(range(8))
        # Away from the samples, where symmetries can hide differences between draws.
        image = RandomNoise(self.attack.norm, self.attack.eps)(model, self.image, self.label, noise)
        self.attacked = draws_in_chunks(model, margin_loss, image, self.label, noise, draws, self.chunk).logits
        self.defending, evaluated = (
            logits_in_chunks(self.view.defended.attacked(), image, self.noise(stream), draws, self.chunk)
            for stream in (ATTACK, EVALUATION)
        )
        # Largest number of distinct outputs of a sample, in the attack and in the evaluation.
        self.outputs = [max(len(x.unique(dim=0)) for x in of) for of in (self.attacked, evaluated)]
        self.defended, self.randomized = self.view.defended, self.outputs[1] > 1

    @cached_property
    def moved(self) -> Samples:
        """The first four samples, moved as in ``gradcheck``."""
        rows = torch.arange(min(4, len(self.image)), device=self.image.device)
        return Samples.moved(self.image[rows], self.label[rows], self.noise(ATTACK).rows(rows))

    @cached_property
    def adversarial(self) -> Tensor:
        """Images of the configured attack."""

        def noting(purified: Tensor, noise: Noise) -> Tensor:
            if isinstance(noise, KeyedNoise):
                self.drawn.update(noise.run.tolist())
            return self.view.function.classified(purified, noise)

        return self.attacked_by(self.attack, replace(self.view.function, classified=noting))

    @cached_property
    def reference(self) -> Tensor:
        """Outcomes under the configured attack, (B, 3)."""
        return self.outcomes(self.adversarial)

    @property
    def everything(self) -> float:
        """The radius at which every ball contains the gray image."""
        return 0.5 * (1.0 if self.attack.norm == "linf" else float(self.image[0].numel()) ** 0.5)

    @property
    def step(self) -> float:
        """Step length of other attacks than the configured one."""
        return self.attack.eps / 4.0 if self.attack.step_size is None else self.attack.step_size


class Counted(Audited):
    """Runs no attack and counts the forward and backward passes of an audit for each sample."""

    forward = backward = 0

    def attacked_by(self, attack: Attack, model: Model, noise: Noise | None = None) -> Tensor:
        """Counts the queries and returns the images unchanged."""
        if attack.target == "defense":
            self.forward += attack.queries.forward
            self.backward += attack.queries.backward
        return self.image

    def outcomes(
        self, image: Tensor, defended: DefendedClassifier | None = None, noise: Noise | None = None, first: int = 0
    ) -> Tensor:
        """Counts the evaluations; all samples survive."""
        self.forward += self.runs
        return torch.ones(len(self.image), len(RULES), dtype=torch.float64)


def judged(excess: float, chance: float) -> Verdict:
    """Judges a comparison by its adjusted p-value; an insignificant excess above the tolerance is a ``note``."""
    return "pass" if excess <= TOLERANCE else "fail" if chance <= LEVEL else "note"
