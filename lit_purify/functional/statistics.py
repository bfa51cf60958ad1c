"""Accuracies over N runs with 95 % intervals, and paired differences.

An evaluation runs every sample N times with fresh noise. With c_i of N predictions of sample i correct: the average
accuracy is mean(c_i / N); worst-of-N counts samples with c_i = N; the majority vote counts samples whose label has
strictly more votes than any other class (a tie counts as wrong).
"""

from __future__ import annotations

import math
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
    """What each sample contributes to (average, worst, majority): (B, 3) float64 in [0, 1].

    Args:
        predictions: (B, N) classes.
        label: (B,).
    """
    right = predictions == label[:, None]
    votes = (predictions[:, :, None] == predictions[:, None, :]).sum(dim=2)
    rivals = votes.masked_fill(right, 0).amax(dim=1)
    share = right.double().mean(dim=1)
    return torch.stack((share, right.all(dim=1).double(), (right.sum(dim=1) > rivals).double()), dim=1)


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
    """Interval of the mean over ``count`` independent samples of c_i / N.

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
