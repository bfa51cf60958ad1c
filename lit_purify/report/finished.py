"""A finished evaluation, as its folder tells of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from lit_purify.errors import InputError
from lit_purify.evaluation.folder import RunFolder, comparable
from lit_purify.evaluation.records import identity_sha256
from lit_purify.report.summary import Pairs, by_pair

Threat = tuple[str, float]
"""Norm and radius."""

_INTERVAL = [Real, Real, Real]
_ACCURACIES = {"average": _INTERVAL, "worst": _INTERVAL, "majority": _INTERVAL}
_TEXTS = ("dataset", "split", "subset_sha256", "classifier", "denoiser", "baseline")
_SUMMARY: dict[str, Any] = {**dict.fromkeys(_TEXTS, str), **dict.fromkeys(("samples", "runs", "chunk", "seed"), int)}
_SUMMARY |= {"versions": dict, "files": dict}
_RESULT: dict[str, Any] = dict.fromkeys(("defense", "attack", "attack_title", "norm", "gradient", "stopping"), str)
_RESULT |= dict.fromkeys(("attack_steps", "eot", "nfe_defense", "nfe_attack"), int) | dict.fromkeys(
    ("eps", "seconds"), Real
)
_RESULT |= {"levels": list, "linf": Real, "l2": Real, "clean": _ACCURACIES, "robust": _ACCURACIES}
_VERDICT = {"passed": bool, "samples": list, "checks": list}
_CHECK = {"defense": str, "check": str}
"""What pages are made of; what else these files hold may be missing, as in those of earlier versions."""


@dataclass(frozen=True)
class Verdict:
    """What ``eval.py audit`` or ``eval.py gradcheck`` found.

    Attributes:
        command: ``audit`` or ``gradcheck``.
        state: ``missing`` where the command was not given, ``unreadable`` where its file is damaged; of an audit also
            ``undecided``, on too few samples.
        stale: It is about other settings than those of the evaluation.
        content: Of its file.
        damage: Why it is unreadable, and what mends it.
    """

    command: str
    state: Literal["passed", "failed", "undecided", "missing", "unreadable"]
    stale: bool
    content: Mapping[str, Any]
    damage: str = ""

    @property
    def blamed(self) -> list[str]:
        """The checks that failed, with their defense."""
        failed = [c for c in self.content.get("checks", []) if c.get("verdict") == "fail" or c.get("passed") is False]
        return [f"{check['defense']}: {check['check']}" for check in failed]


@dataclass(frozen=True)
class FinishedRun:
    """What an evaluation has left.

    Attributes:
        folder: Where.
        summary: Content of ``summary.json``.
        pairs: The records that it was made of.
        identity: Settings that the records depend on.
    """

    folder: RunFolder
    summary: Mapping[str, Any]
    pairs: Pairs
    identity: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> FinishedRun:
        """Reads a run's folder, which may be given by its ``summary.json`` as well.

        Raises:
            InputError: It holds no finished evaluation.
        """
        folder = RunFolder(path.parent if path.name == "summary.json" else path)
        if not folder.path.is_dir():
            raise InputError(f"{path}: no such run folder; give a folder that eval.py has written")
        if not folder.summary.is_file():
            unfinished = folder.records.exists()
            remedy = "the same eval.py command finishes it" if unfinished else "give a folder that eval.py has written"
            raise InputError(f"{folder.path}: no finished evaluation, summary.json is missing; {remedy}")
        summary, identity = read_json(folder.summary), read_json(folder.identity)
        if summary.get("schema") != 1 or not summary.get("results"):
            raise InputError(f"{folder.summary}: not a summary that this version reads; give the eval.py command again")
        _check(folder.summary, summary, _SUMMARY)
        for k, result in enumerate(summary["results"]):
            _check(folder.summary, result, _RESULT, f"results.{k}")
        _check_pairs(folder.summary, summary["results"])
        wanted = {(r["defense"], attack) for r in summary["results"] for attack in r.get("attacks", [r["attack"]])}
        pairs = {pair: rs for pair, rs in by_pair(folder.collect(write=False)).items() if pair in wanted}
        for defense, attack in sorted(wanted):
            count = len(pairs.get((defense, attack), []))
            if count != summary["samples"]:
                raise InputError(
                    f"{folder.records}: {count} records of {defense} under {attack}, {summary['samples']} in "
                    "summary.json; give the eval.py command again, or choose another folder with --run"
                )
        return cls(folder, summary, pairs, identity)

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes; their numbers where a summary of an earlier version does not name them."""
        highest = max(max(r.label, *r.clean, *r.adversarial) for records in self.pairs.values() for r in records)
        return self.summary.get("classes") or [str(k) for k in range(highest + 1)]

    def verdict(self, command: str) -> Verdict:
        """Of the folder's ``audit`` or ``gradcheck``, whether it came before the evaluation or after it."""
        path = self.folder.path / f"{command}.json"
        if not path.is_file():
            return Verdict(command, "missing", False, {})
        try:
            content = read_json(path, command)
            _check(path, content, _VERDICT, command=command)
            for k, check in enumerate(content["checks"]):
                _check(path, check, _CHECK, f"checks.{k}", command)
        except InputError as error:
            return Verdict(command, "unreadable", False, {}, str(error))
        # The first as earlier versions took it.
        current = [identity_sha256(settings) for settings in (self.identity, comparable(self.identity))]
        stale = content.get("settings_sha256") not in current
        state: Literal["passed", "failed", "undecided"] = "passed" if content.get("passed") else "failed"
        return Verdict(command, "undecided" if content.get("undecided") else state, stale, content)

    @property
    def verdicts(self) -> list[Verdict]:
        """Both of them."""
        return [self.verdict("audit"), self.verdict("gradcheck")]

    @property
    def threats(self) -> dict[Threat, list[Mapping[str, Any]]]:
        """By threat model each defense's result under all attacks of it: their ensemble where there are several."""
        found: dict[Threat, dict[str, Mapping[str, Any]]] = {}
        for result in self.summary["results"]:
            # Ensembles come last.
            found.setdefault((result["norm"], result["eps"]), {})[result["defense"]] = result
        return {threat: list(results.values()) for threat, results in found.items()}


