"""Is the robust accuracy of an evaluation to be believed?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lit_purify.attacks import APGD, PGD, Attack, DiffHammer, NotApplicableError, Square, Transfer
from lit_purify.attacks.base import at_cost, single_draw
from lit_purify.checks.audited import AVERAGE, LEVEL, MAJORITY, RULES, TOLERANCE, WORST, Audited, Fact, RandomNoise
from lit_purify.checks.findings import Comparison, Findings, least_samples
from lit_purify.checks.gradcheck import first_samples, relative
from lit_purify.data.base import ImageDataset
from lit_purify.defense import (
    BPDA,
    AttackView,
    BareClassifier,
    DefendedClassifier,
    EmptyMask,
    Exact,
    FullMask,
    RandomArea,
)
from lit_purify.defense.gradients import MaskGradient
from lit_purify.errors import InputError
from lit_purify.functional.chunks import AttackedFunction
from lit_purify.functional.losses import LossName
from lit_purify.functional.noise import ATTACK, FrozenNoise
from lit_purify.functional.statistics import mean_interval, paired_difference
from lit_purify.models import Replays

_SAME = 1e-5
"""Largest relative difference of what is equal up to rounding."""
_STEPS, _EOT, _STARTS = 20, 16, 2
"""What a thorough attack has at least; else twice the configured."""
_SOFT = 5.0
"""Deviation of logits up to which a softmax over them is not saturated."""
_MASKED = "the gradient is masked, or the attack weak"
_SATURATES = "the configured loss saturates"


def reference(audit: Audited) -> Iterator[Fact]:
    """What is audited."""
    robust, clean = (float(x[:, AVERAGE].mean()) for x in (audit.reference, audit.outcomes(audit.image)))
    yield "reference", robust, None, "note", f"{robust:.1%} robust, {clean:.1%} clean"


def same_model(audit: Audited) -> Iterator[Fact]:
    """The attacked function has the outputs of the defense, and the gradient that it is said to have."""
    purifier, view = audit.defended.purifier, audit.view
    figure = relative(audit.attacked, audit.defending)
    said = f"relative difference of attacked and defended logits; levels {view.levels} and {purifier.levels}"
    if view.gradient != "exact":
        yield "same_model", figure, _SAME, "note", f"{said}; said to be {view.gradient}"
        return
    same = (view.levels, view.nfe) == (purifier.levels, purifier.nfe) and figure <= _SAME
    yield "same_model", figure, _SAME, same, said + ("" if same else ": another model is attacked than is defended")
    if same:
        # A view with the defense's outputs may still hand out another gradient.
        kind, samples = view.mask_gradient, audit.moved
        sound = Exact("frozen" if kind == "none" else kind).attacked(audit.defended)
        figure = relative(samples.gradient(view.function), samples.gradient(sound.function))
        audit.exact, relaxed = figure <= _SAME, kind in ("straight_through", "soft")
        said = ": the mask may be relaxed in another way" if relaxed else ": said to be exact, and is not"
        said = "relative difference of the attack's gradient and the defense's" + ("" if audit.exact else said)
        yield "same_gradient", figure, _SAME, "note" if relaxed and not audit.exact else audit.exact, said


def randomness(audit: Audited) -> Iterator[Fact]:
    """The attack sees fresh draws of noise; how much survives if attack and defense share a single draw."""
    if audit.randomized:
        queries, outputs = audit.attack.queries.forward, audit.outputs
        drawn = 1 if outputs[0] == 1 else len(audit.drawn)
        fresh = drawn >= min(2, queries) and outputs[0] > outputs[1] / 2
        said = f"draws of noise in {queries} queries of the attack; {audit.attacked.shape[1]} draws have {outputs[0]} "
        said += f"outputs for it, {outputs[1]} for the evaluation"
        said += "" if fresh else ": it sees frozen noise, the evaluation sees fresh noise"
        yield "fresh_draws", drawn, min(2.0, queries) if fresh else 2.0, fresh, said
        noise = FrozenNoise(audit.seed, audit.index, torch.zeros_like(audit.index), ATTACK)
        adversarial = audit.attacked_by(single_draw(audit.attack), audit.view, noise)
        left = audit.outcomes(adversarial, noise=noise)[:, AVERAGE].mean()
        said = f"share of randomness: {float(left):.1%} survive if attack and defense share a single draw"
        yield "frozen_noise", float(audit.reference[:, AVERAGE].mean() - left), None, "note", said


def unbounded(audit: Audited) -> Iterator[Fact]:
    """Gray is within reach of every sample: what is right there by guessing is the most that may survive."""
    if audit.domain is not None and audit.domain.constrained:
        yield "unbounded", 0.0, None, "not applicable", "what nobody can change stays different in any ball"
        return
    try:
        attack = audit.attack.stronger(eps=audit.everything)
    except NotApplicableError as error:
        yield "unbounded", 0.0, None, "not applicable", str(error)
        return
    limit = float(audit.label.bincount().max()) / len(audit.label)
    left = mean_interval(audit.outcomes(audit.attacked_by(attack, audit.view))[:, AVERAGE], audit.runs)
    said = f"survive at eps {audit.everything:.3g}, at least {left.low:.1%}; by guessing {limit:.1%}"
    said += ": the attack does not find what there is" if left.low > limit else ""
    yield "unbounded", left.value, limit, left.low <= limit, said


def ablations(audit: Audited) -> Iterator[Fact]:
    """The same purifier with a mask of everything, of nothing, and of random pixels."""
    purifier, rule = audit.defended.purifier, audit.defended.purifier.mask
    if rule is None:
        return
    for name, other in {"ones": FullMask(), "zeros": EmptyMask(), "random": RandomArea(rule)}.items():
        model = DefendedClassifier(purifier.with_mask(other), audit.defended.classifier)
        adversarial = audit.attacked_by(audit.attack, model)
        left, clean = (audit.outcomes(shown, model)[:, AVERAGE] for shown in (adversarial, audit.image))
        gain = paired_difference(left, audit.reference[:, AVERAGE])
        said = f"({float(left.mean()):.1%} robust, {float(clean.mean()):.1%} clean)"
        said = f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}] points that the mask gains over this one {said}"
        yield f"mask_{name}", gain.value, None, "note", said


def same_noise(audit: Audited) -> Iterator[Comparison]:
    """Draws that the attack has not seen, of the noise that it saw."""
    if audit.randomized:
        left = audit.outcomes(audit.adversarial, noise=audit.noise(ATTACK), first=2**31)
        excess, said = (audit.reference - left)[:, AVERAGE], "the same images under the attack's noise"
        yield Comparison("same_noise", excess, AVERAGE, said, "the defense tells attack from evaluation")


def stronger_versions(audit: Audited) -> Iterator[Comparison]:
    """Random noise; and a larger ball, more steps, draws and starts of the attack itself."""
    attack = audit.attack
    wider = next((k for k in (4.0, 2.0) if k * attack.eps < audit.everything), None)
    if wider is not None:
        said, meaning = f"eps in place of {wider:g} eps", "the gradient misleads"
        found = audit.compare_stronger("wider", said, meaning, eps=wider * attack.eps)
        # No more survives in the larger ball: the other way around.
        yield replace(found, excess=None if found.excess is None else -found.excess)
    random, said = RandomNoise(attack.norm, attack.eps), "random noise of equal norm"
    yield audit.compare("noise", random, audit.view, said, _MASKED)
    steps, restarts = max(2 * attack.steps, _STEPS), _STARTS * attack.restarts
    yield audit.compare_stronger("more_steps", f"{steps} steps", "the attack is cut short", steps=steps)
    if audit.randomized:
        eot = max(2 * attack.eot, _EOT)
        yield audit.compare_stronger("more_eot", f"{eot} draws a step", "too few draws are averaged", eot=eot)
    yield audit.compare_stronger("restarts", f"{restarts} starts", "one start is not enough", restarts=restarts)


def other_gradients(audit: Audited) -> Iterator[Comparison]:
    """None; that of the bare classifier; the identity for the purifier's; the exact one where it is not followed."""
    attack, defended, eot = audit.attack, audit.defended, max(1, audit.attack.eot) if audit.randomized else 1
    square = Square(attack.norm, attack.eps, audit.proposals, eot, p=0.3)
    yield audit.compare("black_box", square, defended, f"Square, {audit.proposals} proposals", _MASKED)
    bare, transfer = BareClassifier().attacked(defended), Transfer(single_draw(attack))
    yield audit.compare("transfer", transfer, bare, "the attack on the bare classifier", _MASKED)
    if audit.view.gradient != "bpda" and not defended.undefended:
        said, meaning = "the identity for the purifier's gradient", "the purifier's own is shattered"
        yield audit.compare("bpda", attack, BPDA().attacked(defended), said, meaning)
    if not audit.exact:
        meaning = "what was attacked stands in badly for the defense"
        yield audit.compare("exact", attack, Exact().attacked(defended), "the exact gradient", meaning)


