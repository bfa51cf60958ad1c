"""Accuracies over N runs with 95 % intervals, over fewer runs, over several attacks, and paired differences.

An evaluation runs every sample N times with fresh noise. Let c_i of the N predictions of sample i be correct. The
average accuracy is mean(c_i / N). Worst-of-N accuracy counts samples with c_i = N. Majority-vote accuracy counts
samples whose label has strictly more votes than any other class (a tie is wrong).
"""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

Z95 = 1.959963984540054


class Interval(NamedTuple):
    """An estimate with its 95 % confidence interval, all as fractions."""

    value: float
    low: float
    high: float


class Accuracies(NamedTuple):
    """Average, worst-of-N and majority-vote accuracy over the same samples."""

    average: Interval
    worst: Interval
    majority: Interval


def outcomes(predictions: Tensor, label: Tensor) -> Tensor:
    """Returns each sample's contribution to (average, worst, majority): (B, 3) float64 in [0, 1].

    Args:
        predictions: (B, N) classes.
        label: (B,).
    """
    right = predictions == label[:, None]
    votes = (predictions[:, :, None] == predictions[:, None, :]).sum(dim=2)
    rivals = votes.masked_fill(right, 0).amax(dim=1)
    share = right.double().mean(dim=1)
    return torch.stack((share, right.all(dim=1).double(), (right.sum(dim=1) > rivals).double()), dim=1)


def submissions(runs: int) -> list[int]:
    """Returns the numbers of runs M at which accuracies are reported: 1, 2, 4, ... and N."""
    return sorted({*(2**k for k in range(runs.bit_length())), runs})


def survival(predictions: Tensor, label: Tensor, draws: int) -> Tensor:
    """Returns each sample's probability to survive M submissions: (B,) float64.

    It is C(c, M) / C(N, M) with c correct runs of N, the share of subsets of M runs that are all correct, an unbiased
    estimate for M <= N (as pass@k: Chen et al. 2021, equation 1). M = 1 is the average, M = N the worst case.

    Args:
        predictions: (B, N) classes.
        label: (B,).
        draws: M, 1 .. N.
    """
    right = (predictions == label[:, None]).sum(dim=1).double()
    j = torch.arange(draws, dtype=torch.float64, device=label.device)
    return ((right[:, None] - j).clamp(min=0.0) / (predictions.shape[1] - j)).prod(dim=1)


