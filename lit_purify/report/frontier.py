"""Comparing families of defenses: frontier.json, frontier.png and the lines that are printed."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_purify.evaluation.records import Record, write_whole
from lit_purify.functional.frontier import bootstrap, envelope, gap, on_envelope, resampled
from lit_purify.functional.statistics import Interval
from lit_purify.report.summary import by_pair, clean_outcomes, headline, robust_outcomes, signed

_RESAMPLES = 2000


def compare(
    records: Iterable[Record],
    summary: Mapping[str, Any],
    families: Mapping[str, Sequence[str]],
    refused: Mapping[str, str],
) -> dict[str, Any]:
    """The content of ``frontier.json``: every attack's points and how families differ at equal clean accuracy.

    Args:
        records: What the summary was made of.
        summary: Content of ``summary.json``.
        families: Names of the defenses of each.
        refused: Combinations that were left out, with the reason.
    """
    pairs = by_pair(records)
    attacks = {}
    for attack in dict.fromkeys(result["attack"] for result in summary["results"]):
        results = [result for result in summary["results"] if result["attack"] == attack]
        # Average accuracies: only these mix in proportion.
        shares = torch.stack(
            [
                torch.stack([clean_outcomes(pairs, result)[:, 0], robust_outcomes(pairs, result)[:, 0]], dim=1)
                for result in results
            ],
            dim=1,
        )
        attacks[attack] = _compared(shares, results, families)
    return {"schema": 1, "resamples": _RESAMPLES, "refused": dict(refused), "attacks": attacks}


def _compared(
    shares: Tensor, results: Sequence[Mapping[str, Any]], families: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Of one attack, from the shares (B, P, 2) of right runs for all results."""
    place = {result["defense"]: k for k, result in enumerate(results)}
    family_of = {name: family for family, names in families.items() for name in names}
    columns = {family: [place[name] for name in names] for family, names in families.items()}
    points, draws = shares.mean(dim=0), resampled(shares, _RESAMPLES)
    outermost = {
        family: {at[i] for i in on_envelope(points[at]).nonzero().flatten().tolist()} for family, at in columns.items()
    }

    def to_frontier(k: int, family: str) -> Interval:
        at = columns[family]
        return bootstrap(points, draws, len(shares), lambda p: p[:, k, 1] - envelope(p[:, at], p[:, k, 0]))

    def between(first: list[int], second: list[int]) -> Interval:
        return bootstrap(points, draws, len(shares), lambda p: gap(p[:, first], p[:, second]))

    described = []
    for name, k in place.items():
        own = family_of.get(name)
        others = [family for family in families if own is not None and family != own]
        described.append(
            {
                "defense": name,
                "family": own,
                "clean": results[k]["clean"]["average"],
                "robust": results[k]["robust"]["average"],
                "on_frontier": own is not None and k in outermost[own],
                "above": {family: _values(to_frontier(k, family)) for family in others},
            }
        )
    comparisons = []
    for first, second in itertools.combinations(families, 2):
        found = between(columns[first], columns[second])
        comparisons.append({"family": second, "to": first, "difference": _values(found), "verdict": verdict(found)})
    ends = [family for family, at in columns.items() if _rises_to_its_end(points[at])]
    return {"points": described, "comparisons": comparisons, "open_ended": ends}


def _rises_to_its_end(points: Tensor) -> bool:
    """Whether the most robust of the points (P, 2) is the least clean one: stronger noise might be better still."""
    return len(points) > 1 and bool(points[:, 1].argmax() == points[:, 0].argmin())


def verdict(difference: Interval) -> str:
    """Of a family against another."""
    if difference.low > 0.0:
        return "above"
    return "below" if difference.high < 0.0 else "not distinguishable"


def write(found: Mapping[str, Any], summary: Mapping[str, Any], folder: Path) -> str:
    """Writes ``frontier.json`` and ``frontier.png``; the lines to print."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    write_whole(folder / "frontier.json", json.dumps(found, indent=1) + "\n")
    figure = drawn(found, pyplot)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    pyplot.close(figure)
    write_whole(folder / "frontier.png", image.getvalue())
    return _lines(found, summary)


def drawn(found: Mapping[str, Any], pyplot: Any) -> Any:  # noqa: ANN401
    """Clean against robust accuracy, a panel for each attack."""
    count = len(found["attacks"])
    figure, panels = pyplot.subplots(1, count, figsize=(4.8 * count, 4.2), layout="constrained", squeeze=False)
    for axes, (attack, part) in zip(panels[0], found["attacks"].items(), strict=True):
        families = list(dict.fromkeys(point["family"] for point in part["points"]))
        for color, family in enumerate(sorted(families, key=lambda name: name is None)):
            own = [point for point in part["points"] if point["family"] == family]
            x, y = ([100 * point[kind][0] for point in own] for kind in ("clean", "robust"))
            xerr, yerr = (
                [[100 * abs(point[kind][0] - point[kind][k]) for point in own] for k in (1, 2)]
                for kind in ("clean", "robust")
            )
            style = {"color": "gray" if family is None else f"C{color}", "alpha": 0.8, "elinewidth": 0.5}
            axes.errorbar(
                x, y, xerr=xerr, yerr=yerr, fmt="o" if family else "x", ms=4, label=family or "no family", **style
            )
            line = sorted(
                (p["clean"][0], p["robust"][0]) for p in part["points"] if p["family"] == family and p["on_frontier"]
            )
            axes.plot([100 * p[0] for p in line], [100 * p[1] for p in line], color=style["color"])
        axes.set(xlabel="clean accuracy, average (%)", ylabel="robust accuracy, average (%)", title=attack)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.0, -0.13), ncols=3)
    return figure


def _lines(found: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """What is printed."""
    lines = ["", headline(summary)]
    for attack, part in found["attacks"].items():
        counts: dict[str, int] = {}
        for point in part["points"]:
            if point["family"]:
                counts[point["family"]] = counts.get(point["family"], 0) + 1
        listed = ", ".join(f"{family} {count}" for family, count in counts.items())
        lines += [f"frontiers under {attack}; points: {listed}; left out: {len(found['refused'])}"]
        lines += [f"  {_line(each)}" for each in part["comparisons"]]
        if part["open_ended"]:
            lines.append(
                f"  sweep on towards strong noise, where these are most robust: {', '.join(part['open_ended'])}"
            )
    lines += ["", "Difference of the robust average at equal clean accuracy, in points; intervals of 95 %."]
    return "\n".join([*lines, "The best of many points on the same samples is optimistic: evaluate a choice on test."])


def _line(comparison: Mapping[str, Any]) -> str:
    return (
        f"{comparison['family']} against {comparison['to']}: {_signed(comparison['difference'])}, "
        f"{comparison['verdict']}"
    )


def _signed(difference: Sequence[float] | None) -> str:
    return "" if difference is None else signed(difference)


def _values(difference: Interval) -> list[float] | None:
    """``None`` where no clean accuracy is common: JSON has no such number."""
    return None if math.isnan(difference.value) else list(difference)
