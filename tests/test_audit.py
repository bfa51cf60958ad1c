"""An audit catches every defense of the zoo for the right reason, and lets honest ones pass."""

import json
import re
from dataclasses import replace
from itertools import product

import flattering as zoo
import pytest
import torch
from conftest import Curved, keyed

import lit_purify as lp
from lit_purify.attacks import APGD, PGD, DiffHammer, Queries
from lit_purify.attacks.base import at_cost
from lit_purify.checks.audit import CHECKS
from lit_purify.checks.audited import Audited, judged
from lit_purify.checks.findings import Memory, holm, least_samples, sign_flip
from lit_purify.cli import evaluate
from lit_purify.defense import (
    BPDA,
    AttackView,
    DefendedClassifier,
    Exact,
    Gradient,
    HeterogeneousPurifier,
    MinMaxThreshold,
    Surrogate,
    UniformPurifier,
)
from lit_purify.errors import InputError
from lit_purify.functional.chunks import logits_in_chunks
from lit_purify.functional.noise import ATTACK, EVALUATION, START_STEP, FrozenNoise, KeyedNoise

EPS = 0.1


def audited(defended, attack, gradient=None, low=0.02, high=0.2, count=32, runs=4, **arguments):
    """Findings by check."""
    image, label, _ = zoo.samples(count, low, high)
    return by_check(defended, attack, gradient, image, label, runs=runs, chunk=max(16, count * attack.eot), **arguments)


def by_check(defended, attack, gradient, image, label, **arguments):
    view, arguments = (gradient or Exact()).attacked(defended), {"proposals": 20, **arguments}
    findings = list(Audited("it", view, attack, image, label, torch.arange(len(image)), **arguments).findings(CHECKS))
    found = {finding.check: finding for finding in findings}
    assert len(found) == len(findings)
    return found


def failed(rows):
    return {check for check, row in rows.items() if row.verdict == "fail"}


def pgd(**changes):
    return PGD("linf", EPS, **{"steps": 10, "step_size": 0.02, **changes})


# Judgement


def enumerated(counts):
    """The definition: all signs, one by one."""
    sums = [
        sum(s * abs(c) for s, c in zip(signs, counts, strict=True)) for signs in product((-1, 1), repeat=len(counts))
    ]
    return sum(total >= sum(counts) for total in sums) / len(sums)


@pytest.mark.parametrize("counts", [[1], [4, -1, 2, 0, 3, 3, -2], [-3, -1], [2, -2, 1, 1, 0], [1, 2, 3, 4, 5, 6, 7, 8]])
def test_sign_flip_is_the_share_of_all_signs_with_as_large_a_sum(counts):
    assert sign_flip(torch.tensor(counts) / 8, 8) == pytest.approx(enumerated(counts), abs=1e-12)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_a_failure_needs_size_and_significance():
    assert judged(0.2, 0.01) == "fail"
    assert judged(0.2, 0.06) == "note"
    assert judged(0.05, 1e-9) == "pass"
    assert judged(-0.3, 1e-9) == "pass"


def test_fixed_noise_is_one_draw_for_each_row():
    keys = (7, torch.tensor([3, 8]), torch.zeros(2, dtype=torch.int64))
    like = torch.zeros(6, 1, 2, 2)
    one = KeyedNoise(*keys).normal(0, like[:2])
    assert torch.equal(FrozenNoise(*keys).runs([4, 5, 6]).normal(0, like), one.repeat_interleave(3, dim=0))
    rows = torch.tensor([1, 0, 1])
    assert torch.equal(FrozenNoise(*keys).rows(rows).runs([9]).normal(0, like[:3]), one[rows])
    # What an attack draws for itself still differs.
    own, fresh = (kind(*keys).runs([4, 5]).uniform(START_STEP, like[:4]) for kind in (FrozenNoise, KeyedNoise))
    assert torch.equal(own, fresh)


# Honest


