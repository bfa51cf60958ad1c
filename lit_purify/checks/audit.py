"""Audit: checks whether the robust accuracy of an evaluation can be trusted."""

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
"""Largest relative difference of values that are equal up to rounding."""
_STEPS, _EOT, _STARTS = 20, 16, 2
"""Minimum settings of a thorough attack; otherwise twice the configured ones."""
_SOFT = 5.0
"""Standard deviation of logits up to which their softmax is not saturated."""
_MASKED = "the gradient is masked, or the attack weak"
_SATURATES = "the configured loss saturates"


def reference(audit: Audited) -> Iterator[Fact]:
    """Reports robust and clean accuracy under the configured attack."""
    robust, clean = (float(x[:, AVERAGE].mean()) for x in (audit.reference, audit.outcomes(audit.image)))
    yield "reference", robust, None, "note", f"{robust:.1%} robust, {clean:.1%} clean"


def same_model(audit: Audited) -> Iterator[Fact]:
    """Checks that the attacked function has the outputs of the defense and the gradient that it claims."""
    purifier, view = audit.defended.purifier, audit.view
    figure = relative(audit.attacked, audit.defending)
    reason = f"relative difference of attacked and defended logits; levels {view.levels} and {purifier.levels}"
    if view.gradient != "exact":
        yield "same_model", figure, _SAME, "note", f"{reason}; its gradient is {view.gradient}"
        return
    same = (view.levels, view.nfe) == (purifier.levels, purifier.nfe) and figure <= _SAME
    yield "same_model", figure, _SAME, same, reason + ("" if same else ": another model is attacked than is defended")
    if same:
        # A view with the outputs of the defense can still have another gradient.
        kind, samples = view.mask_gradient, audit.moved
        sound = Exact("frozen" if kind == "none" else kind).attacked(audit.defended)
        figure = relative(samples.gradient(view.function), samples.gradient(sound.function))
        audit.exact, relaxed = figure <= _SAME, kind in ("straight_through", "soft")
        doubt = ": the mask may be relaxed in another way" if relaxed else ": it claims to be exact and is not"
        reason = "relative difference of the attack's gradient and the defense's" + ("" if audit.exact else doubt)
        yield "same_gradient", figure, _SAME, "note" if relaxed and not audit.exact else audit.exact, reason


def randomness(audit: Audited) -> Iterator[Fact]:
    """Checks that the attack sees fresh noise; reports what survives if attack and defense share a single draw."""
    if audit.randomized:
        queries, outputs = audit.attack.queries.forward, audit.outputs
        drawn = 1 if outputs[0] == 1 else len(audit.drawn)
        fresh = drawn >= min(2, queries) and outputs[0] > outputs[1] / 2
        reason = f"draws of noise in {queries} queries of the attack; {audit.attacked.shape[1]} draws have "
        reason += f"{outputs[0]} outputs for it, {outputs[1]} for the evaluation"
        reason += "" if fresh else ": it sees frozen noise, the evaluation sees fresh noise"
        yield "fresh_draws", drawn, min(2.0, queries) if fresh else 2.0, fresh, reason
        noise = FrozenNoise(audit.seed, audit.index, torch.zeros_like(audit.index), ATTACK)
        adversarial = audit.attacked_by(single_draw(audit.attack), audit.view, noise)
        left = audit.outcomes(adversarial, noise=noise)[:, AVERAGE].mean()
        reason = f"share of randomness: {float(left):.1%} survive if attack and defense share a single draw"
        yield "frozen_noise", float(audit.reference[:, AVERAGE].mean() - left), None, "note", reason


def unbounded(audit: Audited) -> Iterator[Fact]:
    """Checks a ball that contains gray: no more samples may survive than by guessing."""
    if audit.domain is not None and audit.domain.constrained:
        yield "unbounded", 0.0, None, "not applicable", "fixed features stay different in any ball"
        return
    try:
        attack = audit.attack.stronger(eps=audit.everything)
    except NotApplicableError as error:
        yield "unbounded", 0.0, None, "not applicable", str(error)
        return
    limit = float(audit.label.bincount().max()) / len(audit.label)
    left = mean_interval(audit.outcomes(audit.attacked_by(attack, audit.view))[:, AVERAGE], audit.runs)
    reason = f"survive at eps {audit.everything:.3g}, at least {left.low:.1%}; by guessing {limit:.1%}"
    reason += ": the attack misses adversarial images within its reach" if left.low > limit else ""
    yield "unbounded", left.value, limit, left.low <= limit, reason


