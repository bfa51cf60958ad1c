"""Families of defenses at equal clean accuracy: the key ``frontier`` of summary.json, and the lines that are printed.

Defenses are named ``FAMILY/POINT``, as ``uniform/100``; a defense without a family is compared with none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from lit_purify.functional.frontier import bootstrap, envelope, gap, on_envelope, resampled
from lit_purify.functional.statistics import Interval

_RESAMPLES = 2000


def families(defenses: Iterable[str]) -> dict[str, list[str]]:
    """The defenses of each family; empty unless there are two families, one of them with two points."""
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(defenses):
        if "/" in name:
            found.setdefault(name.partition("/")[0], []).append(name)
    return found if len(found) > 1 and max(map(len, found.values())) > 1 else {}


def compared(shares: Tensor, defenses: Sequence[str]) -> dict[str, Any]:
    """How families differ under one attack.

    Args:
        shares: (B, P, 2) for each sample and defense the share of right runs, clean and attacked. Average accuracies:
            only these mix in proportion.
        defenses: Names of the P defenses.

    Returns:
        ``points``: for each defense with a family, whether it lies on its family's line and how far above the others'.
        ``comparisons``: of each two families. ``open_ended``: families that are most robust at their last point.
    """
    columns = {family: [defenses.index(name) for name in names] for family, names in families(defenses).items()}
    means, draws = shares.mean(dim=0), resampled(shares, _RESAMPLES)

    def above(k: int, at: list[int]) -> list[float] | None:
        """A point over the line of a family."""
        return _values(bootstrap(means, draws, len(shares), lambda p: p[:, k, 1] - envelope(p[:, at], p[:, k, 0])))

    def between(first: list[int], second: list[int]) -> Interval:
        return bootstrap(means, draws, len(shares), lambda p: gap(p[:, first], p[:, second]))

    points, comparisons = {}, []
    for family, at in columns.items():
        for k, outermost in zip(at, on_envelope(means[at]).tolist(), strict=True):
            others = {name: above(k, other) for name, other in columns.items() if name != family}
            points[defenses[k]] = {"family": family, "on_frontier": outermost, "above": others}
    for (to, first), (family, second) in itertools.combinations(columns.items(), 2):
        found = between(first, second)
        comparisons.append({"family": family, "to": to, "difference": _values(found), "verdict": verdict(found)})
    ends = [family for family, at in columns.items() if _rises_to_its_end(means[at])]
    return {"points": points, "comparisons": comparisons, "open_ended": ends}


def _rises_to_its_end(points: Tensor) -> bool:
    """Whether the most robust of the points (P, 2) is the least clean one: stronger noise might be better still."""
    return len(points) > 1 and bool(points[:, 1].argmax() == points[:, 0].argmin())


def verdict(difference: Interval) -> str:
    """Of a family against another."""
    if difference.low > 0.0:
        return "above"
    return "below" if difference.high < 0.0 else "not distinguishable"


def _values(difference: Interval) -> list[float] | None:
    """``None`` where no clean accuracy is common: JSON has no such number."""
    return None if math.isnan(difference.value) else list(difference)
