"""Drawings for a page that is read on light and on dark ground."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import torch

from lit_purify.functional.frontier import on_envelope

Percent = Sequence[float]
"""An accuracy with its interval, as fractions."""

_INK = "#010203"
"""Stands for the color of the page's text."""
_COLORS = ("#0b62a4", "#c2410c", "#15803d", "#a21caf", "#8a6100", "#0e7490", "#be123c", "#4d5bd1")
"""Of series; the page has others for dark ground: ``--series-0`` and so on."""
_MARKERS = "osD^vPX*"
_SIZE = (4.8, 4.2)
"""Inches: letters are still read where a phone shrinks it."""


def themed(draw: Callable[[Any], Any], label: str) -> str:
    """A figure of matplotlib as an inline drawing in the page's colors and letters.

    Args:
        draw: From ``pyplot`` to the figure.
        label: What is read out in its place; another one for each drawing of a page.
    """
    import matplotlib
    from cycler import cycler

    matplotlib.use("agg")
    from matplotlib import pyplot

    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    theme: Any = dict.fromkeys(inked, _INK) | {
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "axes.prop_cycle": cycler(color=_COLORS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9.0,
        "svg.fonttype": "none",
        "svg.hashsalt": label,
        # A dollar sign in a name would start a formula.
        "text.parse_math": False,
    }
    text = io.StringIO()
    # Letters that matplotlib has no font for, the browser has.
    with pyplot.rc_context(theme), warnings.catch_warnings(action="ignore"):
        figure = draw(pyplot)
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        pyplot.close(figure)
    size, drawing = re.search(
        r"<svg[^>]*( width=[^>]*viewBox=\"[^\"]*\")[^>]*>(.*)", text.getvalue(), re.DOTALL
    ).groups()  # type: ignore[union-attr]
    # What would hold for the whole page: rules, and names of groups that every drawing gives.
    drawing = re.sub(r"<style.*?</style>|(?<=<g) id=\"[^\"]*\"| font-family: [^;\"]*;", "", drawing)
    drawing = drawing.replace(_INK, "currentColor")
    for k, color in enumerate(_COLORS):
        drawing = drawing.replace(color, f"var(--series-{k})")
    return f'<svg class="plot" role="img" aria-label="{escape(label)}"{size}>{drawing}'


def frontier(points: Sequence[tuple[str, Percent, Percent]], label: str) -> str:
    """Clean against robust accuracy; a line joins what no other point and no mixture of two reaches.

    Args:
        points: Name, clean and robust accuracy of each.
        label: See ``themed``.
    """

    def draw(pyplot: Any) -> Any:  # noqa: ANN401
        figure, axes = pyplot.subplots(figsize=_SIZE, layout="constrained")
        values = torch.tensor([[clean[0], robust[0]] for _, clean, robust in points], dtype=torch.float64)
        best = sorted((100 * values[on_envelope(values)]).tolist())
        axes.plot(*zip(*best, strict=True), color=_INK, lw=0.8, ls=":", zorder=1)
        for k, (name, clean, robust) in enumerate(points):
            axes.errorbar(
                100 * clean[0],
                100 * robust[0],
                xerr=_spread([clean]),
                yerr=_spread([robust]),
                **_style(k, name),
            )
        axes.set(xlabel="clean accuracy, average (%)", ylabel="robust accuracy, average (%)")
        return _finish(figure, axes, [name for name, *_ in points])

    return themed(draw, label)


def curves(series: Mapping[str, Sequence[Percent]], radii: Sequence[float], names: Sequence[str], label: str) -> str:
    """Accuracy over the radius of the attack.

    Args:
        series: For each defense an accuracy at each radius.
        radii: Where.
        names: What the radii are called.
        label: See ``themed``.
    """

    def draw(pyplot: Any) -> Any:  # noqa: ANN401
        figure, axes = pyplot.subplots(figsize=_SIZE, layout="constrained")
        for k, (name, values) in enumerate(series.items()):
            # Side by side, so that intervals can be told apart.
            x = [r + (k - (len(series) - 1) / 2) * 0.008 * max(radii) for r in radii]
            axes.errorbar(x, [100 * v[0] for v in values], yerr=_spread(values), **_style(k, name), lw=1.2)
        axes.set(xlabel="largest change by the attack", ylabel="accuracy, average (%)", ylim=(-2, 102))
        axes.set_xticks(radii, names)
        return _finish(figure, axes, list(series))

    return themed(draw, label)


def _style(k: int, name: str) -> dict[str, Any]:
    # As many markers as colors: both together tell 64 apart.
    color, marker = _COLORS[k % len(_COLORS)], _MARKERS[(k + k // len(_COLORS)) % len(_MARKERS)]
    # A legend leaves out what begins with an underscore.
    label = f" {name}" if name.startswith("_") else name
    return {"label": label, "color": color, "marker": marker, "ms": 5, "elinewidth": 0.8, "capsize": 2}


def _spread(values: Sequence[Percent]) -> list[list[float]]:
    return [[100 * abs(value[k] - value[0]) for value in values] for k in (1, 2)]


def _finish(figure: Any, axes: Any, names: Sequence[str]) -> Any:  # noqa: ANN401
    axes.grid(alpha=0.2)
    columns = max(1, min(3, 66 // (max(map(len, names)) + 8)))
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    return figure