def test_an_honest_linear_classifier_passes_with_the_robust_accuracy_that_it_has():
    """A sample withstands if and only if m > eps; at twice eps if m > 2 eps; at 1/2 none does."""
    _, _, margin = zoo.samples(32, 0.02, 0.3)
    rows = audited(zoo.defense(), pgd(), high=0.3)
    assert not failed(rows)
    assert rows["reference"].figure == pytest.approx(float((margin > EPS).double().mean()))
    assert rows["unbounded"].figure == 0.0
    assert rows["wider"].figure == pytest.approx(-rows["reference"].figure)
    stronger = ["more_steps", "restarts", "transfer", "loss_ce", "loss_dlr"]
    assert [rows[check].figure for check in stronger] == [0.0] * len(stronger)
    assert rows["noise"].figure < -0.2
    assert {"fresh_draws", "more_eot", "vote", "bpda", "exact", "scaled"}.isdisjoint(rows)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_honest_randomized_defense_passes(norm):
    eps = EPS if norm == "linf" else 0.5
    rows = audited(zoo.defense(zoo.Blurred), PGD(norm, eps, 10, eps / 4, eot=4, loss="ce"))
    assert not failed(rows)
    assert rows["fresh_draws"].figure == 40
    assert {"frozen_noise", "more_eot", "vote", "worst", "bpda", "scaled"} < set(rows)


def tiny_network(purifier, classifier, images, attack):
    label = classifier(images).argmax(dim=1)
    return by_check(DefendedClassifier(purifier, classifier), attack, None, images, label, runs=2, chunk=16)


def test_an_honest_purifier_with_a_tiny_network_passes(classifier, images):
    attack = PGD("linf", 0.05, 5, 0.02, eot=2)
    assert not failed(tiny_network(UniformPurifier(Curved(), 60, 2), classifier, images, attack))


def test_masks_are_ablated_and_attacked(classifier, images):
    purifier = HeterogeneousPurifier(Curved(), MinMaxThreshold(0.4), 60, 30, 2)
    rows = tiny_network(purifier, classifier, images[:3], PGD("linf", 0.05, 2, 0.03, loss="ce"))
    for name in ("mask_ones", "mask_zeros", "mask_random"):
        assert (rows[name].verdict, rows[name].limit) == ("note", None)
    assert {"mask_straight_through", "mask_soft", "mask_shift"} < set(rows)


def test_a_ball_that_cannot_be_widened_is_reported(classifier, images):
    rows = tiny_network(UniformPurifier(Curved(), 60, 1), classifier, images[:2], PGD("linf", 0.3, 1, 0.3))
    assert rows["wider"].verdict == "not applicable"


def test_where_an_attack_states_no_stronger_version_the_check_is_not_applicable():
    """Nothing is left out without a word, and nothing that belongs to no attack is poked at."""
    lazy = zoo.Lazy("linf", EPS)
    lazy.step_size, before = 0.3, {**vars(lazy), "step_size": 0.3, "domain": None}
    rows = audited(zoo.defense(zoo.Blurred), lazy)
    absent = {check: row.reason for check, row in rows.items() if row.verdict == "not applicable"}
    assert set(absent) == {
        "unbounded",
        "wider",
        "more_steps",
        "more_eot",
        "restarts",
        "loss_ce",
        "loss_margin",
        "loss_dlr",
    }
    assert absent["more_steps"] == "Lazy has no version with other steps"
    assert str(rows["more_steps"]).startswith("n/a ")
    assert {"vote", "worst"} & failed(rows)
    assert vars(lazy) == before


# Flattering

