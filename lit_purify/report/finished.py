"""A finished evaluation, read from a run folder or built in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from lit_purify.errors import InputError
from lit_purify.evaluation import Record, View
from lit_purify.evaluation.folder import RunFolder, comparable
from lit_purify.evaluation.records import identity_sha256
from lit_purify.report import pictures
from lit_purify.report.summary import Pairs, Summary, attacks_of, by_pair

Threat = tuple[str, float]
"""Norm and radius."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished evaluation. In memory, the first three arguments suffice.

    Attributes:
        summary: Content of ``summary.json``, see ``summarize``.
        records: The records behind it.
        identity: The settings that records depend on.
        config: The configuration as YAML, if there is one.
        views: Pictures of the gallery.
        verdicts: Results of ``audit`` and ``gradcheck``, see ``_verdict``.
        path: The run folder, if there is one.
    """

    summary: Mapping[str, Any]
    records: Sequence[Record]
    identity: Mapping[str, Any]
    config: str | None = None
    views: Sequence[View] = ()
    verdicts: Sequence[Mapping[str, Any]] = ()
    path: Path | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads a run folder, named by its path or that of its ``summary.json``.

        Raises:
            InputError: The folder holds no finished evaluation, or a file in it is missing or damaged.
        """
        folder = RunFolder(path.parent if path.name == "summary.json" else path)
        if not folder.summary.is_file():
            unfinished = folder.records.exists()
            remedy = "finish it with the same eval.py command" if unfinished else "name a folder that eval.py wrote"
            raise InputError(f"{folder.path}: no finished evaluation, summary.json is missing: {remedy}")
        summary = Summary.read(folder.summary)
        try:
            identity = dict(json.loads(folder.identity.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{folder.identity}: cannot be read ({error}): run eval.py in a new folder") from error
        wanted = {(result["defense"], attack) for result in summary["results"] for attack in attacks_of(result)}
        used = [record for record in folder.collect(write=False) if record.key[:2] in wanted]
        if len(used) != (expected := len(wanted) * summary["samples"]):
            raise InputError(
                f"{folder.records}: {len(used)} records instead of the {expected} of summary.json: run the same "
                "eval.py command again"
            )
        try:
            # lp.evaluate writes no configuration.
            config = folder.config.read_text() if folder.config.exists() else None
            views = list(pictures.read(folder.overlays, used))
        except OSError as error:
            raise InputError(
                f"{error.filename or folder.overlays}: {str(error.strerror or error).lower()}, so there is no report: "
                "restore the file or choose another folder"
            ) from error
        verdicts = [_verdict(folder.path, command, identity) for command in ("audit", "gradcheck")]
        return cls(summary, used, identity, config, views, verdicts, folder.path)

    @cached_property
    def pairs(self) -> Pairs:
        """The records by (defense, attack)."""
        return by_pair(self.records)

    @property
    def threats(self) -> dict[Threat, dict[str, Mapping[str, Any]]]:
        """The result under all attacks (of their ensemble, if there are several), by threat model and defense."""
        found: dict[Threat, dict[str, Mapping[str, Any]]] = {}
        for result in self.summary["results"]:
            found.setdefault((result["norm"], result["eps"]), {})[result["defense"]] = result
        return found


def _verdict(folder: Path, command: str, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Reads ``audit.json`` or ``gradcheck.json``: its ``content``, the ``failed`` checks, the number of ``samples``.

    ``state`` is passed, failed, undecided (too few samples), missing or unreadable. ``stale`` means other settings.
    """
    found = {"command": command, "stale": False, "samples": 0, "failed": [], "content": {}}
    try:
        content = json.loads((folder / f"{command}.json").read_text())
        failed = [f"{c['defense']}: {c['check']}" for c in content["checks"] if c["verdict"] == "fail"]
        state = "undecided" if content["undecided"] else "passed" if content["passed"] else "failed"
        stale, samples = content["settings_sha256"] != identity_sha256(comparable(identity)), len(content["samples"])
        return {**found, "state": state, "stale": stale, "samples": samples, "failed": failed, "content": content}
    except FileNotFoundError:
        return {**found, "state": "missing"}
    except (OSError, ValueError, TypeError, KeyError):
        return {**found, "state": "unreadable"}


def threat_name(threat: Threat) -> str:
    """A threat model as text, such as ``L∞ ≤ 8/255``."""
    return f"{ {'linf': 'L∞', 'l2': 'L2'}.get(threat[0], threat[0]) } ≤ {radius(threat)}"


def radius(threat: Threat) -> str:
    """The radius as text: as ``N/255`` if it is such a fraction and no short decimal."""
    norm, eps = threat
    short = len(f"{eps:.6g}".lstrip("0.")) <= 2
    if norm == "linf" and not short and abs(255 * eps - round(255 * eps)) < 1e-4:
        return f"{round(255 * eps)}/255"
    return f"{eps:.4g}"
