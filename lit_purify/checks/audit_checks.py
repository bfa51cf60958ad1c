"""The checks that say whether the robust accuracy of a defense under an attack is to be believed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_purify.attacks import PGD, Attack, MaskShift, NotApplicableError, Queries, Square, Transfer
from lit_purify.checks.findings import Comparison, Finding, Fixed, Verdict, holm, sign_flip, verdict
from lit_purify.checks.gradcheck import Samples, check_gradient
from lit_purify.defense import (
    BPDA,
    Attacked,
    BareClassifier,
    DefendedClassifier,
    Exact,
    Mask,
    NoPurifier,
    Ones,
    RandomArea,
    Zeros,
)
from lit_purify.defense.gradients import MaskGradient
from lit_purify.functional.chunks import AttackedFunction, draws_in_chunks, logits_in_chunks
from lit_purify.functional.losses import LossName, margin_loss
from lit_purify.functional.noise import ATTACK, EVALUATION, START_STEP, KeyedNoise, Noise
from lit_purify.functional.statistics import mean_interval, outcomes, paired_difference
from lit_purify.functional.threat import Norm, l2_norm, project

Model = Attacked | DefendedClassifier | AttackedFunction
LEVEL, TOLERANCE, SAME_LIMIT = 0.05, 0.05, 1e-5
"""Chance to fail a sound defense by its comparisons; what an attack may overstate; largest relative difference."""
_STEPS, _EOT, _RESTARTS = 20, 16, 2
"""What a thorough attack has at least; else twice the configured."""
_SOFT = 5.0
"""Deviation of logits up to which a softmax over them is not saturated."""
_CHECKED = 4
"""Samples whose gradients are checked."""
_DRAWS, _UNSEEN = list(range(8)), 2**31
"""Draws that are looked at one by one, and the first of those that no attack reaches."""
_AVERAGE, _WORST, _MAJORITY = range(3)
_RULES = ("average accuracy", "worst-of-N accuracy", "accuracy of the vote")


class RandomNoise(Attack):
    """Noise on the border of the ball that knows nothing of the model: random signs, or a random direction in L2."""

    gradient, steps, eot, queries = "none", 1, 0, Queries(0, 0)

    def __init__(self, norm: Norm, eps: float) -> None:
        super().__init__(norm, eps)

    def perturb(self, model: AttackedFunction, image: Tensor, label: Tensor, noise: Noise, chunk: int) -> Tensor:
        """See ``Attack``."""
        direction = noise.normal(START_STEP, image)
        length = l2_norm(direction).reshape(-1, 1, 1, 1)
        return project(
            image + self.eps * (direction.sign() if self.norm == "linf" else direction / length),
            image,
            self.norm,
            self.eps,
        )


@dataclass
class Audit:
    """The checks of one defense under one attack, on some samples.

    A comparison shows the same samples, under the same noise of evaluation, to a second attack that has no right to be
    stronger. It fails when the configured attack overstates robust accuracy by more than ``TOLERANCE`` and the paired
    differences are significant at ``LEVEL``: by an exact sign-flip test for each, with Holm's correction over all
    comparisons of the defense. So by its comparisons a sound defense fails with a chance of at most 5 %, each defense
    anew. With few samples only gross overstatement is significant: what is above the tolerance but not significant is a
    ``note`` that asks for more of them. The other checks are not tests, but for ``unbounded``: the lower end of a 95 %
    interval, where a working attack is far below the limit.

    Attributes:
        defended: The defense.
        view: What the attack is handed.
        attack: The configured attack.
        image: (B, C, H, W) in [0, 1].
        label: (B,).
        index: Positions of the samples in their split, (B,).
        seed: Of all noise.
        runs: N, with which every image is evaluated.
        chunk: Rows that networks are called with.
        proposals: Steps of the black-box attack.
    """

    defended: DefendedClassifier
    view: Attacked
    attack: Attack
    image: Tensor
    label: Tensor
    index: Tensor
    seed: int = 0
    runs: int = 8
    chunk: int = 64
    proposals: int = 100
    _seen: set[int] = field(default_factory=set)

    def rows(self, name: str) -> Iterator[Finding]:
        """All checks, in a fixed order, as soon as each is known; ``name`` is the defense's."""
        checked = check_gradient(name, self.defended, self._moved())
        yield from checked
        try:
            self._probe()
        except RuntimeError as error:
            if all(finding.passed for finding in checked):
                raise
            yield Finding(name, "attackable", 0.0, 1.0, "fail", f"no attack can follow this gradient: {error}")
            return
        self.adversarial = self.attack(
            self._spying(self.view.function), self.image, self.label, self._noise(ATTACK), self.chunk
        )
        self.reference = self._outcomes(self.adversarial)
        for values in self._facts():
            yield Finding(name, *values)
        compared = list(self._comparisons())
        chances = iter(holm([sign_flip(c.excess, self.runs) for c in compared if c.excess is not None]))
        for found in compared:
            if found.excess is None:
                yield Finding(name, found.check, 0.0, None, "not applicable", found.other)
            else:
                yield self._judged(name, found, found.excess, next(chances))

    def survival(self, attack: Attack, model: Model, noise: Noise | None = None) -> Tensor:
        """What survives an attack on a model in the defense: ``outcomes``, (B, 3)."""
        adversarial = attack(model, self.image, self.label, noise or self._noise(ATTACK), self.chunk)
        return self._outcomes(adversarial)

    def _outcomes(
        self, image: Tensor, defended: DefendedClassifier | None = None, noise: Noise | None = None, first: int = 0
    ) -> Tensor:
        runs = list(range(first, first + self.runs))
        logits = self._logits(defended or self.defended, image, noise or self._noise(EVALUATION), runs)
        return outcomes(logits.argmax(dim=2), self.label)

    def _logits(self, defended: DefendedClassifier, image: Tensor, noise: Noise, runs: list[int]) -> Tensor:
        return logits_in_chunks(defended.attacked(), image, noise, runs, self.chunk)

    def _noise(self, stream: int) -> KeyedNoise:
        return KeyedNoise(self.seed, self.index, torch.zeros_like(self.index), stream)

    def _moved(self) -> Samples:
        """The first samples, moved as in ``gradcheck``."""
        rows = torch.arange(min(_CHECKED, len(self.image)), device=self.image.device)
        return Samples.moved(self.image[rows], self.label[rows], self._noise(ATTACK).rows(rows))

    def _probe(self) -> None:
        """Logits (B, n, classes) for some draws: what the attack sees when it differentiates, and the defense."""
        noise = self._noise(ATTACK)
        # Off the samples: there symmetries can hide what differs between two draws.
        image = RandomNoise(self.attack.norm, self.attack.eps)(self.view, self.image, self.label, noise)
        seen = draws_in_chunks(self.view.function, margin_loss, image, self.label, noise, _DRAWS, self.chunk)
        self.attacked = seen.logits
        self.defending = self._logits(self.defended, image, noise, _DRAWS)
        self.evaluated = self._logits(self.defended, image, self._noise(EVALUATION), _DRAWS)
        self.randomized = _different(self.evaluated) > 1

    def _spying(self, model: AttackedFunction) -> AttackedFunction:
        """The model, noting which draws it is asked for."""

        def spied(image: Tensor, noise: Noise, mask: Tensor | None) -> Tensor:
            if isinstance(noise, KeyedNoise):
                self._seen.update(noise.run.tolist())
            return model.logits(image, noise, mask)

        return replace(model, logits=spied)

    def _facts(self) -> Iterator[tuple[str, float, float | None, Verdict, str]]:
        """Checks that stand for themselves."""
        clean = self._outcomes(self.image)
        self.robust, self.clean = float(self.reference[:, _AVERAGE].mean()), float(clean[:, _AVERAGE].mean())
        yield "reference", self.robust, None, "note", f"{_percent(self.robust)} robust, {_percent(self.clean)} clean"
        yield self._same_model()
        if self.exact:
            yield self._same_gradient()
        if self.randomized:
            yield self._fresh_draws()
            yield self._frozen()
        yield self._unbounded()
        yield from self._ablations()

    def _same_model(self) -> tuple[str, float, float, Verdict, str]:
        purifier, view = self.defended.purifier, self.view
        figure = float((self.attacked - self.defending).abs().max()) / (float(self.defending.abs().max()) or 1.0)
        walked = (view.levels, view.nfe), (purifier.levels, purifier.nfe)
        self.exact = walked[0] == walked[1] and figure <= SAME_LIMIT and view.gradient == "exact"
        said = f"relative difference of attacked and defended logits; levels {walked[0][0]} and {walked[1][0]}"
        if self.exact or view.gradient != "exact":
            how: Verdict = "pass" if self.exact else "note"
            return "same_model", figure, SAME_LIMIT, how, said + ("" if self.exact else f"; said to be {view.gradient}")
        return "same_model", figure, SAME_LIMIT, "fail", said + ": another model is attacked than is defended"

    def _same_gradient(self) -> tuple[str, float, float, Verdict, str]:
        """A view with the defense's outputs may still hand out another gradient."""
        kind, samples = self.view.mask_gradient, self._moved()
        sound = Exact("frozen" if kind == "none" else kind).attacked(self.defended)
        given, own = samples.gradient(self.view.function), samples.gradient(sound.function)
        figure = float((given - own).abs().max()) / (float(own.abs().max()) or 1.0)
        said = "relative difference of the attack's gradient and the defense's"
        if figure <= SAME_LIMIT:
            return "same_gradient", figure, SAME_LIMIT, "pass", said
        # The comparison with the exact gradient is made as well.
        self.exact = False
        if kind in ("straight_through", "soft"):
            return "same_gradient", figure, SAME_LIMIT, "note", f"{said}: the mask may be relaxed in another way"
        return "same_gradient", figure, SAME_LIMIT, "fail", f"{said}: said to be exact, and is not"

    def _fresh_draws(self) -> tuple[str, float, float, Verdict, str]:
        queries, outputs = self.attack.queries.forward, (_different(self.attacked), _different(self.evaluated))
        drawn = 1 if outputs[0] == 1 else len(self._seen)
        said = (
            f"draws of noise in {queries} queries of the attack; {len(_DRAWS)} draws have {outputs[0]} outputs for it, "
            f"{outputs[1]} for the evaluation"
        )
        if drawn < min(2, queries) or outputs[0] <= outputs[1] / 2:
            return "fresh_draws", drawn, 2.0, "fail", f"{said}: it sees frozen noise, the evaluation draws anew"
        return "fresh_draws", drawn, min(2.0, queries), "pass", said

    def _frozen(self) -> tuple[str, float, None, Verdict, str]:
        noise = Fixed(self.seed, self.index, torch.zeros_like(self.index), ATTACK)
        # All draws are the same one.
        adversarial = single_draw(self.attack)(self.view, self.image, self.label, noise, self.chunk)
        left = self._outcomes(adversarial, noise=noise)[:, _AVERAGE]
        said = f"owed to randomness: {_percent(float(left.mean()))} survive with one draw for attack and defense"
        return "frozen_noise", float((self.reference[:, _AVERAGE] - left).mean()), None, "note", said

    def _unbounded(self) -> tuple[str, float, float | None, Verdict, str]:
        """Gray is within reach of every sample: what is right there by guessing is the most that may survive."""
        try:
            shares = self.survival(self.attack.stronger(eps=self._everything), self.view)[:, _AVERAGE]
        except NotApplicableError as error:
            return "unbounded", 0.0, None, "not applicable", str(error)
        limit = float(self.label.bincount().max()) / len(self.label)
        left = mean_interval(shares, self.runs)
        said = f"survive at eps {self._everything:.3g}, at least {_percent(left.low)}; by guessing {_percent(limit)}"
        if left.low > limit:
            return "unbounded", left.value, limit, "fail", said + ": the attack does not find what there is"
        return "unbounded", left.value, limit, "pass", said

    @property
    def _everything(self) -> float:
        """The radius at which every ball contains the gray image."""
        return 0.5 * (1.0 if self.attack.norm == "linf" else float(self.image[0].numel()) ** 0.5)

    def _ablations(self) -> Iterator[tuple[str, float, None, Verdict, str]]:
        rule = self.defended.purifier.mask
        if rule is None:
            return
        others: dict[str, Mask] = {"ones": Ones(), "zeros": Zeros(), "random": RandomArea(rule)}
        for name, other in others.items():
            model = DefendedClassifier(self.defended.purifier.with_mask(other), self.defended.classifier)
            adversarial = self.attack(model, self.image, self.label, self._noise(ATTACK), self.chunk)
            left, clean = (self._outcomes(shown, model)[:, _AVERAGE] for shown in (adversarial, self.image))
            gain = paired_difference(left, self.reference[:, _AVERAGE])
            said = (
                f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}] points that the mask gains over this one "
                f"({_percent(float(left.mean()))} robust, {_percent(float(clean.mean()))} clean)"
            )
            yield f"mask_{name}", gain.value, None, "note", said

    def _comparisons(self) -> Iterator[Comparison]:
        """Attacks that have no right to be stronger than the configured one."""
        attack, view, defended = self.attack, self.view, self.defended

        def than(
            check: str, other: Callable[[], Attack], model: Model, said: str, meaning: str, rule: int = _AVERAGE
        ) -> Comparison:
            try:
                left = self.survival(other(), model)
            except NotApplicableError as error:
                return Comparison(check, None, rule, str(error), meaning)
            return Comparison(check, (self.reference - left)[:, rule], rule, said, meaning)

        wider = next((k for k in (4.0, 2.0) if k * attack.eps < self._everything), None)
        if wider is not None:
            eps = wider * attack.eps
            found = than("wider", lambda: attack.stronger(eps=eps), view, f"eps in place of {wider:g} eps", "")
            # More survives the larger ball than the smaller one: the other way around.
            excess = None if found.excess is None else -found.excess
            yield replace(found, excess=excess, meaning="the gradient misleads")
        if self.randomized:
            # Draws that the attack has not seen, of the noise that it saw.
            left = self._outcomes(self.adversarial, noise=self._noise(ATTACK), first=_UNSEEN)
            excess, said = (self.reference - left)[:, _AVERAGE], "the same images under the attack's noise"
            yield Comparison("same_noise", excess, _AVERAGE, said, "the defense tells attack from evaluation")
        said, masked = "random noise of equal norm", "the gradient is masked, or the attack weak"
        yield than("noise", lambda: RandomNoise(attack.norm, attack.eps), view, said, masked)
        steps = max(2 * attack.steps, _STEPS)
        yield than(
            "more_steps", lambda: attack.stronger(steps=steps), view, f"{steps} steps", "the attack is cut short"
        )
        if self.randomized:
            eot = max(2 * attack.eot, _EOT)
            meaning = "the attack averages over too few draws"
            yield than("more_eot", lambda: attack.stronger(eot=eot), view, f"{eot} draws a step", meaning)
        restarts = _RESTARTS * int(getattr(attack, "restarts", 1))
        meaning = "one start is not enough"
        yield than("restarts", lambda: attack.stronger(restarts=restarts), view, f"{restarts} starts", meaning)
        square = Square(attack.norm, attack.eps, self.proposals, max(1, attack.eot) if self.randomized else 1, p=0.3)
        yield than("black_box", lambda: square, defended, f"Square, {self.proposals} proposals", masked)
        bare = BareClassifier().attacked(defended)
        transfer = Transfer(single_draw(attack))
        yield than("transfer", lambda: transfer, bare, "the attack on the bare classifier", masked)
        if self.view.gradient != "bpda" and type(defended.purifier) is not NoPurifier:
            said = "the identity for the purifier's gradient"
            yield than("bpda", lambda: attack, BPDA().attacked(defended), said, "the purifier's own is shattered")
        if not self.exact:
            meaning = "what was attacked stands in badly for the defense"
            yield than("exact", lambda: attack, Exact().attacked(defended), "the exact gradient", meaning)
        yield from self._aggregates(than)
        for loss in self._losses():
            meaning = "the configured loss saturates"
            yield than(f"loss_{loss}", partial(attack.stronger, loss=loss), view, f"the {loss} loss", meaning)
        if getattr(attack, "loss", None) == "ce":
            scale = float(self.attacked.std(dim=2).mean()) or 1.0
            said, meaning = "logits scaled to deviation 1", "the configured loss saturates"
            yield than("scaled", lambda: attack, scaled(view.function, scale), said, meaning)
        rule = defended.purifier.mask
        if rule is not None and rule.relaxable:
            hidden = "the mask hides its gradient"
            # The exact attack above has a frozen mask.
            kinds: tuple[MaskGradient, ...] = ("frozen", "straight_through", "soft")
            for kind in kinds if self.exact else kinds[1:]:
                if kind != self.view.mask_gradient:
                    said = f"the {kind} gradient of the mask"
                    yield than(f"mask_{kind}", lambda: attack, Exact(kind).attacked(defended), said, hidden)
            shift = MaskShift(attack.norm, attack.eps, attack.steps, self._step, eot=attack.eot, loss="margin")
            through, said = Exact("straight_through").attacked(defended), "an attack that first moves the mask"
            yield than("mask_shift", lambda: shift, through, said, hidden)

    def _aggregates(self, than: Any) -> Iterator[Comparison]:  # noqa: ANN401
        """Attacks on the vote of N runs, and on the worst of them, each judged by what it is for."""
        attack = self.attack
        if not self.randomized or self.runs == 1:
            return
        # A softmax that saturates leaves no weights to tell draws apart by.
        scale = max(1.0, float(self.attacked.std(dim=2).mean()) / _SOFT)
        view = scaled(self.view.function, scale)
        for kind, rule in (("vote", _MAJORITY), ("worst", _WORST)):
            if getattr(attack, "aggregate", None) != kind:
                eot = max(attack.eot, self.runs)
                # It is told apart from the configured attack by its aim: the loss that this aim is written in.
                steps = max(1, attack.steps)
                aimed = partial(PGD, attack.norm, attack.eps, steps, self._step, eot, "ce", aggregate=kind)
                meaning = f"the {_RULES[rule]} says little: it was not aimed at"
                yield than(kind, aimed, view, f"an attack on the {kind}", meaning, rule)

    @property
    def _step(self) -> float:
        """Length of a step of other attacks than the configured one."""
        return float(getattr(self.attack, "step_size", self.attack.eps / 4.0))

    def _losses(self) -> list[LossName]:
        """Losses that the attack could raise, but does not."""
        losses: list[LossName] = ["ce", "margin", *(["dlr"] if self.attacked.shape[2] > 2 else [])]  # type: ignore[list-item]
        own = getattr(self.attack, "loss", None)
        return [loss for loss in losses if loss != own]

    def _judged(self, name: str, found: Comparison, excess: Tensor, chance: float) -> Finding:
        gap = paired_difference(torch.zeros_like(excess), excess)
        how = verdict(gap.value, chance, TOLERANCE, LEVEL)
        ends = f"[{100 * gap.low:+.1f}, {100 * gap.high:+.1f}] points more of the {_RULES[found.rule]} lost"
        tail = {"pass": "", "fail": f": {found.meaning}", "note": ": undecided, use more samples"}[how]
        return Finding(name, found.check, gap.value, TOLERANCE, how, f"{found.other}: {ends}, p = {chance:.2g}{tail}")


def single_draw(attack: Attack) -> Attack:
    """The same attack with one draw of noise a step, as far as it has draws."""
    for changes in ({"eot": 1, "aggregate": "mean"}, {"eot": 1}):
        try:
            return attack.stronger(**changes)
        except NotApplicableError:
            continue
    return attack


def scaled(function: AttackedFunction, scale: float) -> AttackedFunction:
    """The same function with its logits divided by a number."""
    return replace(function, logits=lambda image, noise, mask: function.logits(image, noise, mask) / scale)


def _different(logits: Tensor) -> int:
    """How many different outputs the draws (B, n, classes) of a sample have, of the sample with the most."""
    return max(len(draws.unique(dim=0)) for draws in logits)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
