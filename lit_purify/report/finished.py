"""A finished evaluation: what a report and a comparison are made of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_purify.errors import InputError
from lit_purify.evaluation import View
from lit_purify.evaluation.folder import RunFolder, comparable
from lit_purify.evaluation.records import Record, identity_sha256
from lit_purify.report import pictures
from lit_purify.report.summary import Pairs, Summary, attacks_of, by_pair

Threat = tuple[str, float]
"""Norm and radius."""


@dataclass(frozen=True)
class Verdict:
    """What ``eval.py audit`` or ``eval.py gradcheck`` found.

    Attributes:
        command: ``audit`` or ``gradcheck``.
        state: ``passed``, ``failed``, ``undecided`` (an audit of too few samples), ``missing`` or ``unreadable``.
        stale: Whether it was made for other settings than those of the evaluation.
        content: Content of its file.
    """

    command: str
    state: str
    stale: bool = False
    content: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, command: str, identity: Mapping[str, Any]) -> Verdict:
        """Reads ``audit.json`` or ``gradcheck.json``, whether it came before the evaluation or after it."""
        path = folder / f"{command}.json"
        if not path.is_file():
            return cls(command, "missing")
        try:
            content = json.loads(path.read_text())
            state = "undecided" if content.get("undecided") else "passed" if content["passed"] else "failed"
            stale = content["settings_sha256"] != identity_sha256(comparable(identity))
            found = cls(command, state, stale, content)
            # A page shows these.
            _ = found.samples, found.blamed
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return cls(command, "unreadable")
        return found

    @property
    def samples(self) -> int:
        """The number of samples that the verdict rests on."""
        return len(self.content["samples"])

    @property
    def blamed(self) -> list[str]:
        """The checks that failed, with their defense."""
        names = [(f"{check['defense']}: {check['check']}", check) for check in self.content["checks"]]
        return [name for name, check in names if check.get("verdict") == "fail" or check.get("passed") is False]


@dataclass(frozen=True)
class FinishedRun:
    """A finished evaluation, read from a run's folder or made in memory.

    Attributes:
        summary: Content of ``summary.json``, see ``summarize``.
        pairs: The records behind it, by (defense, attack).
        identity: Settings that the records depend on.
        config: The configuration as YAML; ``None`` if the evaluation had none.
        views: Samples to look at.
        verdicts: Of the audit and of the check of the gradients.
        path: The run's folder, if there is one.
    """

    summary: Mapping[str, Any]
    pairs: Pairs
    identity: Mapping[str, Any]
    config: str | None = None
    views: Sequence[View] = ()
    verdicts: Sequence[Verdict] = ()
    path: Path | None = None

    @classmethod
    def made(
        cls,
        summary: Mapping[str, Any],
        records: Iterable[Record],
        identity: Mapping[str, Any],
        config: str | None = None,
        views: Sequence[View] = (),
    ) -> FinishedRun:
        """A run that has no folder; for the arguments see the attributes."""
        return cls(summary, by_pair(records), identity, config, views)

    @classmethod
    def read(cls, path: Path, look: bool = True) -> FinishedRun:
        """Reads a run's folder.

        Args:
            path: The folder, or its ``summary.json``.
            look: Whether the configuration and the pictures are read too.

        Raises:
            InputError: The folder holds no finished evaluation, or a file in it is missing or damaged.
        """
        folder = RunFolder(path.parent if path.name == "summary.json" else path)
        if not folder.path.is_dir():
            raise InputError(f"{path}: no such run folder; give a folder that eval.py has written")
        if not folder.summary.is_file():
            unfinished = folder.records.exists()
            remedy = "the same eval.py command finishes it" if unfinished else "give a folder that eval.py has written"
            raise InputError(f"{folder.path}: no finished evaluation, summary.json is missing; {remedy}")
        summary, identity = Summary.read(folder.summary), _identity(folder.identity)
        wanted = {(result["defense"], attack) for result in summary["results"] for attack in attacks_of(result)}
        pairs = {pair: rs for pair, rs in by_pair(folder.collect(write=False)).items() if pair in wanted}
        for defense, attack in sorted(wanted):
            count = len(pairs.get((defense, attack), []))
            if count != summary["samples"]:
                raise InputError(
                    f"{folder.records}: {count} records of {defense} under {attack}, {summary['samples']} in "
                    "summary.json; give the eval.py command again, or choose another folder with --run"
                )
        verdicts = [Verdict.read(folder.path, command, identity) for command in ("audit", "gradcheck")]
        if not look:
            return cls(summary, pairs, identity, verdicts=verdicts, path=folder.path)
        attacked = (
            record for result in summary["results"] for record in pairs.get((result["defense"], result["attack"]), [])
        )
        try:
            # A run of the Python API has no configuration.
            config = folder.config.read_text() if folder.config.exists() else None
            views = list(pictures.read(folder.overlays, attacked))
        except OSError as error:
            raise InputError(
                f"{error.filename or folder.overlays}: {str(error.strerror or error).lower()}, so there is no report; "
                "put the file back, or choose another folder with --run"
            ) from error
        return cls(summary, pairs, identity, config, views, verdicts, folder.path)

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes; their numbers if the summary does not name them."""
        highest = max(max(r.label, *r.clean, *r.adversarial) for records in self.pairs.values() for r in records)
        return self.summary["classes"] or [str(k) for k in range(highest + 1)]

    @property
    def threats(self) -> dict[Threat, dict[str, Mapping[str, Any]]]:
        """By threat model and defense the result under all attacks: that of their ensemble if there are several."""
        found: dict[Threat, dict[str, Mapping[str, Any]]] = {}
        for result in self.summary["results"]:
            # Ensembles come last.
            found.setdefault((result["norm"], result["eps"]), {})[result["defense"]] = result
        return found


def _identity(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give the eval.py command again") from error


def threat_name(threat: Threat) -> str:
    """As ``L∞ ≤ 8/255``."""
    return f"{'L∞' if threat[0] == 'linf' else 'L2'} ≤ {radius(threat)}"


def radius(threat: Threat) -> str:
    """In 255ths if the radius is a whole number of them that a short decimal does not give."""
    norm, eps = threat
    levels = 255 * eps
    short = len(f"{eps:.6g}".lstrip("0.")) <= 2
    if norm == "linf" and not short and abs(levels - round(levels)) < 1e-4:
        return f"{round(levels)}/255"
    return f"{eps:.4g}"