def other_aims(audit: Audited) -> Iterator[Comparison]:
    """Attacks on the vote of N runs, and on the worst of them, each judged by what it is for."""
    attack = audit.attack
    if not audit.randomized or audit.runs == 1:
        return
    # A softmax that saturates leaves no weights to tell draws apart by.
    view = scaled(audit.view.function, max(1.0, float(audit.attacked.std(dim=2).mean()) / _SOFT))
    for kind, rule in (("vote", MAJORITY), ("worst", WORST)):
        if attack.aggregate != kind:
            # It is told apart from the configured attack by its aim: the loss that this aim is written in.
            steps, eot = max(1, attack.steps), max(attack.eot, audit.runs)
            aimed = PGD(attack.norm, attack.eps, steps, audit.step, eot, "ce", aggregate=kind)  # type: ignore[arg-type]
            meaning = f"the {RULES[rule]} says little: it was not aimed at"
            yield audit.compare(kind, aimed, view, f"an attack on the {kind}", meaning, rule)


def equal_cost(audit: Audited) -> Iterator[Comparison]:
    """Other attacks at the cost of the configured one, by the queries that both state: the strongest should count."""
    attack, draws = audit.attack, max(1, audit.attack.eot) if audit.randomized else 1
    meaning = "another attack takes more at the same cost: report the strongest of several"
    suite: list[tuple[str, Attack]] = [("apgd", APGD(attack.norm, attack.eps, 1, draws, select="last"))]
    if audit.randomized:
        suite.append(("hammer", DiffHammer(attack.norm, attack.eps, 1, attack.eps)))
    for name, kind in suite:
        if isinstance(attack, type(kind)):
            continue
        other = at_cost(kind, attack.queries)
        if isinstance(other, DiffHammer):
            other.step_size = max(audit.step, 2.5 * attack.eps / other.steps)
        calls = f"{other.queries.forward} + {other.queries.backward}"
        yield audit.compare(name, other, audit.view, f"{type(other).__name__} at equal cost ({calls} queries)", meaning)


