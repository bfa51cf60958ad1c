"""Comparison of finished evaluations, with paired differences over shared samples."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lit_purify.errors import InputError
from lit_purify.evaluation.folder import comparable
from lit_purify.functional.statistics import Interval, paired_difference
from lit_purify.report.finished import FinishedRun, Threat, radius
from lit_purify.report.html import drawing, render
from lit_purify.report.summary import KINDS, attacks_of, groups_of, outcomes_of, percent, signed

GENERATOR = "lit_purify compare"
"""Marks a page as a comparison, so that only comparisons are overwritten."""
_ATTACK = ("attack_title", "attack_steps", "eot", "gradient", "mask_gradient")
"""Keys that must agree for two attacks to count as the same, whatever their names."""


class Row(NamedTuple):
    """A defense of a run, and its differences in [-1, 1] from its counterpart in the first run, if any."""

    title: str
    result: Mapping[str, Any]
    other: str = ""
    clean: Interval | None = None
    robust: Interval | None = None
    remarks: str = ""


class Comparison:
    """Compares runs with the first of them.

    Args:
        folders: At least two different folders of finished evaluations.

    Raises:
        InputError: There are fewer than two folders, one is repeated, or one holds no finished evaluation.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        if len(folders) < 2:
            raise InputError("compare needs at least two run folders: name the baseline first")
        found = [FinishedRun.read(path) for path in folders]
        self.runs = {str(run.path): run for run in found}
        if len({Path(name).resolve() for name in self.runs}) < len(found):
            raise InputError(f"{', '.join(map(str, folders))}: a run is named twice: give each run once")
        self.first, *_ = self.runs
        self.pairing = {name: _pairing(self.runs[self.first], run) for name, run in self.runs.items()}
        threats = dict.fromkeys(threat for run in self.runs.values() for threat in run.threats)
        self.rows = {threat: [row for name in self.runs for row in self._rows(name, threat)] for threat in threats}

    def _rows(self, name: str, threat: Threat) -> list[Row]:
        """The rows of a run. A defense's counterpart has the same name, or else is the first run's baseline."""
        first, run, rows = self.runs[self.first], self.runs[name], []
        known = first.threats.get(threat, {})
        for defense, result in run.threats.get(threat, {}).items():
            title, other = f"{name}: {defense}", known.get(defense, known.get(first.summary["baseline"]))
            if run is first or other is None:
                rows.append(Row(title, result))
                continue
            remarks = [] if _attack_settings(first, other) == _attack_settings(run, result) else ["another attack"]
            if first.summary["runs"] != run.summary["runs"]:
                remarks.append(f"{run.summary['runs']} runs for {first.summary['runs']}")
            if self.pairing[name]:
                remarks.append(f"not paired ({re.split('[:,]', self.pairing[name])[0]})")
                rows.append(Row(title, result, other["defense"], remarks=", ".join(remarks)))
                continue
            before, after = _averages(first, other), _averages(run, result)
            shared = sorted(before.keys() & after.keys())
            remarks.append(f"{len(shared)} shared samples")
            values = [torch.stack([each[k] for k in shared]) for each in (before, after)]
            clean, robust = (paired_difference(*(each[:, kind] for each in values)) for kind in (0, 1))
            rows.append(Row(title, result, other["defense"], clean, robust, ", ".join(remarks)))
        return rows

    def page(self) -> str:
        """The comparison as an HTML page."""
        drawings = {
            threat: drawing([r.result for r in rows], [r.title for r in rows]) for threat, rows in self.rows.items()
        }
        keys = dict.fromkeys(key for run in self.runs.values() for key in run.identity)
        values = {key: [run.identity.get(key) for run in self.runs.values()] for key in keys}
        differing = {key: each for key, each in values.items() if len(set(map(str, each))) > 1}
        return render("compare.html", comparison=self, drawings=drawings, differing=differing, GENERATOR=GENERATOR)

    def table(self) -> str:
        """The comparison as text for the terminal."""
        lines = [f"{name}: not paired, {reason}" for name, reason in self.pairing.items() if reason]
        for threat, rows in self.rows.items():
            width = max(len(row.title) for row in rows)
            head = f"{'clean':>20}  {'robust':>20}  {'less':16}{'clean':>20}  {'robust':>20}"
            lines += ["", f"{threat[0]} <= {radius(threat)}, average accuracy in %", f"{'':{width}}  {head}"]
            for row in rows:
                found = "  ".join(f"{percent(row.result[kind]['average']):>20}" for kind in KINDS)
                less = f"{row.other:16}{signed(row.clean):>20}  {signed(row.robust):>20}  {row.remarks}"
                lines.append(f"{row.title:{width}}  {found}  {less}".rstrip())
        return "\n".join(lines)


def _pairing(first: FinishedRun, run: FinishedRun) -> str:
    """The reason why the samples of two runs cannot be paired; empty if they can."""
    for key in ("dataset", "split", "classifier"):
        if first.summary[key] != run.summary[key]:
            return f"another {key}: {run.summary[key]}, not {first.summary[key]}"
    if _settings(first, "classifier") != _settings(run, "classifier"):
        return "the classifier has other settings or another file"
    if _settings(first, "data") != _settings(run, "data"):
        return "the data has other settings, so one index may mean different images"
    before, after = ({record.index: record.label for record in each.records} for each in (first, run))
    shared = before.keys() & after.keys()
    if any(before[index] != after[index] for index in shared):
        return "the same samples have other labels, so the data differs"
    return "" if shared else "the runs share no sample"


def _settings(run: FinishedRun, part: str) -> dict[str, Any]:
    """Settings of the classifier or the data, without the subset, and with files by content."""
    kept = comparable(run.identity).items()
    return {key: value for key, value in kept if re.match(rf"{part}\b(?!\.subset\b)", key)}


def _attack_settings(run: FinishedRun, result: Mapping[str, Any]) -> list[list[Any]]:
    """The settings of every attack behind a result."""
    attacks = {each["attack"]: each for each in run.summary["results"] if each["defense"] == result["defense"]}
    return sorted(([attacks[name].get(key) for key in _ATTACK] for name in attacks_of(result)), key=str)


def _averages(run: FinishedRun, result: Mapping[str, Any]) -> dict[int, torch.Tensor]:
    """By sample, the shares (2,) of correct runs, clean and attacked."""
    shares = torch.stack([outcomes_of(run.pairs, result, kind)[:, 0] for kind in KINDS], dim=1)
    return dict(zip([record.index for record in groups_of(run.pairs, result)[0].records], shares, strict=True))
