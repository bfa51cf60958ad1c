"""The report as one HTML file that needs no network."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lit_purify.atomic import write_whole
from lit_purify.data.base import ImageDataset
from lit_purify.errors import InputError
from lit_purify.evaluation import Evaluator, Record
from lit_purify.evaluation.diagnostics import REPLICAS
from lit_purify.evaluation.folder import RunFolder, file_hashes
from lit_purify.functional.frontier import on_envelope
from lit_purify.report.diagnostics import WAYS
from lit_purify.report.finished import FinishedRun, threat_name
from lit_purify.report.pictures import OUTCOMES, shown
from lit_purify.report.rows import changed
from lit_purify.report.summary import KINDS, RULES, attack_line, attacks_of, denoising_lines, summarize

_COLORS = 8
"""Series colors of the page, ``--series-0`` and so on; with five markers they distinguish forty series."""
_CIRCLE, _SQUARE, _DIAMOND = "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z", "M-3.5 -3.5h7v7h-7z", "M0 -5l5 5l-5 5l-5 -5z"
_MARKERS = (_CIRCLE, _SQUARE, _DIAMOND, "M0 -5l5 9h-10z", "M0 5l5 -9h-10z")
CHECKS = {"audit": "Audit of the attack", "gradcheck": "Check of the gradients"}


def write_report(folder: RunFolder) -> None:
    """Writes ``report.html`` in a run folder; raises an ``InputError`` if a file is missing or damaged."""
    write_whole(folder.report, page(FinishedRun.read(folder.path)))


def summary_of(
    evaluator: Evaluator, data: ImageDataset, name: str, split: str, records: list[Record], identity: Mapping[str, Any]
) -> dict[str, Any]:
    """The summary of an evaluation; ``name`` and ``split`` are those of the data."""
    facts = evaluator.facts(data, name, split) | {"files": file_hashes(identity)}
    facts["smaller_chunks"] = dict(Counter(record.chunk for record in records if record.chunk is not None))
    return summarize(records, evaluator.describe(), facts, evaluator.baseline)


def finish(folder: RunFolder, evaluator: Evaluator, data: ImageDataset, name: str, split: str) -> dict[str, Any]:
    """Writes ``summary.json`` and ``report.html`` from the records of a run folder; returns the summary.

    Raises:
        InputError: Records are missing.
    """
    records = folder.collect(write=True)
    wanted = {(*pair, int(i)) for pair in evaluator.pairs for i in data.positions}
    missing = sorted(wanted - {record.key for record in records})
    if missing:
        raise InputError(
            f"{folder.records}: {len(missing)} of {len(wanted)} records are missing (first {missing[0]}); "
            "run the same command again"
        )
    used = [record for record in records if record.key in wanted]
    summary = summary_of(evaluator, data, name, split, used, json.loads(folder.identity.read_text()))
    write_whole(folder.summary, json.dumps(summary, indent=1) + "\n")
    write_report(folder)
    return summary


def page(run: FinishedRun) -> str:
    """The report of one run as HTML; equal runs have equal pages."""
    commands = {}
    if run.path is not None and run.config is not None:
        flags = f"--config {shlex.quote(str(RunFolder(run.path).config))} --run"
        commands = {name: f"python eval.py {name} {flags} {shlex.quote(str(run.path))}" for name in CHECKS}
        commands["again"] = f"python eval.py {flags} {shlex.quote(f'{run.path}-again')}"
    order = [(result["defense"], result["attack"]) for result in run.summary["results"]]
    views = sorted(run.views, key=lambda view: (view.record.index, order.index(view.record.key[:2])))
    return render(
        "report.html",
        run=run,
        summary=run.summary,
        drawings={threat: drawing(list(results.values())) for threat, results in run.threats.items()},
        diagnoses=diagnoses,
        REPLICAS=REPLICAS,
        pictures=[shown(view, run.summary["classes"], run.summary["features"]) for view in views],
        changed=changed(run.views, run.summary["features"]) if run.summary["features"] else [],
        outcomes=OUTCOMES,
        commands=commands,
    )


def drawing(results: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> dict[str, Any]:
    """Plot of clean against robust accuracy, see ``_scatter``.

    A line joins the points that no other point and no mixture of two points exceeds: solid lines within a family, the
    dotted line over all points.
    """
    points, names = [[r[kind]["average"] for kind in KINDS] for r in results], names or [r["defense"] for r in results]
    plot, x, y = _scatter(points, names, KINDS)
    families, values, lines = [name.partition("/")[0] for name in names], torch.tensor(points).double()[..., 0], []
    for joined in ("", *plot["series"]):
        own = values[[joined in ("", family) for family in families]]
        line = " ".join(f"{x(a)},{y(b)}" for a, b in sorted(own[on_envelope(own)].tolist()))
        lines.append((line, plot["series"][joined]["color"] if joined else "currentColor", not joined))
    return {**plot, "axes": [f"{kind} accuracy, average (%)" for kind in KINDS], "lines": lines}


def diagnoses(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Two plots for one attack: accuracy over fresh replicas, and accuracy under fresh against frozen noise.

    Solid lines show averaged logits, dotted lines the vote.
    """
    names = [result["defense"] for result in results]
    points = [[result["frozen"], result["robust"]["average"]] for result in results]
    frozen, _, _ = _scatter(points, names, ("frozen noise", "fresh noise"))
    frozen |= {"axes": [f"robust accuracy under {kind} noise (%)" for kind in ("frozen", "fresh")], "lines": []}
    ways = [[result["replicas"][way] for result in results] for way in WAYS]
    ticks = _ticks([value for way in ways for rows in way for row in rows for value in row[1:]])
    y, place = _scale(ticks, 310, -300), {count: 50 + 100 * k for k, count in enumerate(REPLICAS)}
    styles, lines, marks = frozen["series"], [], []
    for k, rows in enumerate([*ways[0], *ways[1]]):
        style = styles[names[k % len(names)].partition("/")[0]]
        line = " ".join(f"{place[row[0]]},{y(row[1])}" for row in rows)
        lines.append((line, style["color"], k >= len(names)))
        for count, value, low, high in rows if k < len(names) else ():
            title = f"{names[k]}, {count} replicas: {100 * value:.1f} %"
            bars = f"M{place[count]} {y(low)}V{y(high)}"
            marks.append({**style, "title": title, "at": (place[count], y(value)), "bars": bars})
    replicas = {
        "x": [(left, str(count)) for count, left in place.items()],
        "y": [(y(value), f"{100 * value:.4g}") for value in ticks],
        "axes": ["fresh replicas", "robust accuracy (%)"],
        "lines": lines,
        "marks": marks,
        "series": styles,
    }
    return [replicas, frozen]