ZOO = {
    "quantized": (zoo.defense(zoo.Quantized), pgd(), None, {"nonzero", "zero_share", "bpda", "transfer", "unbounded"}),
    "cut": (zoo.defense(zoo.Cut), pgd(), None, {"finite_differences", "nonzero", "attackable"}),
    "misleading": (zoo.defense(zoo.Misleading), pgd(), None, {"finite_differences", "bpda", "transfer", "unbounded"}),
    "plateaus": (zoo.defense(zoo.Plateaus), pgd(), None, {"bpda", "transfer", "unbounded"}),
    "frozen for the attack": (zoo.defense(zoo.FrozenForTheAttack), pgd(eot=4), None, {"fresh_draws", "same_noise"}),
    "frozen by the attack": (
        zoo.defense(zoo.Shaken),
        zoo.FrozenPGD("linf", EPS, 10, 0.02, eot=4),
        None,
        {"fresh_draws"},
    ),
    "saturated": (zoo.defense(scale=1e5), pgd(loss="ce"), None, {"loss_margin", "loss_dlr", "scaled"}),
    "a single draw": (zoo.defense(zoo.Shaken), pgd(steps=2, step_size=0.1), None, {"more_eot", "vote"}),
    "cut short": (zoo.defense(), pgd(steps=2), None, {"more_steps"}),
    "weak when attacked": (zoo.defense(zoo.WeakWhenAttacked), pgd(), None, {"same_model"}),
    "votes when defending": (zoo.defense(zoo.VotesWhenDefending), pgd(eot=4), None, {"same_model"}),
    "other levels": (zoo.defense(UniformPurifier, level=200, steps=1), pgd(), zoo.OtherLevels(), {"same_model"}),
    "wrong stand-in": (zoo.defense(), pgd(), zoo.Stale(), {"exact"}),
    "negative": (zoo.defense(zoo.Negative), pgd(), BPDA(), {"exact", "noise", "wider", "unbounded"}),
    "saturated and torn": (zoo.defense(zoo.Torn, scale=1e7), pgd(eot=8), None, {"vote"}),
    "rare": (zoo.defense(zoo.Rare), pgd(eot=8), None, {"worst"}),
    "scattered": (zoo.scattered(), pgd(eot=8), None, {"hammer"}),
    "other under attack": (zoo.defense(zoo.OtherUnderAttack), pgd(eot=4), None, {"same_noise"}),
    "half a view": (zoo.defense(), pgd(), zoo.HalfView(), {"same_gradient", "exact"}),
    "torn": (zoo.defense(zoo.Torn), pgd(eot=8), None, {"vote"}),
    "steered": (zoo.defense(zoo.Steered), pgd(), None, {"mask_straight_through", "mask_shift"}),
}
MARGINS = {"a single draw": (0.05, 0.12), "torn": (0.11, 0.15)}
MARGINS |= {"saturated and torn": (0.11, 0.15), "rare": (0.11, 0.15), "scattered": (0.3, 0.3)}
CAUSES = {"same_model", "same_gradient", "same_noise", "fresh_draws", "more_steps", "more_eot", "exact"}
"""Checks that name what is wrong with the set-up; those of others may fail along with them."""


@pytest.mark.parametrize("name", ZOO)
def test_flattering_defenses_are_caught_for_the_right_reason(name):
    defended, attack, gradient, expected = ZOO[name]
    low, high = MARGINS.get(name, (0.02, 0.2))
    rows = audited(defended, attack, gradient, low, high, runs=4 if high > 0.15 or name == "a single draw" else 9)
    assert expected <= failed(rows), {check: row.reason for check, row in rows.items()}
    # Nobody is blamed for what another does.
    assert failed(rows) & CAUSES <= expected


def test_attacks_of_equal_cost_are_compared():
    """By the queries that they state: as many steps as fit, and the strongest that passes is at least no weaker."""
    for kind in (APGD("linf", EPS, 1, 3), DiffHammer("linf", EPS, 1, EPS, 6), PGD("linf", EPS, 1, EPS, 5, restarts=2)):
        for budget in (Queries(80, 80), Queries(501, 0), Queries(3, 1)):
            other = at_cost(kind, budget)
            assert other.queries.cost <= budget.cost or other.steps == 1
            assert other.stronger(steps=other.steps + 1).queries.cost > budget.cost
    rows = audited(zoo.defense(zoo.Blurred), pgd(eot=4), count=16)
    assert rows["hammer"].verdict == rows["apgd"].verdict == "pass"
    assert "at equal cost" in rows["hammer"].reason

    class Whole(DefendedClassifier):
        def forward(self, image, noise=None, mask=None):
            return super().forward(image, noise, mask)

    # In one part: DiffHammer differentiates all its ten draws.
    rows = audited(Whole(zoo.Blurred(zoo.Idle()), zoo.classifier()), pgd(eot=4), count=16)
    assert "(40 + 40 queries)" in rows["hammer"].reason
    rows = audited(zoo.defense(zoo.Blurred), DiffHammer("linf", EPS, 10, 0.02, eot=4), count=16)
    assert "hammer" not in rows


