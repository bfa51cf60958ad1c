"""report.html: one file that opens without a network."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lit_purify.evaluation.folder import RunFolder
from lit_purify.evaluation.records import write_whole
from lit_purify.functional.frontier import on_envelope
from lit_purify.report.finished import FinishedRun, threat_name
from lit_purify.report.pictures import OUTCOMES, shown
from lit_purify.report.plots import Point, plot
from lit_purify.report.summary import RULES, attack_line, attacks_of, chunk_line


def write_report(folder: RunFolder) -> None:
    """Writes the ``report.html`` of a run's folder.

    Raises:
        InputError: The folder holds no finished evaluation, or a damaged one.
    """
    write_whole(folder.report, page(FinishedRun.read(folder.path)))


def page(run: FinishedRun) -> str:
    """The report of one run; equal runs have equal pages."""
    attacks: dict[str, dict[str, Mapping[str, Any]]] = {}
    for result in run.summary["results"]:
        attacks.setdefault(result["attack"], {})[result["defense"]] = result
    drawings = {
        f"Frontiers under {attack}": _families(attacks[attack], part) for attack, part in _frontier(run).items()
    }
    if not drawings:
        drawings = {
            f"Clean against robust accuracy, {threat_name(threat)}": best(list(results.values()))
            for threat, results in run.threats.items()
        }
    commands = {}
    if run.path is not None and run.config is not None:
        here, config = shlex.quote(str(run.path)), shlex.quote(str(RunFolder(run.path).config))
        for command in ("audit", "gradcheck"):
            commands[command] = f"python eval.py {command} --config {config} --run {here}"
        commands["again"] = f"python eval.py --config {config} --run {shlex.quote(f'{run.path}-again')}"
    return render(
        "report.html",
        run=run,
        summary=run.summary,
        attacks=attacks,
        drawings=drawings,
        pictures=[shown(view, run.classes) for view in sorted(run.views, key=lambda view: view.record.index)],
        outcomes=OUTCOMES,
        commands=commands,
        config_address="data:text/yaml;base64," + base64.b64encode((run.config or "").encode()).decode(),
    )


def _frontier(run: FinishedRun) -> Mapping[str, Any]:
    found: Mapping[str, Any] = run.summary["frontier"]
    return found


def _families(results: Mapping[str, Mapping[str, Any]], part: Mapping[str, Any]) -> dict[str, Any]:
    """Clean against robust accuracy of one attack; the line of a family joins its best points."""
    points: list[Point] = []
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, result in results.items():
        family = part["points"].get(name, {}).get("family", "no family")
        points.append((family, name, result["clean"]["average"], result["robust"]["average"]))
        if part["points"].get(name, {}).get("on_frontier"):
            lines.setdefault(family, []).append((result["clean"]["average"][0], result["robust"]["average"][0]))
    return plot(points, {family: sorted(line) for family, line in lines.items()})


def best(results: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> dict[str, Any]:
    """Clean against robust accuracy; a dotted line joins what no other point, nor a mixture of two, reaches."""
    points = [
        (name, name, result["clean"]["average"], result["robust"]["average"])
        for name, result in zip(names or [result["defense"] for result in results], results, strict=True)
    ]
    values = torch.tensor([[clean[0], robust[0]] for *_, clean, robust in points], dtype=torch.float64)
    return plot(points, {"": sorted(values[on_envelope(values)].tolist())})


def render(template: str, **content: Any) -> str:  # noqa: ANN401
    """A page from a template; all text is escaped, and no script runs but the page's own."""
    files = resources.files("lit_purify.report") / "templates"
    style, script = ((files / name).read_text() for name in ("page.css", "page.js"))
    environment = Environment(
        loader=PackageLoader("lit_purify.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"interval": _interval, "signed": _signed}
    environment.globals |= {
        "style": Markup(style),
        "script": Markup(script),
        "script_sha256": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "RULES": RULES,
        "attack_line": attack_line,
        "attacks_of": attacks_of,
        "chunk_line": chunk_line,
        "threat_name": threat_name,
    }
    return environment.get_template(template).render(**content)


def _interval(value: Sequence[float]) -> Markup:
    """In percent, the interval small under its value."""
    return Markup("{:.1f}<small>[{:.1f}, {:.1f}]</small>").format(*(100 * each for each in value))


def _signed(value: Sequence[float] | None) -> Markup:
    """A difference in points, in bold if its interval does not hold 0; nothing if there is none."""
    if value is None:
        return Markup("")
    text = "<strong>{:+.1f}</strong>" if value[1] > 0 or value[2] < 0 else "{:+.1f}"
    return Markup(text + "<small>[{:+.1f}, {:+.1f}]</small>").format(*(100 * each for each in value))