def vote(predictions: Tensor, label: Tensor, draws: int) -> Tensor:
    """Returns each sample's share of the subsets of M runs whose majority vote is correct: (B,) float64.

    This is an unbiased estimate for a vote over M <= N fresh runs. M = 1 is the average, M = N the majority vote.
    The arguments are those of ``survival``.
    """
    # Each run becomes 0 if correct, else its number of equal predictions. The sorted pattern determines the result, and
    # there are few patterns however many samples there are.
    alike = (predictions[:, :, None] == predictions[:, None, :]).sum(dim=2)
    pattern = alike.masked_fill(predictions == label[:, None], 0).sort(dim=1)[0]
    patterns, place = torch.unique(pattern, dim=0, return_inverse=True)
    shares = []
    for found in patterns.tolist():
        runs = Counter(found)
        right = runs.pop(0, 0)
        rivals = [rival for rival, count in runs.items() for _ in range(count // rival)]
        shares.append(_vote(right, tuple(rivals), draws))
    return torch.tensor(shares, dtype=torch.float64)[place.cpu()]


@cache
def _vote(right: int, rivals: tuple[int, ...], draws: int) -> float:
    """Computes ``vote`` for one pattern, from the counts of the label and of each other predicted class."""
    good = 0
    for own in range(1, min(right, draws) + 1):
        # ways[m]: number of ways to draw m runs from the rivals with fewer than ``own`` from each.
        ways = [1] + [0] * (draws - own)
        for rival in rivals:
            top = min(rival, own - 1)
            ways = [sum(ways[m - k] * math.comb(rival, k) for k in range(min(top, m) + 1)) for m in range(len(ways))]
        good += math.comb(right, own) * ways[-1]
    return good / math.comb(right + sum(rivals), draws)


def ensemble(attacks: Tensor) -> Tensor:
    """Returns the outcomes of each sample under the attack that is best against it: (B, 3) in [0, 1].

    Each rule takes its own minimum over attacks. The minimum of K noisy averages is biased toward the attacker: for a
    sample with probability p under every attack by at most sqrt((K - 1) p (1 - p) / N) (Arnold & Groeneveld 1979), 0.18
    for K = 2, N = 8, p = 1/2. ``held_out`` bounds it from the other side.

    Args:
        attacks: (K, B, 3), ``outcomes`` under each attack.
    """
    return attacks.amin(dim=0)


def held_out(right: Tensor) -> Tensor:
    """Returns the average of ``ensemble`` with the attack chosen on other runs than the one that judges it: (B,).

    Every run is held out once; of equally good attacks the first is chosen. The runs that choose do not judge, so this
    is an unbiased accuracy under an attacker who chooses by N - 1 runs. That choice can miss the best attack. The
    accuracy under the truly best attack of each sample lies between the two expectations.

    Args:
        right: (K, B, N), whether the prediction was correct; N at least 2.
    """
    right = right.double()
    others = right.sum(dim=2, keepdim=True) - right
    chosen = others == others.amin(dim=0)
    first = chosen & (chosen.cumsum(dim=0) == 1)
    return (right * first).sum(dim=0).mean(dim=1)


def wilson(mean: float, count: float) -> Interval:
    """Wilson score interval of a proportion over ``count`` trials; (nan, 0, 1) when there are none."""
    if count == 0:
        return Interval(math.nan, 0.0, 1.0)
    denominator = 1.0 + Z95**2 / count
    center = (mean + Z95**2 / (2.0 * count)) / denominator
    half = Z95 * math.sqrt(mean * (1.0 - mean) / count + Z95**2 / (4.0 * count**2)) / denominator
    # At 0 and 1 the formula gives the value itself up to rounding.
    return Interval(mean, max(0.0, min(mean, center - half)), min(1.0, max(mean, center + half)))


def average_interval(total: float, squares: float, count: int, runs: int) -> Interval:
    """Interval of the mean over ``count`` independent samples of c_i / N, or of another share of the N runs.

    Runs of one sample are not independent trials. The Wilson interval is taken at the effective number of trials,
    p (1 - p) / var(mean) (Korn & Graubard 1998), at least the number of samples, at most samples x runs, so that it
    never collapses to zero width.

    Args:
        total: Sum of c_i / N.
        squares: Sum of (c_i / N)**2.
        count: Samples.
        runs: N.
    """
    if count == 0:
        return wilson(math.nan, 0)
    mean = min(1.0, total / count)
    spread = max(0.0, squares / count - mean**2) * count / max(1, count - 1)
    effective = mean * (1.0 - mean) * count / spread if spread > 0 else float(count)
    return wilson(mean, min(max(effective, count), count * runs))


def accuracies(sums: Tensor, squares: Tensor, count: int, runs: int) -> Accuracies:
    """The three accuracies from sums over samples of ``outcomes`` (3,) and of their squares (3,)."""
    average = average_interval(float(sums[0]), float(squares[0]), count, runs)
    worst, majority = (wilson(float(s) / count if count else math.nan, count) for s in sums[1:])
    return Accuracies(average, worst, majority)


def mean_interval(shares: Tensor, runs: int) -> Interval:
    """``average_interval`` of the shares (B,) themselves."""
    return average_interval(float(shares.sum()), float(shares.square().sum()), len(shares), runs)


def paired_difference(first: Tensor, second: Tensor) -> Interval:
    """Mean of ``second - first`` over the same samples, each in [0, 1], shape (B,).

    Wald interval after adding two pairs, half of one in each cell of the paired table (Agresti & Min 2005): it keeps
    its coverage for few samples and never has zero width.
    """
    difference = second.double() - first.double()
    count = len(difference)
    if count == 0:
        return Interval(math.nan, -1.0, 1.0)
    mean = float(difference.sum()) / (count + 2)
    variance = (float(difference.square().sum()) + 1.0) / (count + 2) - mean**2
    half = Z95 * math.sqrt(variance / (count + 2))
    value = float(difference.mean())
    return Interval(value, max(-1.0, min(value, mean - half)), min(1.0, max(value, mean + half)))