Scale = Callable[[float], float]


def _scale(ticks: Sequence[float], start: float, length: float) -> Scale:
    """A map from accuracies in [0, 1] to pixels."""
    return lambda value: round(start + length * (value - ticks[0]) / (ticks[-1] - ticks[0]), 1)


def _scatter(
    points: Sequence[Sequence[Sequence[float]]], names: Sequence[str], words: Sequence[str]
) -> tuple[dict[str, Any], Scale, Scale]:
    """Ticks, marks and series of a scatter plot of 400 by 300 pixels for ``macros.html``, and its two scales."""
    across, up = (_ticks([value for point in points for value in point[k]]) for k in (0, 1))
    x, y = _scale(across, 50, 400), _scale(up, 310, -300)
    families = [name.partition("/")[0] for name in names]
    styles = {
        family: {"color": f"var(--series-{k % _COLORS})", "marker": _MARKERS[k % len(_MARKERS)]}
        for k, family in enumerate(dict.fromkeys(families))
    }
    marks = [
        {
            **styles[family],
            "title": f"{name}: {words[0]} {100 * a[0]:.1f} %, {words[1]} {100 * b[0]:.1f} %",
            "at": (x(a[0]), y(b[0])),
            "bars": f"M{x(a[1])} {y(b[0])}H{x(a[2])}M{x(a[0])} {y(b[1])}V{y(b[2])}",
        }
        for family, name, (a, b) in zip(families, names, points, strict=True)
    ]
    ticks = {"x": [(x(value), f"{100 * value:.4g}") for value in across]}
    ticks["y"] = [(y(value), f"{100 * value:.4g}") for value in up]
    return {**ticks, "marks": marks, "series": styles}, x, y


def _ticks(values: Sequence[float]) -> list[float]:
    """Round accuracies from below the lowest to above the highest value, at most eight."""
    low, high = min(values), max(values)
    step = next(step for step in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if high - low <= 6 * step)
    first = math.floor(low / step)
    return [k * step for k in range(first, max(math.ceil(high / step), first + 1) + 1)]


def render(template: str, **content: Any) -> str:  # noqa: ANN401
    """Renders a template to a page; all text is escaped, and no script runs."""
    strict: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined}
    environment = Environment(loader=PackageLoader("lit_purify.report"), trim_blocks=True, lstrip_blocks=True, **strict)
    environment.filters |= {"interval": _interval, "signed": _signed}
    style = (resources.files("lit_purify.report") / "templates/page.css").read_text()
    content |= {"attack_line": attack_line, "attacks_of": attacks_of, "denoising_lines": denoising_lines}
    content |= {"style": Markup(style), "RULES": RULES, "CHECKS": CHECKS, "threat_name": threat_name}
    return environment.get_template(template).render(**content)


def _interval(value: Sequence[float]) -> Markup:
    """A value in percent, with its interval in small type."""
    return Markup("{:.1f}<small>[{:.1f}, {:.1f}]</small>").format(*(100 * each for each in value))


def _signed(value: Sequence[float] | None) -> Markup:
    """A difference in points, bold if its interval excludes 0; empty for ``None``."""
    if value is None:
        return Markup("")
    text = "<strong>{:+.1f}</strong>" if value[1] > 0 or value[2] < 0 else "{:+.1f}"
    return Markup(text + "<small>[{:+.1f}, {:+.1f}]</small>").format(*(100 * each for each in value))