def test_pgd_misses_scattered_vulnerabilities_and_diffhammer_finds_them():
    """Every sample keeps all draws under PGD + EOT, and most lose those of one class of four under DiffHammer."""
    image, label, _ = zoo.samples(16, 0.3, 0.3)
    model, noise = zoo.scattered(), keyed(16, stream=ATTACK)
    left = []
    for attack in (pgd(eot=8), DiffHammer("linf", EPS, 18, 0.02)):
        adversarial = attack(model, image, label, noise, 64)
        fresh = replace(noise, stream=EVALUATION)
        predictions = logits_in_chunks(model.attacked(), adversarial, fresh, list(range(64)), 64).argmax(dim=2)
        left.append(float((predictions == label[:, None]).double().mean()))
    assert left[0] > 0.95
    assert 0.7 < left[1] < 0.9


def test_the_black_box_finds_what_a_shattered_gradient_hides():
    rows = audited(zoo.defense(zoo.Quantized), pgd(), proposals=400)
    assert "black_box" in failed(rows)


def test_a_stated_surrogate_is_no_failure_where_the_exact_gradient_is_no_stronger():
    rows = audited(zoo.defense(UniformPurifier, level=20, steps=2), pgd(eot=2), Surrogate(1), count=16)
    assert (rows["same_model"].verdict, rows["exact"].verdict) == ("note", "pass")
    assert not failed(rows)


def test_a_view_that_walks_other_levels_to_the_same_logits_is_another_model():
    class Boasting(Gradient):
        def attacked(self, defended):
            return AttackView(defended, defended.attacked(), "exact", "none", 1, [100])

    assert failed(audited(zoo.defense(), pgd(), Boasting(), count=8)) == {"same_model"}


def test_randomness_that_the_samples_themselves_do_not_show_is_seen():
    rows = audited(zoo.defense(zoo.Halves), pgd(steps=2, eot=2), count=8)
    assert {"fresh_draws", "more_eot"} < set(rows)


def test_frozen_noise_says_how_much_is_owed_to_randomness():
    """One draw for attack and defense leaves a linear classifier, whose noise the attacker knows."""
    rows = audited(zoo.defense(zoo.Shaken), pgd(eot=4), low=0.05, high=0.12)
    assert rows["frozen_noise"].verdict == "note"
    assert rows["frozen_noise"].figure > 0.2