def other_losses(audit: Audited) -> Iterator[Comparison]:
    """Losses that the attack could raise, but does not."""
    losses: list[LossName] = ["ce", "margin"]
    for loss in losses + (["dlr"] if audit.attacked.shape[2] > 2 else []):
        if loss != audit.attack.loss:
            yield audit.compare_stronger(f"loss_{loss}", f"the {loss} loss", _SATURATES, loss=loss)
    if audit.attack.loss == "ce":
        view = scaled(audit.view.function, float(audit.attacked.std(dim=2).mean()) or 1.0)
        yield audit.compare("scaled", audit.attack, view, "logits scaled to deviation 1", _SATURATES)


def mask_gradients(audit: Audited) -> Iterator[Comparison]:
    """Gradients of the mask, and an attack on it."""
    attack, defended, rule = audit.attack, audit.defended, audit.defended.purifier.mask
    if rule is None or not rule.relaxable:
        return
    hidden = "the mask hides its gradient"
    # The exact attack of ``other_gradients`` has a frozen mask.
    kinds: tuple[MaskGradient, ...] = ("frozen", "straight_through", "soft")
    for kind in kinds if audit.exact else kinds[1:]:
        if kind != audit.view.mask_gradient:
            said = f"the {kind} gradient of the mask"
            yield audit.compare(f"mask_{kind}", attack, Exact(kind).attacked(defended), said, hidden)
    eot, steps = max(1, attack.eot), max(1, attack.steps)
    shift = PGD(attack.norm, attack.eps, steps, audit.step, eot, shift_steps=20)
    through, said = Exact("straight_through").attacked(defended), "an attack that first moves the mask"
    yield audit.compare("mask_shift", shift, through, said, hidden)


