"""Clean against robust accuracy: the coordinates of an inline SVG, which ``macros.html`` draws in the page's colors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_LEFT, _TOP, _RIGHT, _BOTTOM = 50, 10, 450, 310
"""The area that points lie in."""
_COLORS = 8
"""Series colors of the page, ``--series-0`` and so on; with five markers they tell forty series apart."""
_MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "M-3.5 -3.5h7v7h-7z",
    "M0 -5l5 5l-5 5l-5 -5z",
    "M0 -5l5 9h-10z",
    "M0 5l5 -9h-10z",
)

Point = tuple[str, str, Sequence[float], Sequence[float]]
"""Series, name, clean and robust accuracy as (value, low, high) in [0, 1]."""


def plot(
    points: Sequence[Point],
    lines: Mapping[str, Sequence[Sequence[float]]],
) -> dict[str, Any]:
    """Points with their intervals.

    Args:
        points: What is drawn.
        lines: By series the (clean, robust) accuracies that a line joins; that of no series is dotted.

    Returns:
        Ticks, lines, marks and series, in pixels of an area of 460 by 350.
    """
    series = list(dict.fromkeys(name for name, *_ in points))
    clean = _ticks([value for _, _, accuracy, _ in points for value in accuracy])
    robust = _ticks([value for _, _, _, accuracy in points for value in accuracy])

    def x(value: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * (value - clean[0]) / (clean[-1] - clean[0]), 1)

    def y(value: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * (value - robust[0]) / (robust[-1] - robust[0]), 1)

    styles = {
        name: {"color": f"var(--series-{k % _COLORS})", "marker": _MARKERS[k % len(_MARKERS)]}
        for k, name in enumerate(series)
    }
    return {
        "x": [(x(value), f"{100 * value:.4g}") for value in clean],
        "y": [(y(value), f"{100 * value:.4g}") for value in robust],
        "lines": [
            (" ".join(f"{x(a)},{y(b)}" for a, b in joined), styles.get(name, {}).get("color"))
            for name, joined in lines.items()
        ],
        "marks": [
            {
                **styles[name],
                "title": f"{title}: clean {100 * a[0]:.1f} %, robust {100 * b[0]:.1f} %",
                "at": (x(a[0]), y(b[0])),
                "bars": f"M{x(a[1])} {y(b[0])}H{x(a[2])}M{x(a[0])} {y(b[1])}V{y(b[2])}",
            }
            for name, title, a, b in points
        ],
        "series": styles,
    }


def _ticks(values: Sequence[float]) -> list[float]:
    """Round accuracies from below the lowest to above the highest value, at most eight."""
    low, high = min(values), max(values)
    step = next(step for step in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if high - low <= 6 * step)
    first = math.floor(low / step)
    return [k * step for k in range(first, max(math.ceil(high / step), first + 1) + 1)]
