import math

import pytest
import torch
from scipy import stats

from lit_purify.functional.statistics import accuracies, average_interval, outcomes, paired_difference, wilson


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


def test_average_interval_reduces_to_wilson_for_one_run_and_never_collapses():
    assert average_interval(30, 30, 100, 1) == pytest.approx(wilson(0.3, 100))
    for total in (0.0, 50.0, 100.0):
        interval = average_interval(total, total**2 / 100, 100, 8)
        assert interval.high - interval.low > 0.005
    assert math.isnan(average_interval(0, 0, 0, 8).value)


def test_average_interval_covers():
    """Beta-distributed chance of each sample, 8 runs: the true mean lies inside about 95 % of the time."""
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(400):
        u = torch.rand(100, generator=generator)
        chance = torch.where(u < 0.5, 0.0, torch.where(u < 0.7, 1.0, 0.4))
        share = (torch.rand(100, 8, generator=generator) < chance[:, None]).double().mean(dim=1)
        interval = average_interval(float(share.sum()), float(share.square().sum()), 100, 8)
        inside += interval.low <= 0.2 + 0.3 * 0.4 <= interval.high
    assert 0.92 <= inside / 400 <= 0.985


def test_accuracies_of_independent_batches_add_up():
    predictions, label = torch.randint(0, 3, (50, 4)), torch.randint(0, 3, (50,))
    values = outcomes(predictions, label)
    found = accuracies(values.sum(dim=0), values.square().sum(dim=0), 50, 4)
    assert found.average.value == pytest.approx(float((predictions == label[:, None]).double().mean()))
    assert found.worst.value == pytest.approx(float((predictions == label[:, None]).all(dim=1).double().mean()))


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