CHECKS: list[Callable[[Audited], Iterator[Fact | Comparison]]] = [
    reference,
    same_model,
    randomness,
    unbounded,
    ablations,
    same_noise,
    stronger_versions,
    other_gradients,
    other_aims,
    equal_cost,
    other_losses,
    mask_gradients,
]
"""All checks beside those of the gradient, in order: each gives findings, or comparisons, which are judged together."""


def audit_attack(
    views: Mapping[str, AttackView],
    attack: Attack,
    data: ImageDataset,
    samples: int = 32,
    runs: int = 8,
    proposals: int = 100,
    seed: int = 0,
    chunk: int = 64,
    device: torch.device | None = None,
    say: Callable[[str], None] = lambda line: None,
    recall: Callable[[str, Callable[[], Tensor]], Tensor] = lambda name, compute: compute(),
) -> Findings:
    """Checks for each defense whether its robust accuracy under an attack holds up against other attacks.

    The verdict is undecided, and not passed, where no check fails, but an attack that takes half of the samples would
    not be significant on so few. Arguments are those of ``lit_purify.audit``.
    ``views`` are what the attack differentiates, by the defense's name; ``say`` is handed a line for each finding;
    ``recall`` may answer from memory what survives a comparison (``Memory``).

    Raises:
        InputError: An argument is below 1, or the attack follows no gradient of the defense.
    """
    for option, value in (("runs", runs), ("proposals", proposals)):
        if value < 1:
            raise InputError(f"{option} = {value}: use at least 1")
    if (attack.gradient, attack.target) != ("exact", "defense"):
        raise InputError(f"attacks: {type(attack).__name__} follows no gradient of the defense: audit PGD, for example")
    if attack.threat != attack.norm:
        raise InputError(f"attacks: {attack.threat} is no Lp norm: audit an attack under linf or l2")
    image, label, index = first_samples(data, samples, device)
    rows = min(chunk, max(16, len(index) * attack.eot))
    findings, compared = Findings(), 0
    for name, view in views.items():
        audited = Audited(name, view, attack, image, label, index, seed, runs, rows, proposals, data.domain, recall)
        first = len(findings)
        with Replays(view.defended):
            findings.take(audited.findings(CHECKS), say)
        compared = max(compared, sum(finding.limit == TOLERANCE for finding in findings[first:]))
    least = least_samples(compared, LEVEL)
    if len(index) < least:
        # Only gross overstatement by some comparisons can show, and none by too few samples.
        few = f"{len(index)} samples are too few to find even an attack that takes half of them"
        findings.undecided = f"{few}: use {least} or more (samples)"
    facts = {"runs": runs, "proposals": proposals, "level": LEVEL, "tolerance": TOLERANCE}
    findings.facts = {"samples": index.tolist(), **facts}
    return findings


def scaled(function: AttackedFunction, scale: float) -> AttackedFunction:
    """The same function with its logits divided by a number."""
    return replace(function, classified=lambda purified, noise: function.classified(purified, noise) / scale)