def attacks_of(result: Mapping[str, Any]) -> list[str]:
    """The attacks behind a result."""
    return list(result.get("attacks", [result["attack"]]))


def threat_name(threat: Threat) -> str:
    """As ``L∞ ≤ 8/255``."""
    return f"{'L∞' if threat[0] == 'linf' else 'L2'} ≤ {radius(threat)}"


def radius(threat: Threat) -> str:
    """In 255ths where that is what was meant."""
    norm, eps = threat
    levels = 255 * eps
    short = len(f"{eps:.6g}".lstrip("0.")) <= 2
    if norm == "linf" and not short and abs(levels - round(levels)) < 1e-4:
        return f"{round(levels)}/255"
    return f"{eps:.4g}"


def read_json(path: Path, command: str = "") -> dict[str, Any]:
    """Content of a file that ``eval.py`` writes.

    Raises:
        InputError: It is missing or damaged.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); {_again(command)}") from error
    _check(path, found, {}, command=command)
    return found


def _check(path: Path, found: Any, wanted: Any, key: str = "", command: str = "") -> None:  # noqa: ANN401
    """Raises an ``InputError`` that names the first key whose value is missing or of another kind than is wanted."""
    kind = type(wanted) if isinstance(wanted, (dict, list)) else wanted
    if not isinstance(found, kind) or (kind is list and wanted is not list and len(found) != len(wanted)):
        fault = f"{key} is missing" if found is None else f"{key or 'its content'} is not what eval.py writes there"
        raise InputError(f"{path}: {fault}; {_again(command)}")
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name, inner in wanted.items():
            _check(path, found.get(name), inner, f"{key}.{name}".lstrip("."), command)
    elif isinstance(wanted, list):
        for k, (each, inner) in enumerate(zip(found, wanted, strict=True)):
            _check(path, each, inner, f"{key}.{k}", command)


def _check_pairs(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Tables have a row for every defense and a column for every attack."""
    found = [(result["defense"], result["attack"]) for result in results]
    for defense, attack in itertools.product(*map(dict.fromkeys, zip(*found, strict=True))):
        if (defense, attack) not in found:
            raise InputError(f"{path}: results has none of {defense} under {attack}; {_again()}")


def _again(command: str = "") -> str:
    return f"give the eval.py {command + ' ' if command else ''}command again"