@pytest.mark.parametrize("comparisons", [1, 7, 15])
def test_from_the_least_number_on_half_of_the_samples_are_significant(comparisons):
    def adjusted(count):
        lost = torch.cat([torch.ones(count // 2), torch.zeros(count - count // 2)])
        return holm([sign_flip(lost, 1)] + [1.0] * (comparisons - 1))[0]

    least = least_samples(comparisons, 0.05)
    assert adjusted(least) <= 0.05 < adjusted(least - 2)


# The function and the command


def test_the_verdict_over_all_defenses():
    image, label, _ = zoo.samples(32)
    defenses, said = {"sound": zoo.defense(), "rounding": zoo.defense(zoo.Quantized)}, {"runs": 2, "proposals": 2}
    few = lp.audit(zoo.classifier(), defenses["sound"], pgd(steps=2), image, label, samples=4, **said)
    assert (few.verdict, few.passed) == ("undecided", False)
    assert re.fullmatch(r"UNDECIDED: 4 samples .*: use \d+ or more \(samples\)", few.conclusion)
    both = lp.audit(zoo.classifier(), defenses, pgd(), image, label, **said)
    assert both.verdict == "failed"
    assert both.conclusion.startswith("FAILED: not to be believed: rounding (")
    assert {finding.defense for finding in both.failed} == {"rounding"}
    assert str(both).splitlines()[-1] == both.conclusion
    sound = lp.audit(zoo.classifier(), {"sound": defenses["sound"]}, pgd(), image, label, **said)
    assert sound.passed
    # Findings of a defense do not depend on the others.
    assert list(sound) == [finding for finding in both if finding.defense == "sound"]


@pytest.mark.parametrize(
    ("attack", "options", "message"),
    [
        (pgd(), {"samples": 0}, "samples = 0: use at least 1"),
        (pgd(), {"runs": 0}, "runs = 0: use at least 1"),
        (lp.Square("linf", EPS, 2), {}, "Square follows no gradient of the defense"),
        (lp.ForeignAttack(lambda model, x, y: x, "linf", EPS), {}, "ForeignAttack follows no gradient"),
    ],
)
def test_bad_input_is_refused(attack, options, message):
    image, label, _ = zoo.samples(4)
    with pytest.raises(InputError, match=message):
        lp.audit(zoo.classifier(), zoo.defense(), attack, image, label, **options)


def test_the_command_writes_its_verdict_and_touches_no_records(tiny, capsys):
    arguments = tiny({"it": {"class_path": "UniformPurifier", "level": 20, "steps": 1}})
    evaluate(arguments)
    before = {path.name: path.read_bytes() for path in tiny.run.iterdir() if path.is_file()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        evaluate(["audit", *arguments, "--samples", "2", "--audit_runs", "2", "--proposals", "2"])
    assert exit_.value.code == 1
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("Audit of pgd (PGD on the margin loss")
    # Of two samples no test can say anything.
    assert re.fullmatch(r"audit: UNDECIDED: 2 samples .*: use 18 or more \(samples\)", lines[-1])
    after = {path.name: path.read_bytes() for path in tiny.run.iterdir() if path.is_file()}
    found = json.loads(after.pop("audit.json"))
    # The report shows it; nothing else has changed.
    assert b"not checked" in before.pop("report.html")
    assert b'Audit of the attack</dt><dd><span class="badge shaken">undecided' in after.pop("report.html")
    assert after == before
    assert (found["passed"], found["attack"], found["samples"], found["runs"]) == (False, "pgd", [0, 1], 2)
    assert set(found["checks"][0]) == {"defense", "check", "figure", "limit", "verdict", "reason"}
    assert [line.split()[1:3] for line in lines[1:-1]] == [["it", c["check"]] for c in found["checks"]]
    # The same settings have the same hash as in the other verdict.
    evaluate(["gradcheck", *arguments, "--samples", "1"])
    assert json.loads((tiny.run / "gradcheck.json").read_text())["settings_sha256"] == found["settings_sha256"]


def test_a_dry_run_counts_the_calls_that_an_audit_makes(tiny, capsys, monkeypatch):
    """By calls of the denoiser in rows; checks of gradients, probes and the padding of chunks are not counted."""
    rows, forward = [], Curved.forward
    monkeypatch.setattr(Curved, "forward", lambda self, x, t: rows.append(len(x)) or forward(self, x, t))
    purifier = {"class_path": "UniformPurifier", "level": 20, "steps": 2, "recompute": False}
    attack = {"class_path": "PGD", "eps": 0.1, "steps": 10, "step_size": 0.1}
    command = ["audit", *tiny({"it": purifier}, {"pgd": attack}, samples=4)]
    command += ["--samples", "4", "--audit_runs", "4", "--proposals", "20", "--chunk", "4"]
    evaluate([*command, "--dry_run"])
    said = capsys.readouterr().out
    assert not tiny.run.exists()
    found = re.search(r"it +([\d,]+) network calls a sample, [\d,]+ of them differentiated, .* s\n", said)
    calls = int(found[1].replace(",", ""))
    assert said.endswith("Nothing was written.\n")
    assert sum(rows) < 0.5 * 4 * calls
    rows.clear()
    with pytest.raises(SystemExit):
        evaluate(command)
    assert sum(rows) == pytest.approx(4 * calls, rel=0.2)


def test_an_interrupted_audit_goes_on(tmp_path):
    """Measured comparisons are not repeated, a torn line is; other settings start from the beginning."""
    calls = []

    def compute():
        calls.append(1)
        return torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64)

    path = tmp_path / "audit.partial.jsonl"
    Memory(path, "this")("paper: noise", compute)
    with path.open("a") as stream:
        stream.write('["paper: restarts", [[1.0')
    again = Memory(path, "this")
    assert set(again.known) == {"paper: noise"}
    assert torch.equal(again("paper: noise", compute), compute())
    assert len(calls) == 2
    again("paper: restarts", compute)
    assert set(Memory(path, "this").known) == {"paper: noise", "paper: restarts"}
    assert Memory(path, "other").known == {}
