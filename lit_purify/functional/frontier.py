"""Frontiers of clean against robust accuracy, and bootstrap intervals of their differences.

A random choice between two defenses reaches every point on the line between them (average accuracy only, not worst-of-N
or votes). The frontier of a family is therefore the upper concave envelope of its points, flat to the left of the most
robust one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_purify.functional.statistics import Z95, Interval

_LEVELS = 33
"""Number of clean accuracies at which two frontiers are compared."""


def envelope(points: Tensor, clean: Tensor) -> Tensor:
    """Returns the highest robust accuracy that a point or a mixture of two reaches at a clean accuracy, (R,).

    Args:
        points: (R, P, 2) clean and robust accuracy of P points, in R independent problems.
        clean: (R,), the least clean accuracy allowed.

    Returns:
        NaN where no point is as clean.
    """
    x, y = points.unbind(dim=2)
    clean = clean[:, None]
    reached = torch.where(x >= clean, y, -torch.inf).amax(dim=1)
    # Valid mixtures combine a point i that is less clean than ``clean`` with a point j that is at least as clean.
    gap = x[:, None, :] - x[:, :, None]
    weight = (clean - x)[:, :, None] / torch.where(gap > 0, gap, 1.0)
    mixed = y[:, :, None] + weight * (y[:, None, :] - y[:, :, None])
    valid = (x < clean)[:, :, None] & (x >= clean)[:, None, :]
    best = torch.maximum(reached, torch.where(valid, mixed, -torch.inf).flatten(1).amax(dim=1))
    return torch.where(best.isinf(), torch.nan, best)


def on_envelope(points: Tensor) -> Tensor:
    """Marks the points of (P, 2) that lie on the envelope, (P,) bool; of equal points the last."""
    kept = torch.ones(len(points), dtype=torch.bool)
    for k in range(len(points)):
        kept[k] = False
        height = envelope(points[kept][None], points[k, :1]) if kept.any() else torch.tensor(torch.nan)
        # A point below the envelope of the others does not change it and can be dropped at once.
        kept[k] = bool(height.isnan() | (points[k, 1] > height + 1e-12))
    return kept


def gap(first: Tensor, second: Tensor) -> Tensor:
    """Returns the mean height of the second frontier above the first over clean accuracies, (R,).

    The range ends at the less clean of the two most robust points and at the less clean of the two cleanest points:
    both frontiers are defined there and can differ in shape.

    Args:
        first: (R, P, 2).
        second: (R, Q, 2).
    """
    low = torch.minimum(_peak(first), _peak(second))
    high = torch.minimum(first[..., 0].amax(dim=1), second[..., 0].amax(dim=1))
    total = torch.zeros_like(low)
    for k in range(_LEVELS):
        # Rounding must not carry ``clean`` past ``high``, where the envelope is NaN.
        clean = torch.minimum(torch.lerp(low, high, k / (_LEVELS - 1)), high)
        total += envelope(second, clean) - envelope(first, clean)
    return total / _LEVELS


def _peak(points: Tensor) -> Tensor:
    """Clean accuracy of the most robust point, (R,)."""
    return points[..., 0].gather(1, points[..., 1].argmax(dim=1, keepdim=True)).squeeze(1)


def resampled(shares: Tensor, resamples: int, seed: int = 0) -> Tensor:
    """Returns means over samples drawn with replacement, with the same draw for all points: (R, P, 2).

    Args:
        shares: (B, P, 2), share of correct runs of each sample and point, clean and attacked.
        resamples: R.
        seed: Seed of the draws.
    """
    count = len(shares)
    generator = torch.Generator().manual_seed(seed)
    flat = shares.double().flatten(1)
    means = []
    for _ in range(resamples):
        drawn = torch.randint(count, (count,), generator=generator)
        means.append(torch.bincount(drawn, minlength=count).double() @ flat / count)
    return torch.stack(means).reshape(resamples, *shares.shape[1:])


def bootstrap(points: Tensor, draws: Tensor, count: int, statistic: Callable[[Tensor], Tensor]) -> Interval:
    """Returns a difference of two frontiers with its 95 % interval from the basic bootstrap.

    Every resample repeats points, envelope and interpolation. The maximum of noisy points is biased upward, and in a
    resample by the same amount again. The basic interval (twice the estimate minus the quantiles) removes that bias;
    the quantiles themselves would double it. Some bias remains when one family has many more points. In simulations of
    equal families (100 samples, 4 runs), ``gap`` differed in 5 to 6 % of cases with 4 points each, in 8 % with 4 and
    12, and in 15 % with 4 and 20 (with quantiles: 55 %). The interval of one point against the other family's frontier
    covered the truth in 91 to 93 %.

    Args:
        points: (P, 2).
        draws: (R, P, 2) from ``resampled``.
        count: Number of samples. It bounds the width from below, by that of ``paired_difference`` with all differences
            0, because resamples of few samples can all agree.
        statistic: (R, P, 2) -> (R,), possibly NaN.

    Returns:
        NaN throughout if the estimate or more than 5 % of the resamples are NaN. The remaining resamples would give an
        interval under the condition that the other family is as clean.
    """
    value = float(statistic(points[None]))
    again = statistic(draws)
    missing = again.isnan().double().mean()
    again = again[~again.isnan()].sort().values
    if value != value or missing > 0.05:
        return Interval(torch.nan, torch.nan, torch.nan)
    low, high = (float(torch.quantile(again, q)) for q in (0.025, 0.975))
    center, half = 2 * value - (low + high) / 2, max((high - low) / 2, Z95 / (count + 2))
    return Interval(value, max(-1.0, center - half), min(1.0, center + half))
