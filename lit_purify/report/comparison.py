"""Several finished evaluations side by side, with differences that are paired where samples are shared."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_purify.errors import InputError
from lit_purify.functional.statistics import Interval, paired_difference, unpaired_difference
from lit_purify.report.finished import FinishedRun, Threat, radius, threat_name
from lit_purify.report.html import best, render
from lit_purify.report.summary import KINDS, attacks_of, groups_of, outcomes_of, percent, signed

GENERATOR = "lit_purify compare"
"""What a page of a comparison says that it was made by."""
_HOW = ("attack_title", "attack_steps", "eot", "gradient", "mask_gradient")
"""What makes two attacks of one threat model alike, under whatever names."""


@dataclass(frozen=True)
class Row:
    """A defense of a run, and how it differs from its counterpart in the first run.

    Attributes:
        run: Name of the run.
        result: Of ``summary.json``.
        other: Name of the counterpart, empty if there is none.
        clean: Difference of the clean average, in [-1, 1].
        robust: Difference of the robust average.
        remarks: What the differences rest on, and what else differs between the two.
    """

    run: str
    result: Mapping[str, Any]
    other: str = ""
    clean: Interval | None = None
    robust: Interval | None = None
    remarks: str = ""

    @property
    def title(self) -> str:
        """Run and defense."""
        return f"{self.run}: {self.result['defense']}"


class Comparison:
    """Runs compared to the first of them.

    Args:
        folders: Run folders, at least two.

    Raises:
        InputError: A folder holds no finished evaluation, or is named twice.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        if len(folders) < 2:
            raise InputError("compare takes two run folders or more, the first is what the others are compared to")
        named = zip(_names(folders), folders, strict=True)
        self.runs = {name: FinishedRun.read(path, look=False) for name, path in named}
        self.first = next(iter(self.runs))
        self.pairing = {name: _pairing(self.runs[self.first], run) for name, run in self.runs.items()}
        threats = dict.fromkeys(threat for run in self.runs.values() for threat in run.threats)
        self.rows = {
            threat: [
                self._row(name, result, threat)
                for name, run in self.runs.items()
                for result in run.threats.get(threat, {}).values()
            ]
            for threat in threats
        }

    def _row(self, name: str, result: Mapping[str, Any], threat: Threat) -> Row:
        """The counterpart has the same name, or else is the first run's baseline."""
        first, run = self.runs[self.first], self.runs[name]
        known = first.threats.get(threat, {})
        other = known.get(result["defense"], known.get(first.summary["baseline"]))
        if name == self.first or other is None:
            return Row(name, result)
        remarks = [] if _how(first, other) == _how(run, result) else ["another attack"]
        if first.summary["runs"] != run.summary["runs"]:
            remarks.append(f"{run.summary['runs']} runs for {first.summary['runs']}")
        found = {}
        if self.pairing[name]:
            remarks.append(f"not paired ({re.split('[:,]', self.pairing[name])[0]})")
            for kind in KINDS:
                before, after = (Interval(*each[kind]["average"]) for each in (other, result))
                found[kind] = unpaired_difference(before, after)
        else:
            for kind in KINDS:
                pair = _averages(first, other, kind), _averages(run, result, kind)
                shared = sorted(pair[0].keys() & pair[1].keys())
                found[kind] = paired_difference(*(torch.stack([values[k] for k in shared]) for values in pair))
            remarks.append(f"{len(shared)} shared samples")
        return Row(name, result, other["defense"], **found, remarks=", ".join(remarks))

    @property
    def differing(self) -> dict[str, dict[str, Any]]:
        """Settings that are not the same in all runs, by setting and run."""
        keys = dict.fromkeys(key for run in self.runs.values() for key in run.identity)
        values = {key: {name: run.identity.get(key) for name, run in self.runs.items()} for key in keys}
        return {key: by_run for key, by_run in values.items() if len({str(value) for value in by_run.values()}) > 1}

    def page(self) -> str:
        """``compare.html``."""
        drawings = {
            f"Clean against robust accuracy, {threat_name(threat)}": best(
                [row.result for row in rows], [row.title for row in rows]
            )
            for threat, rows in self.rows.items()
        }
        return render("compare.html", comparison=self, drawings=drawings, GENERATOR=GENERATOR)

    def table(self) -> str:
        """What is printed."""
        lines = [f"{name}: not paired, {reason}" for name, reason in self.pairing.items() if reason]
        for threat, rows in self.rows.items():
            width = max(len(row.title) for row in rows)
            head = f"{'clean':>20}  {'robust':>20}  {'less ' + self.first + ':':16}{'clean':>20}  {'robust':>20}"
            lines += ["", f"{threat[0]} <= {radius(threat)}, average accuracy in %", f"{'':{width}}  {head}"]
            for row in rows:
                line = f"{row.title:{width}}"
                line += "".join(f"  {percent(row.result[kind]['average']):>20}" for kind in KINDS)
                if row.other:
                    line += f"  {row.other:16}{signed(row.clean):>20}  {signed(row.robust):>20}  {row.remarks}"
                lines.append(line)
        return "\n".join(lines)


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    whole = [(path.parent if path.name == "summary.json" else path).resolve() for path in folders]
    for path in whole:
        if whole.count(path) > 1:
            raise InputError(f"{path}: named twice; give each run once")
    named = (["/".join(path.parts[-parts:]) for path in whole] for parts in range(1, 1000))
    return next(names for names in named if len(set(names)) == len(names))


def _pairing(first: FinishedRun, run: FinishedRun) -> str:
    """Why the samples of two runs cannot be paired; empty if they can."""
    for key in ("dataset", "split", "classifier"):
        if first.summary[key] != run.summary[key]:
            return f"another {key}: {run.summary[key]}, not {first.summary[key]}"
    if _settings(first, "classifier") != _settings(run, "classifier"):
        return "the classifier has other settings or another file"
    if _settings(first, "data") != _settings(run, "data"):
        return "the data have other settings, and samples of one number may be other images"
    before, after = (
        {record.index: record.label for records in each.pairs.values() for record in records} for each in (first, run)
    )
    shared = before.keys() & after.keys()
    if not shared:
        return "no sample is shared"
    if any(before[index] != after[index] for index in shared):
        return "samples of one number have other labels, so the data are not the same"
    return ""


def _settings(run: FinishedRun, part: str) -> dict[str, Any]:
    """Of the classifier or the data, without the choice of samples, and with files by their content, not their path."""
    settings = {re.sub(r"\b(model|init_args)\.", "", key): value for key, value in run.identity.items()}
    return {
        key: value
        for key, value in settings.items()
        if re.match(rf"{part}\b", key) and not key.startswith("data.subset") and f"{key} (sha256)" not in settings
    }


def _how(run: FinishedRun, result: Mapping[str, Any]) -> list[list[Any]]:
    """Of every attack behind a result."""
    attacks = {each["attack"]: each for each in run.summary["results"] if each["defense"] == result["defense"]}
    return sorted(([attacks[name].get(key) for key in _HOW] for name in attacks_of(result)), key=str)


def _averages(run: FinishedRun, result: Mapping[str, Any], kind: str) -> dict[int, Tensor]:
    """By sample the share of right runs."""
    indices = [record.index for record in groups_of(run.pairs, result)[0]]
    return dict(zip(indices, outcomes_of(run.pairs, result, kind)[:, 0], strict=True))
