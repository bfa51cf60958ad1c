"""report.html: one file that opens without a network, made of what lies in a run's folder."""

from __future__ import annotations

import base64
import hashlib
import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lit_purify.errors import InputError
from lit_purify.evaluation.folder import RunFolder
from lit_purify.evaluation.records import write_whole
from lit_purify.report import plots
from lit_purify.report.finished import FinishedRun, Threat, attacks_of, radius, read_json, threat_name
from lit_purify.report.pictures import OUTCOMES, pictures
from lit_purify.report.summary import RULES, attack_line, chunk_line, groups_of

_EXACT_COUNTS, _RANGES = 12, 8
"""Up to so many runs each count of right runs has a column; else the counts between none and all share so many."""


def write_report(folder: RunFolder) -> None:
    """Writes ``report.html`` anew from summary, records, overlays, configuration and verdicts.

    Raises:
        InputError: The folder holds no finished evaluation, or a damaged one.
    """
    run = FinishedRun.read(folder.path)
    try:
        content = page(run)
    except OSError as error:
        raise InputError(
            f"{error.filename or folder.overlays}: {str(error.strerror or error).lower()}, so there is no report; put "
            "the file back, or choose another folder with --run"
        ) from error
    write_whole(folder.report, content)


def page(run: FinishedRun) -> str:
    """The report of one run. It depends on nothing but the folder."""
    summary = run.summary
    families = any(key.startswith("model.init_args.families.") for key in run.identity)
    found = read_json(run.folder.path / "frontier.json", "frontier") if families else None
    attacks: dict[str, list[Mapping[str, Any]]] = {}
    for result in summary["results"]:
        attacks.setdefault(result["attack"], []).append(result)
    config = run.folder.config.read_text()
    return render(
        "report.html",
        run=run,
        summary=summary,
        results={(result["defense"], result["attack"]): result for result in summary["results"]},
        defenses=list(dict.fromkeys(result["defense"] for result in summary["results"])),
        attacks=attacks,
        frontier=found,
        frontier_plot=frontier_drawing(found) if found else None,
        plots={} if found else {threat: _plot(threat, results) for threat, results in run.threats.items()},
        over_eps=list(_over_eps(run)),
        bins=_bins(summary["runs"]),
        agreement=_agreement(run),
        pictures=pictures(run),
        outcomes=OUTCOMES,
        config=config,
        config_path=shlex.quote(str(run.folder.config)),
        path=shlex.quote(str(run.folder.path)),
        path_again=shlex.quote(f"{run.folder.path}-again"),
        config_address="data:text/yaml;base64," + base64.b64encode(config.encode()).decode(),
    )


def render(template: str, **content: Any) -> str:  # noqa: ANN401
    """A page from a template; all text is escaped, and nothing but the page's own script is run."""
    files = resources.files("lit_purify.report") / "templates"
    style, script = ((files / name).read_text() for name in ("page.css", "page.js"))
    return (
        _environment()
        .get_template(template)
        .render(
            style=Markup(style),
            script=Markup(script),
            script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            RULES=RULES,
            attack_line=attack_line,
            chunk_line=chunk_line,
            attacks_of=attacks_of,
            radius=radius,
            threat_name=threat_name,
            **content,
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lit_purify.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"interval": _interval, "signed": _signed, "drawing": Markup}
    return environment


def _interval(value: Sequence[float]) -> Markup:
    """In percent, the interval small under its value."""
    shown, low, high = (f"{100 * each:.1f}" for each in value)
    return Markup("{}<small>[{}, {}]</small>").format(shown, low, high)


def _signed(value: Sequence[float]) -> Markup:
    """A difference in points; in bold when its interval holds no 0."""
    shown, low, high = (f"{100 * each:+.1f}" for each in value)
    text = "<strong>{}</strong><small>[{}, {}]</small>" if value[1] > 0 or value[2] < 0 else "{}<small>[{}, {}]</small>"
    return Markup(text).format(shown, low, high)


def frontier_drawing(found: Mapping[str, Any]) -> str:
    """Families of defenses, a panel for each attack, one below the other."""
    from lit_purify.report.frontier import drawn

    def one(attack: str) -> str:
        return plots.themed(
            lambda pyplot: drawn({"attacks": {attack: found["attacks"][attack]}}, pyplot), f"Frontiers under {attack}"
        )

    return "".join(map(one, found["attacks"]))


def _plot(threat: Threat, results: Sequence[Mapping[str, Any]]) -> str:
    points = [(r["defense"], r["clean"]["average"], r["robust"]["average"]) for r in results]
    return plots.frontier(points, f"Clean against robust accuracy, {threat_name(threat)}")


def _over_eps(run: FinishedRun) -> Iterator[tuple[list[Threat], list[list[Mapping[str, Any]]], str]]:
    """For each norm with two radii or more: its threat models, their results, and a drawing."""
    for norm in dict.fromkeys(norm for norm, _ in run.threats):
        threats = sorted(threat for threat in run.threats if threat[0] == norm)
        if len(threats) < 2:
            continue
        results = [run.threats[threat] for threat in threats]
        series = {
            r["defense"]: [r["clean"]["average"], *(group[k]["robust"]["average"] for group in results)]
            for k, r in enumerate(results[0])
        }
        at, names = [0.0, *(eps for _, eps in threats)], ["clean", *map(radius, threats)]
        yield threats, results, plots.curves(series, at, names, f"Accuracy over the radius, {norm}")


def _bins(runs: int) -> list[tuple[int, int]]:
    """Lowest and highest count of right runs in each column of a histogram."""
    if runs <= _EXACT_COUNTS:
        return [(k, k) for k in range(runs + 1)]
    edges = [1 + (runs - 1) * k // _RANGES for k in range(_RANGES + 1)]
    return [(0, 0), *((low, high - 1) for low, high in itertools.pairwise(edges)), (runs, runs)]


def _agreement(run: FinishedRun) -> dict[str, dict[str, list[int]]]:
    """For each defense, clean and under each threat model: in how many of the N runs samples were right.

    Returns:
        By defense and by what was shown the number of samples in each of ``_bins``.
    """
    bins = _bins(run.summary["runs"])
    found: dict[str, dict[str, list[int]]] = {}

    def counted(right: Sequence[int]) -> list[int]:
        return [sum(low <= count <= high for count in right) for low, high in bins]

    for threat, results in run.threats.items():
        for result in results:
            groups = groups_of(run.pairs, result)
            rows = found.setdefault(result["defense"], {})
            rows.setdefault("clean", counted([sum(p == r.label for p in r.clean) for r in groups[0]]))
            # Of several attacks the one that leaves the fewest.
            right = [min(sum(p == r.label for p in r.adversarial) for r in same) for same in zip(*groups, strict=True)]
            rows[threat_name(threat)] = counted(right)
    return found
