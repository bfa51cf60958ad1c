"""From records to figures: fewer runs than were made, and several attacks as one."""

from dataclasses import replace

import pytest

from lit_purify.evaluation import Record
from lit_purify.report.summary import ensembles, summarize, table


def described(defense, attack, **changes):
    facts = {"attack_title": "PGD", "norm": "linf", "eps": 0.1, "attack_steps": 10, "eot": 4, "gradient": "exact"}
    facts |= {"nfe_defense": 2, "nfe_attack": 2, "levels": [], "stopping": "runs on"}
    return {"defense": defense, "attack": attack, **facts, **changes}


ATTACKS = {"a": [[1, 1, 1, 0], [0, 0, 0, 1]], "b": [[0, 0, 1, 1], [1, 1, 1, 1]], "l2": [[0] * 4, [0] * 4]}
OTHER = {"a": [[1, 1, 1, 1], [0, 0, 0, 0]], "b": [[1, 1, 1, 1], [1, 1, 1, 1]], "l2": [[1] * 4, [1] * 4]}
RECORDS = [
    Record(defense, attack, index, 1, [1, 1, 1, index], predictions[index], 0.1, 1.0, 1.0)
    for defense, attacks in (("first", OTHER), ("second", ATTACKS))
    for attack, predictions in attacks.items()
    for index in (0, 1)
]
DESCRIBED = [
    described(defense, attack, **changes)
    for defense in ("first", "second")
    for attack, changes in (
        ("a", {"stopping": "stops early"}),
        ("b", {"gradient": "none", "attack_steps": 5, "eot": 8}),
        ("l2", {"norm": "l2", "eps": 1.0}),
    )
]
FACTS = {"dataset": "Tiny", "split": "test", "samples": 2, "runs": 4, "classifier": "net"}


@pytest.fixture(scope="module")
def summary():
    return summarize(RECORDS, DESCRIBED, FACTS, "first")


def test_ensemble_of_each_threat_model(summary):
    assert [(r["defense"], r["attack"]) for r in summary["results"][6:]] == [
        (d, "ensemble") for d in ("first", "second")
    ]
    found = summary["results"][-1]
    assert found["attacks"] == ["a", "b"]
    assert (found["norm"], found["attack_steps"], found["eot"], found["gradient"]) == ("linf", 15, 8, "exact")
    assert found["seconds"] == 4.0
    assert found["stopping"].startswith("a: stops early; b: runs on")
    assert [found["robust"][rule][0] for rule in ("average", "worst", "majority")] == [0.375, 0.0, 0.0]
    # Against the ensemble of the other defense: a loses its second sample in every run.
    assert found["robust_difference"]["average"][0] == pytest.approx(0.375 - 0.5)
    assert found["clean"] == summary["results"][3]["clean"]
    # Of single attacks the difference is to the baseline under the same attack.
    assert "robust_difference" not in summary["results"][0]
    assert [r["robust_difference"]["average"][0] for r in summary["results"][3:5]] == pytest.approx([0.0, -0.25])
    # Right in one clean run of the first sample instead of three.
    wrong = [replace(r, clean=[1, 0, 0, 0]) if (r.defense, r.index) == ("second", 0) else r for r in RECORDS]
    less = summarize(wrong, DESCRIBED, FACTS, "first")["results"][-1]["clean_difference"]
    assert [less[rule][0] for rule in ("average", "worst", "majority")] == pytest.approx([-0.25, 0.0, -0.5])
    # Steps, draws and masks are those of its attacks, whose lines stand above.
    assert "\nensemble: linf <= 0.1\nfor each sample the best of a, b\n" in table(summary)


def test_attacks_are_compared_on_the_same_samples(summary):
    """With the first of their threat model."""
    found = {(r["defense"], r["attack"]): r.get("attack_difference") for r in summary["results"]}
    assert {pair for pair, less in found.items() if less} == {("first", "b"), ("second", "b")}
    less = found["second", "b"]
    assert less["to"] == "a"
    # a: right in 3 and 1 of four runs, b: in 2, which is a tie, and 4.
    assert [less[rule][0] for rule in ("average", "worst", "majority")] == pytest.approx([0.25, 0.5, 0.0])
    assert found["first", "b"]["average"][0] == 0.5


