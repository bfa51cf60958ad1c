import itertools
import math

import pytest
import torch
from scipy import stats

from lit_purify.functional.statistics import (
    average_interval,
    ensemble,
    held_out,
    mean_interval,
    outcomes,
    paired_difference,
    submissions,
    survival,
    vote,
    wilson,
)


def test_outcomes():
    predictions = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 2, 3], [1, 1, 0, 2], [0, 0, 0, 0]])
    label = torch.ones(6, dtype=torch.long)
    average, worst, majority = outcomes(predictions, label).unbind(dim=1)
    assert average.tolist() == [1.0, 0.75, 0.5, 0.25, 0.5, 0.0]
    assert worst.tolist() == [1, 0, 0, 0, 0, 0]
    # A tie is not a majority.
    assert majority.tolist() == [1, 1, 0, 0, 1, 0]


@pytest.mark.parametrize(("right", "count"), [(0, 10), (3, 10), (10, 10), (256, 512)])
def test_wilson_agrees_with_scipy(right, count):
    ours = wilson(right / count, count)
    theirs = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert ours.low == pytest.approx(theirs.low, abs=1e-9)
    assert ours.high == pytest.approx(theirs.high, abs=1e-9)
    assert ours.low <= ours.value <= ours.high


def test_average_interval_reduces_to_wilson_for_one_run_and_never_collapses():
    assert average_interval(30, 30, 100, 1) == pytest.approx(wilson(0.3, 100))
    for total in (0.0, 50.0, 100.0):
        interval = average_interval(total, total**2 / 100, 100, 8)
        assert interval.high - interval.low > 0.005
    assert math.isnan(average_interval(0, 0, 0, 8).value)
    # Runs of equal shares are at most as many independent trials.
    assert average_interval(50.0, 25.001, 100, 8) == pytest.approx(wilson(0.5, 800))
    # The effective number of samples is by their sample variance: here of the shares 0, 1/2, 1/2, 1.
    assert average_interval(2.0, 1.5, 4, 8) == pytest.approx(wilson(0.5, 0.25 * 4 / (0.5 / 3)))


@pytest.mark.parametrize("draws", [1, 4])
def test_intervals_cover(draws):
    """Of 8 runs M count: the true chance to be right in all of them lies inside about 95 % of the time."""
    generator = torch.Generator().manual_seed(0)
    inside, label = 0, torch.ones(100, dtype=torch.long)
    for _ in range(300):
        u = torch.rand(100, generator=generator)
        chance = torch.where(u < 0.3, 0.0, torch.where(u < 0.7, 1.0, 0.7))
        predictions = (torch.rand(100, 8, generator=generator) < chance[:, None]).long()
        interval = mean_interval(survival(predictions, label, draws), 8)
        inside += interval.low <= 0.4 + 0.3 * 0.7**draws <= interval.high
    assert 0.92 <= inside / 300 <= 0.985


def test_paired_difference_covers_and_has_width():
    generator = torch.Generator().manual_seed(0)
    same = paired_difference(torch.ones(20), torch.ones(20))
    assert same.value == 0.0
    assert same.low < 0.0 < same.high
    inside = 0
    for _ in range(400):
        u = torch.rand(80, generator=generator)
        first, second = (u < 0.6).double(), ((u > 0.05) & (u < 0.75)).double()
        interval = paired_difference(first, second)
        inside += interval.low <= 0.7 - 0.6 <= interval.high
    assert 0.92 <= inside / 400 <= 0.985


@pytest.mark.parametrize(("runs", "stated"), [(1, [1]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_fewer_runs_are_all_subsets_of_the_runs(runs, stated):
    """The mean of ``outcomes`` over every choice of M runs: without bias by definition."""
    assert submissions(runs) == stated
    generator = torch.Generator().manual_seed(runs)
    predictions = torch.cat([torch.randint(0, classes, (8, runs), generator=generator) for classes in (1, 2, 3, 4)])
    label = torch.zeros(len(predictions), dtype=torch.long)
    for draws in range(1, runs + 1):
        subsets = torch.stack(
            [outcomes(predictions[:, list(chosen)], label) for chosen in itertools.combinations(range(runs), draws)]
        ).mean(dim=0)
        torch.testing.assert_close(survival(predictions, label, draws), subsets[:, 1])
        torch.testing.assert_close(vote(predictions, label, draws), subsets[:, 2])


def test_ensemble_is_the_best_attack_of_each_sample_by_each_rule():
    first = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]])
    second = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
    label = torch.ones(3, dtype=torch.long)
    found = ensemble(torch.stack([outcomes(first, label), outcomes(second, label)]))
    assert found.tolist() == [[0.5, 0, 0], [0.25, 0, 0], [1, 1, 1]]


def test_held_out_attack_does_not_gain_by_chance():
    """Equal attacks: the lowest of noisy counts is too low, within the stated bound; a choice on other runs is not."""
    right = torch.rand(2, 20000, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    bias = 0.5 - float(right.double().mean(dim=2).amin(dim=0).mean())
    assert 0.5 * 0.177 < bias <= math.sqrt(0.25 / 8)
    assert float(held_out(right).mean()) == pytest.approx(0.5, abs=0.006)


def test_held_out_by_hand():
    right = torch.tensor([[[1, 0, 1]], [[1, 1, 1]]])
    # Left out is the first run: 1 and 2 of the others are right, the first attack judges, right. The second: 2 and 2, a
    # tie, the first attack judges, wrong. The third is as the first.
    assert float(held_out(right)) == pytest.approx((1 + 0 + 1) / 3)
    equal = torch.tensor([[[1, 0]], [[1, 1]]])
    # Left out is the first: 0 and 1 are left, the first judges, right. The second: a tie, the first judges, wrong.
    assert float(held_out(equal)) == pytest.approx((1 + 0) / 2)
    # What comes after an attack that leaves nothing changes nothing.
    lost = torch.zeros(1, 1, 2)
    assert float(held_out(torch.cat([equal, lost]))) == float(held_out(torch.cat([equal, lost, equal])))