def ablations(audit: Audited) -> Iterator[Fact]:
    """Reports the same purifier with a full, an empty and a random mask."""
    purifier, rule = audit.defended.purifier, audit.defended.purifier.mask
    if rule is None:
        return
    for name, other in {"ones": FullMask(), "zeros": EmptyMask(), "random": RandomArea(rule)}.items():
        model = DefendedClassifier(purifier.with_mask(other), audit.defended.classifier)
        adversarial = audit.attacked_by(audit.attack, model)
        left, clean = (audit.outcomes(shown, model)[:, AVERAGE] for shown in (adversarial, audit.image))
        gain = paired_difference(left, audit.reference[:, AVERAGE])
        under = f"({float(left.mean()):.1%} robust, {float(clean.mean()):.1%} clean)"
        reason = f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}] points that the mask gains over this one {under}"
        yield f"mask_{name}", gain.value, None, "note", reason


def same_noise(audit: Audited) -> Iterator[Comparison]:
    """Compares with new draws of the noise that the attack saw."""
    if audit.randomized:
        left = audit.outcomes(audit.adversarial, noise=audit.noise(ATTACK), first=2**31)
        excess, reason = (audit.reference - left)[:, AVERAGE], "the same images under the attack's noise"
        yield Comparison("same_noise", excess, AVERAGE, reason, "the defense tells attack from evaluation")


def stronger_versions(audit: Audited) -> Iterator[Comparison]:
    """Compares with random noise and with a larger ball, more steps, draws and starts of the attack."""
    attack = audit.attack
    wider, meaning = next((k for k in (4.0, 2.0) if k * attack.eps < audit.everything), None), "the gradient misleads"
    if wider is None:
        yield Comparison("wider", None, AVERAGE, "a larger ball is nearly the whole range: see unbounded", meaning)
    else:
        found = audit.compare_stronger("wider", f"eps in place of {wider:g} eps", meaning, eps=wider * attack.eps)
        # Robust accuracy must not be higher in the larger ball, so the sign is reversed.
        yield replace(found, excess=None if found.excess is None else -found.excess)
    random, reason = RandomNoise(attack.norm, attack.eps), "random noise of equal norm"
    yield audit.compare("noise", random, audit.view, reason, _MASKED)
    steps, restarts = max(2 * attack.steps, _STEPS), _STARTS * attack.restarts
    yield audit.compare_stronger("more_steps", f"{steps} steps", "the attack is cut short", steps=steps)
    if audit.randomized:
        eot = max(2 * attack.eot, _EOT)
        yield audit.compare_stronger("more_eot", f"{eot} draws a step", "too few draws are averaged", eot=eot)
    yield audit.compare_stronger("restarts", f"{restarts} starts", "one start is not enough", restarts=restarts)


def other_gradients(audit: Audited) -> Iterator[Comparison]:
    """Compares with no gradient, that of the bare classifier, BPDA, and the exact gradient if it was not used."""
    attack, defended, eot = audit.attack, audit.defended, max(1, audit.attack.eot) if audit.randomized else 1
    square = Square(attack.norm, attack.eps, audit.proposals, eot, p=0.3)
    yield audit.compare("black_box", square, defended, f"Square, {audit.proposals} proposals", _MASKED)
    bare, transfer = BareClassifier().attacked(defended), Transfer(single_draw(attack))
    yield audit.compare("transfer", transfer, bare, "the attack on the bare classifier", _MASKED)
    if audit.view.gradient != "bpda" and not defended.undefended:
        reason, meaning = "the identity for the purifier's gradient", "the purifier's own is shattered"
        yield audit.compare("bpda", attack, BPDA().attacked(defended), reason, meaning)
    if not audit.exact:
        meaning = "the attacked function is a poor surrogate of the defense"
        yield audit.compare("exact", attack, Exact().attacked(defended), "the exact gradient", meaning)


def other_aims(audit: Audited) -> Iterator[Comparison]:
    """Compares with attacks on the vote and on the worst of N runs, each judged by its own rule."""
    attack = audit.attack
    if not audit.randomized or audit.runs == 1:
        return
    # A saturated softmax gives no weights that distinguish draws.
    view = scaled(audit.view.function, max(1.0, float(audit.attacked.std(dim=2).mean()) / _SOFT))
    for kind, rule in (("vote", MAJORITY), ("worst", WORST)):
        if attack.aggregate != kind:
            # The aim defines this attack, so it uses the loss in which the aim is written.
            steps, eot = max(1, attack.steps), max(attack.eot, audit.runs)
            aimed = PGD(attack.norm, attack.eps, steps, audit.step, eot, "ce", aggregate=kind)  # type: ignore[arg-type]
            meaning = f"the {RULES[rule]} says little: it was not aimed at"
            yield audit.compare(kind, aimed, view, f"an attack on the {kind}", meaning, rule)