def test_rows_that_repeat_an_earlier_attack_are_marked():
    """As with skip_lost: the second sample is lost to a."""
    records = [replace(r, lost_to="a") if (r.attack, r.index) == ("b", 1) else r for r in RECORDS]
    found = summarize(records, DESCRIBED, FACTS, "first")
    assert [(r["attack"], r.get("repeated")) for r in found["results"][3:6]] == [("a", None), ("b", 1), ("l2", None)]
    assert not any("repeated" in r for r in found["results"][6:])
    # What b leaves of the samples that it was not tried on is no property of b.
    assert not any("attack_difference" in r for r in found["results"])
    printed = table(found)
    rows = [line for line in printed.splitlines() if line.startswith("second")]
    assert [row.split()[1] == "*" for row in rows] == [False, True, False, False]
    assert "*: samples that an earlier attack left wrong in all runs were not attacked again" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_average_of_an_ensemble_is_bracketed(summary):
    found = summary["results"][-1]
    # Sample 0, a against b on the runs that are not left out: 2 to 2 twice, the first judges (right); 2 to 1 and 3 to
    # 1, b judges (right). Sample 1: a judges throughout.
    assert found["robust_average_held_out"][0] == pytest.approx(((1 + 1 + 1 + 1) / 4 + 0.25) / 2)
    assert "robust_average_held_out" not in summary["results"][0]


def test_resubmission_begins_with_the_average_and_ends_with_the_worst(summary):
    for result in summary["results"]:
        for kind in ("clean", "robust"):
            rows = result["resubmission"][kind]
            assert [row[0] for row in rows] == [1, 2, 4]
            assert rows[0][1:] == pytest.approx(result[kind]["average"])
            assert rows[-1][1:] == pytest.approx(result[kind]["worst"])
            assert rows[1][2] <= rows[1][1] <= rows[1][3]
            votes = result["vote"][kind]
            assert votes[0][1:] == pytest.approx(result[kind]["average"])
            assert votes[-1][1:] == pytest.approx(result[kind]["majority"])
    # Two of four runs: 3 right give 3 of 6 pairs, 1 right none.
    assert summary["results"][3]["resubmission"]["robust"][1][1] == pytest.approx((0.5 + 0.0) / 2)


def test_each_of_several_threat_models_has_its_ensemble():
    radii = (("a", 0.1), ("b", 0.1), ("c", 0.2), ("d", 0.2))
    facts = [described("d", name, eps=eps, stopping="") for name, eps in radii]
    assert [each["attack"] for each in ensembles(facts)] == ["ensemble-linf-0.1", "ensemble-linf-0.2"]
    assert ensembles(facts[:1]) == []
    for gradients, strongest in ((("none", "surrogate"), "surrogate"), (("bpda", "theirs"), "theirs")):
        same = [described("d", name, gradient=gradient) for name, gradient in zip("ab", gradients, strict=True)]
        assert ensembles(same)[0]["gradient"] == strongest


def test_the_undefended_accuracy_is_that_of_no_defense():
    """Other defenses may need no network call either."""
    facts = [{**each, "nfe_defense": 0, "undefended": each["defense"] == "second"} for each in DESCRIBED]
    found = summarize(RECORDS, facts, FACTS, "first")
    assert found["undefended_clean_accuracy"] == found["results"][3]["clean"]["average"][0]
    assert summarize(RECORDS, DESCRIBED, FACTS, "first")["undefended_clean_accuracy"] is None


def test_an_attack_of_another_library_states_no_steps():
    facts = [{**each, "gradient": "theirs"} for each in DESCRIBED]
    assert "\na: linf <= 0.1, their own gradient\nPGD\n" in table(summarize(RECORDS, facts, FACTS, "first"))
