"""Families of defenses at equal clean accuracy: the geometry, its intervals, and where they are shown."""

import math

import pytest
import torch
from made_runs import cells
from scipy.optimize import linprog
from test_summary import described

from lit_purify.evaluation import Record
from lit_purify.functional.frontier import bootstrap, envelope, gap, on_envelope
from lit_purify.report import summary
from lit_purify.report.finished import FinishedRun
from lit_purify.report.html import page
from lit_purify.report.summary import compared, families, signed, summarize, table


def at(points, *clean):
    count = len(clean)
    return envelope(torch.tensor(points).expand(count, -1, -1), torch.tensor(clean))


def test_interpolation_by_hand():
    points = [[0.9, 0.2], [0.8, 0.6], [0.6, 0.7]]
    # Halfway between two neighbors; at a point; less clean than the most robust.
    torch.testing.assert_close(at(points, 0.85, 0.7, 0.8, 0.5), torch.tensor([0.4, 0.65, 0.6, 0.7]))
    assert at(points, 0.91).isnan().all()
    # A point below the line of its neighbors is skipped.
    torch.testing.assert_close(at([[0.9, 0.2], [0.8, 0.3], [0.6, 0.8]], 0.8), torch.tensor([0.4]))


def test_envelope_is_the_best_mixture():
    """Against a linear program over all mixtures that are clean enough."""
    points = torch.rand(20, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clean = points[..., 0].amin(dim=1) * 0.4 + points[..., 0].amax(dim=1) * 0.6
    for cloud, x, found in zip(points, clean, envelope(points, clean), strict=True):
        best = linprog(-cloud[:, 1], A_ub=-cloud[None, :, 0], b_ub=[-float(x)], A_eq=[[1.0] * 5], b_eq=[1.0])
        assert float(found) == pytest.approx(-best.fun, abs=1e-9)


def test_points_on_the_envelope():
    points = torch.tensor([[0.9, 0.2], [0.8, 0.3], [0.6, 0.8], [0.5, 0.8], [0.6, 0.8], [0.75, 0.5], [0.8, 0.7]])
    assert on_envelope(points).tolist() == [True, False, False, False, True, False, True]
    assert on_envelope(points[:1]).tolist() == [True]


def test_gap_of_a_shifted_family_is_the_shift():
    first = torch.tensor([[[0.9, 0.2], [0.8, 0.6], [0.6, 0.7]]], dtype=torch.float64)
    second = first + torch.tensor([0.0, 0.125])
    assert float(gap(first, second)) == pytest.approx(0.125)
    other = torch.rand(1, 4, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert float(gap(first, other)) == pytest.approx(-float(gap(other, first)))
    # A family that is nowhere as clean is compared at what it reaches.
    assert float(gap(first, torch.tensor([[[0.5, 0.75]]], dtype=torch.float64))) == pytest.approx(0.05)


def simulated(seed, shift, samples=100, runs=4):
    """Two families of four points each on one curve, for samples of different difficulty; the second is shifted up."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.tensor([0.2, 0.5, 0.8, 1.1] * 2, dtype=torch.float64)
    typical = torch.stack([2.5 - 2.0 * level, -1.0 + 3.2 * level - 1.6 * level**2], dim=1)
    difficulty = torch.randn(samples, 1, 2, generator=generator, dtype=torch.float64)
    chance = torch.sigmoid(typical + 2.0 * difficulty)
    chance[:, 4:, 1] = (chance[:, 4:, 1] + shift).clamp(max=1.0)
    return torch.binomial(torch.full_like(chance, runs), chance, generator=generator) / runs


NAMES = [f"{family}/{k}" for family in "ab" for k in range(4)]


def comparison(shares):
    (found,) = compared(shares, NAMES)
    return found


def test_equal_families_are_seldom_told_apart_and_a_shift_is_found(monkeypatch):
    monkeypatch.setattr(summary, "_RESAMPLES", 200)
    equal = [comparison(simulated(seed, 0.0))["verdict"] for seed in range(60)]
    assert 52 <= equal.count("not distinguishable") <= 59
    shifted = [comparison(simulated(seed, 0.15)) for seed in range(10)]
    assert [found["verdict"] for found in shifted] == ["above"] * 10
    # Of the shift a little is lost where accuracies end at 1.
    assert sum(found["difference"][0] for found in shifted) / 10 == pytest.approx(0.14, abs=0.02)


@pytest.mark.parametrize(("missing", "stated"), [(5, True), (6, False)])
def test_no_interval_on_the_condition_that_there_is_a_difference(missing, stated):
    """Of a point that is cleaner than the other family in more than one resample of twenty."""
    draws = torch.tensor([[[0.9, 0.2], [0.8 if k < missing else 0.95, 0.3]] for k in range(100)], dtype=torch.float64)
    found = bootstrap(draws[-1], draws, 100, lambda p: p[:, 0, 1] - envelope(p[:, 1:], p[:, 0, 0]))
    assert all(math.isnan(value) != stated for value in found)


def test_families_are_named_before_a_slash():
    assert families(["none", "a/1", "b/1", "a/2", "a/1"]) == {"a": ["a/1", "a/2"], "b": ["b/1"]}
    assert families(["a/1", "a/2", "none"]) == families(["a/1", "b/1"]) == families(["a-1", "a-2", "b-1"]) == {}


def test_a_summary_compares_families_and_says_so():
    """The second family survives in every run where the first loses half of its samples."""
    names = ["none", "a/weak", "a/strong", "b/only"]

    def record(name, attack, k):
        clean, robust = [1] * 4, [1 if name == "b/only" else k % 2] * 4
        clean = [int(k % 4 > 0)] * 4 if name == "a/strong" else clean
        return Record(name, attack, k, 1, clean, robust, 0.1, 1.0, 1.0)

    pairs = [(name, attack) for name in names for attack in ("m", "c")]
    records = [record(*pair, k) for pair in pairs for k in range(40)]
    facts = {"dataset": "Tiny", "samples": 40, "runs": 4, "classifier": "net"}
    found = summarize(records, [described(*pair) for pair in pairs], facts, "none")
    assert list(found["frontier"]) == ["m", "c", "ensemble"]
    for (each,) in found["frontier"].values():
        assert (each["family"], each["to"], each["verdict"]) == ("b", "a", "above")
        assert each["difference"][0] == pytest.approx(0.5)
    assert "b less a: +50.0 [" in table(found)
    shown = page(FinishedRun(found, records, {}))
    rows = cells(shown)["Robust average under m, difference in points"]
    assert rows[1] == ["b", "a", signed(found["frontier"]["m"][0]["difference"]), "above"]
    assert "frontier" not in table(summarize(records[:160], [described(*p) for p in pairs[:4]], facts, "none"))


def test_a_gap_begins_at_the_less_clean_of_two_peaks():
    """A family that is more robust at less clean accuracy is above for it."""
    first = torch.tensor([[[0.9, 0.2], [0.8, 0.4]]], dtype=torch.float64)
    second = torch.tensor([[[0.9, 0.2], [0.8, 0.4], [0.7, 0.6]]], dtype=torch.float64)
    # Over 0.7 .. 0.9 the first is flat from 0.8 down: a triangle of 0.1 by 0.2.
    assert float(gap(first, second)) == pytest.approx(0.5 * 0.1 * 0.2 / 0.2, abs=0.005)