def equal_cost(audit: Audited) -> Iterator[Comparison]:
    """Compares with other attacks at equal cost in queries: the strongest should be reported."""
    attack, draws = audit.attack, max(1, audit.attack.eot) if audit.randomized else 1
    meaning = "another attack takes more at the same cost: report the strongest of several"
    suite: list[tuple[str, Attack]] = [("apgd", APGD(attack.norm, attack.eps, 1, draws, select="last"))]
    if audit.randomized:
        suite.append(("hammer", DiffHammer(attack.norm, attack.eps, 1, attack.eps)))
    for name, kind in suite:
        if isinstance(attack, type(kind)):
            continue
        counted = kind
        if isinstance(kind, DiffHammer) and audit.view.function.purified is None:
            # It then differentiates all its draws.
            counted = PGD(attack.norm, attack.eps, 1, attack.eps, kind.eot)
        counted = at_cost(counted, attack.queries)
        other = kind.stronger(steps=counted.steps)
        if isinstance(other, DiffHammer):
            other.step_size = max(audit.step, 2.5 * attack.eps / other.steps)
        calls = f"{counted.queries.forward} + {counted.queries.backward}"
        yield audit.compare(name, other, audit.view, f"{type(other).__name__} at equal cost ({calls} queries)", meaning)


def other_losses(audit: Audited) -> Iterator[Comparison]:
    """Compares with losses that the attack could maximize but does not."""
    losses: list[LossName] = ["ce", "margin"]
    for loss in losses + (["dlr"] if audit.attacked.shape[2] > 2 else []):
        if loss != audit.attack.loss:
            yield audit.compare_stronger(f"loss_{loss}", f"the {loss} loss", _SATURATES, loss=loss)
    if audit.attack.loss == "ce":
        view = scaled(audit.view.function, float(audit.attacked.std(dim=2).mean()) or 1.0)
        yield audit.compare("scaled", audit.attack, view, "logits scaled to deviation 1", _SATURATES)


def mask_gradients(audit: Audited) -> Iterator[Comparison]:
    """Compares with gradients of the mask and an attack on the mask."""
    attack, defended, rule = audit.attack, audit.defended, audit.defended.purifier.mask
    if rule is None or not rule.relaxable:
        return
    hidden = "the mask hides its gradient"
    # The exact attack of ``other_gradients`` has a frozen mask.
    kinds: tuple[MaskGradient, ...] = ("frozen", "straight_through", "soft")
    for kind in kinds if audit.exact else kinds[1:]:
        if kind != audit.view.mask_gradient:
            reason = f"the {kind} gradient of the mask"
            yield audit.compare(f"mask_{kind}", attack, Exact(kind).attacked(defended), reason, hidden)
    eot, steps = max(1, attack.eot), max(1, attack.steps)
    shift = PGD(attack.norm, attack.eps, steps, audit.step, eot, shift_steps=20)
    through, reason = Exact("straight_through").attacked(defended), "an attack that first moves the mask"
    yield audit.compare("mask_shift", shift, through, reason, hidden)


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
"""All checks besides those of the gradient, in order; each yields findings, or comparisons that are judged together."""


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
    """Checks for each defense whether its robust accuracy under an attack holds against other attacks.

    If no check fails, but too few samples make even an attack that breaks half of them insignificant, the verdict is
    undecided. Arguments are those of ``lit_purify.audit``. ``views`` maps the defenses' names to the views that the
    attack differentiates; ``say`` receives a line for each finding; ``recall`` may return recorded results
    (``Memory``).

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
        # With few samples, some comparisons can show a gross overstatement, and with very few none can.
        few = f"{len(index)} samples are too few to find even an attack that takes half of them"
        findings.undecided = f"{few}: use {least} or more (samples)"
    facts = {"runs": runs, "proposals": proposals, "level": LEVEL, "tolerance": TOLERANCE}
    findings.facts = {"samples": index.tolist(), **facts}
    return findings


def scaled(function: AttackedFunction, scale: float) -> AttackedFunction:
    """Returns the function with its logits divided by a number."""
    return replace(function, classified=lambda purified, noise: function.classified(purified, noise) / scale)
