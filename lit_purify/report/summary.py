"""From records to the figures of ``summary.json`` and the printed table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch
from torch import Tensor

from lit_purify.errors import InputError
from lit_purify.evaluation.evaluator import ENSEMBLE
from lit_purify.evaluation.records import Record
from lit_purify.functional.statistics import (
    Interval,
    accuracies,
    ensemble,
    held_out,
    mean_interval,
    outcomes,
    paired_difference,
    submissions,
    survival,
    vote,
)
from lit_purify.report.frontier import compared, families

RULES = ("average", "worst", "majority")
KINDS = ("clean", "robust")
_GRADIENTS = ("exact", "theirs", "bpda", "surrogate", "none")
"""The strongest first; ``theirs`` is that of an attack of another library."""
_STATED = ("attack_title", "norm", "eps", "attack_steps", "eot", "gradient", "nfe_defense", "nfe_attack", "seconds")


@dataclass(frozen=True)
class Summary:
    """Content of ``summary.json``.

    Attributes:
        dataset: Name of the data set.
        samples: Number of samples.
        runs: N, the runs of each sample.
        classifier: Name of the classifier and its file.
        baseline: The defense that differences are taken to.
        undefended_clean_accuracy: Average clean accuracy without a defense, if that was evaluated.
        results: One dictionary for each (defense, attack), then for each ensemble of attacks: what the evaluation
            states of it, and ``clean`` and ``robust`` accuracies, ``average``, ``worst`` and ``majority``, each as
            [value, low, high].
        split: Split of the data set.
        classes: Names of the classes.
        subset_sha256: Hash of the positions of the samples.
        seed: Of all noise.
        chunk: Rows of a network call.
        smaller_chunks: Number of records by the rows of a network call, if memory was too small for ``chunk``.
        denoiser: Name of the denoiser and its file.
        versions: Of the libraries.
        files: Hashes of the files that the records depend on.
        frontier: By attack the comparison of families of defenses, see ``frontier.compared``; empty without families.
        schema: Of this file.
    """

    dataset: str
    samples: int
    runs: int
    classifier: str
    baseline: str
    undefended_clean_accuracy: float | None
    results: list[dict[str, Any]]
    split: str = ""
    classes: list[str] = field(default_factory=list)
    subset_sha256: str = ""
    seed: int = 0
    chunk: int = 0
    smaller_chunks: dict[str, int] = field(default_factory=dict)
    denoiser: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    frontier: dict[str, Any] = field(default_factory=dict)
    schema: int = 1

    @classmethod
    def read(cls, path: Path) -> dict[str, Any]:
        """Content of the file.

        Raises:
            InputError: It is damaged, or another version has written it.
        """
        try:
            found = cls(**json.loads(path.read_text()))
            range(found.runs), range(found.samples)
            for result in found.results:
                _ = [result[key] for key in ("defense", "attack", *_STATED)]
                for kind in KINDS:
                    _ = [Interval(*map(float, result[kind][rule])) for rule in RULES]
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = str(error).replace("Summary.__init__() ", "")
            raise InputError(
                f"{path}: not a summary of this version ({reason}); give the eval.py command again"
            ) from error
        return asdict(found)


class Group(list[Record]):
    """Records of one (defense, attack), and as tensors what is computed with again and again."""

    @cached_property
    def label(self) -> Tensor:
        """(B,)."""
        return torch.tensor([record.label for record in self])

    @cached_property
    def clean(self) -> Tensor:
        """Predictions on clean images, (B, N)."""
        return torch.tensor([record.clean for record in self])

    @cached_property
    def robust(self) -> Tensor:
        """Predictions on adversarial images, (B, N)."""
        return torch.tensor([record.adversarial for record in self])


Pairs = Mapping[tuple[str, str], Group]


def by_pair(records: Iterable[Record]) -> dict[tuple[str, str], Group]:
    """Records of each (defense, attack), in the order of the samples."""
    pairs: dict[tuple[str, str], Group] = {}
    for record in sorted(records, key=lambda record: record.index):
        pairs.setdefault((record.defense, record.attack), Group()).append(record)
    return pairs


def attacks_of(result: Mapping[str, Any]) -> list[str]:
    """The attacks behind a result: one, or those that an ensemble is made of."""
    return list(result.get("attacks", [result["attack"]]))


def groups_of(pairs: Pairs, result: Mapping[str, Any]) -> list[Group]:
    """The records behind a result, of each of its attacks."""
    return [pairs[result["defense"], attack] for attack in attacks_of(result)]


def outcomes_of(pairs: Pairs, result: Mapping[str, Any], kind: str) -> Tensor:
    """(B, 3) ``outcomes``: ``clean``, the same under every attack, or ``robust``, under the ensemble of the attacks."""
    groups = groups_of(pairs, result)
    if kind == "clean":
        return outcomes(groups[0].clean, groups[0].label)
    return ensemble(torch.stack([outcomes(group.robust, group.label) for group in groups]))


def summarize(
    records: Iterable[Record], described: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], baseline: str
) -> dict[str, Any]:
    """The content of ``summary.json``.

    Args:
        records: One for each (defense, attack, sample), the same samples for all pairs.
        described: What each (defense, attack) states about itself; ``undefended`` is true of no defense.
        facts: What holds for the whole evaluation, see ``Summary``.
        baseline: The defense that paired differences are taken to.
    """
    pairs = by_pair(records)
    described = [*described, *ensembles(described)]
    found = {(r["defense"], r["attack"], kind): outcomes_of(pairs, r, kind) for r in described for kind in KINDS}
    # Of each threat model the attack that the others are compared to.
    firsts = {(result["norm"], result["eps"]): result["attack"] for result in reversed(described)}
    results = []
    for result in described:
        defense, attack, groups = result["defense"], result["attack"], groups_of(pairs, result)
        entry, runs = dict(result), len(groups[0][0].clean)
        for kind in KINDS:
            values = found[defense, attack, kind]
            shares = accuracies(values.sum(dim=0), values.square().sum(dim=0), len(values), runs)
            entry[kind] = {rule: list(getattr(shares, rule)) for rule in RULES}
            for name, share in (("resubmission", survival), ("vote", vote)):
                rows = [[draws, *_lowest(share, groups, kind, draws)] for draws in submissions(runs)]
                entry.setdefault(name, {})[kind] = rows
            if defense != baseline:
                entry[f"{kind}_difference"] = _differences(found[baseline, attack, kind], values)
        if len(groups) > 1 and runs > 1:
            right = torch.stack([group.robust == group.label[:, None] for group in groups])
            entry["robust_average_held_out"] = list(mean_interval(held_out(right), runs))
        repeated = sum(record.lost_to is not None for record in groups[0]) if len(groups) == 1 else 0
        if repeated:
            entry["repeated"] = repeated
        first = firsts[result["norm"], result["eps"]]
        # Of one that left samples out the difference would be that of all attacks so far.
        if len(groups) == 1 and attack != first and not repeated:
            less = _differences(found[defense, first, "robust"], found[defense, attack, "robust"])
            entry["attack_difference"] = {"to": first, **less}
        entry["linf"], entry["l2"] = (max(getattr(r, norm) for g in groups for r in g) for norm in ("linf", "l2"))
        entry["seconds"] = sum(r.seconds for g in groups for r in g)
        results.append(entry)
    undefended = [entry["clean"]["average"][0] for entry in results if entry.get("undefended")]
    frontiers, defenses = {}, list(dict.fromkeys(result["defense"] for result in described))
    if families(defenses):
        for attack in dict.fromkeys(result["attack"] for result in described):
            columns = [torch.stack([found[name, attack, kind][:, 0] for kind in KINDS], dim=1) for name in defenses]
            frontiers[attack] = compared(torch.stack(columns, dim=1), defenses)
    return asdict(
        Summary(
            **facts,
            baseline=baseline,
            undefended_clean_accuracy=next(iter(undefended), None),
            results=results,
            frontier=frontiers,
        )
    )


def _differences(first: Tensor, second: Tensor) -> dict[str, list[float]]:
    return {rule: list(paired_difference(first[:, k], second[:, k])) for k, rule in enumerate(RULES)}


def _lowest(share: Callable[[Tensor, Tensor, int], Tensor], groups: Sequence[Group], kind: str, draws: int) -> Interval:
    """The share of each sample under the attack that is best against it; clean runs are the same under each."""
    shares = [share(getattr(group, kind), group.label, draws) for group in groups[: 1 if kind == "clean" else None]]
    return mean_interval(torch.stack(shares).amin(dim=0), len(groups[0][0].clean))


def ensembles(described: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each defense the worst case over its attacks, a further result; one for each threat model with several.

    Attacks of another norm or radius answer another question, and stay apart.
    """
    groups: dict[tuple[str, float, str], list[Mapping[str, Any]]] = {}
    for result in described:
        groups.setdefault((result["norm"], result["eps"], result["defense"]), []).append(result)
    several = {key: group for key, group in groups.items() if len(group) > 1}
    models = {(norm, eps) for norm, eps, _ in several}

    def named(norm: str, eps: float, digits: int) -> str:
        return ENSEMBLE if len(models) == 1 else f"{ENSEMBLE}-{norm}-{eps:.{digits}g}"

    # As few digits as tell the radii apart; 17 tell all.
    digits = next(d for d in range(4, 18) if len({named(*model, d) for model in models}) == len(models))
    return [_combined(named(norm, eps, digits), group) for (norm, eps, _), group in several.items()]


def _combined(name: str, group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An ensemble states what its attacks agree on, and a list where they differ; of costs the sum."""
    values: dict[str, list[Any]] = {key: [result.get(key) for result in group] for key in group[0]}
    combined = {key: found[0] if all(v == found[0] for v in found) else found for key, found in values.items()}
    if all(values.get("queries", [None])):
        combined["queries"] = {kind: sum(each[kind] for each in values["queries"]) for kind in values["queries"][0]}
    return {
        **combined,
        "attack": name,
        "attacks": values["attack"],
        "attack_title": f"for each sample the best of {', '.join(values['attack'])}",
        "attack_steps": sum(values["attack_steps"]),
        "eot": max(values["eot"]),
        "gradient": min(values["gradient"], key=_GRADIENTS.index),
        "nfe_attack": max(values["nfe_attack"]),
        "stopping": "; ".join(f"{result['attack']}: {result['stopping']}" for result in group),
    }


def headline(summary: Mapping[str, Any]) -> str:
    """What was evaluated, in a line."""
    split = f" ({summary['split']})" if summary["split"] else ""
    return (
        f"{summary['dataset']}{split}, {summary['samples']} samples, {summary['runs']} runs each; "
        f"classifier {summary['classifier']}"
    )


def attack_line(results: Sequence[Mapping[str, Any]]) -> str:
    """What an attack is, in a line; its results may differ in the gradient that it took of each defense."""
    result = results[0]
    parts = [f"{result['attack']}: {result['norm']} <= {result['eps']:.4g}"]
    # The attacks of an ensemble have lines of their own, and their steps do not add up to those of an attack.
    if "attacks" not in result:
        words = {"none": "no", "theirs": "their own"}
        kinds = dict.fromkeys(words.get(r["gradient"], r["gradient"]) for r in results)
        masks = dict.fromkeys(r.get("mask_gradient", "none") for r in results)
        if result["gradient"] != "theirs":
            parts += [f"{result['attack_steps']} steps", f"EOT {result['eot']}"]
        parts += [f"{' or '.join(kinds)} gradient", *(f"{m} mask" for m in masks if m not in ("none", "frozen"))]
    return f"{', '.join(parts)}; {result['attack_title']}"


def chunk_line(summary: Mapping[str, Any]) -> str:
    """The rows of a network call, in a line."""
    fewer = [f"{count} records with {rows}" for rows, count in summary["smaller_chunks"].items()]
    if not fewer:
        return f"{summary['chunk']}"
    return f"{summary['chunk']}, but {', '.join(fewer)} (too little memory): equal to others up to rounding only"


def percent(value: Sequence[float]) -> str:
    """An interval as ``value [low, high]`` in percent."""
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * each for each in value))


def signed(value: Sequence[float] | None) -> str:
    """A difference as ``+value [low, high]`` in points; nothing if there is none."""
    return "" if value is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * each for each in value))


def _row(result: Mapping[str, Any]) -> str:
    return result["defense"] + (" *" if "repeated" in result else "")


def _attack_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each attack leaves more than the first one of its kind, on the same samples."""
    found: dict[str, list[str]] = {}
    for result in results:
        if "attack_difference" in result:
            less = result["attack_difference"]
            # A figure and its interval stay on one line.
            words = f"{result['defense']} {signed(less['average'])}".replace(" ", "\xa0")
            found.setdefault(f"  {result['attack']} less {less['to']}: ", []).append(words)
    lines = ["robust avg between attacks, in points"] if found else []
    for name, differences in found.items():
        lines += wrap(name + ", ".join(differences), 100, subsequent_indent="    ", break_on_hyphens=False)
    return [line.replace("\xa0", " ") for line in [*lines, *[""] * bool(found)]]


def _frontier_lines(frontiers: Mapping[str, Any]) -> list[str]:
    """How families of defenses compare."""
    lines = ["families at equal clean accuracy, robust avg in points"] if frontiers else []
    for attack, part in frontiers.items():
        for each in part["comparisons"]:
            less = signed(each["difference"])
            lines.append(
                f"  {attack}: {each['family']} less {each['to']}: {less or 'nowhere as clean'}, {each['verdict']}"
            )
        if part["open_ended"]:
            lines.append(f"  {attack}: most robust at the strongest noise, try more: {', '.join(part['open_ended'])}")
    return [
        *lines,
        "  The best of many points on the same samples is optimistic: evaluate a choice on test.",
        "",
    ] * bool(lines)


def table(summary: Mapping[str, Any]) -> str:
    """What ``eval.py`` prints: at most 100 columns for names of up to 14 letters."""
    results = summary["results"]
    width = max(10, *(len(_row(result)) for result in results))
    lines = ["", headline(summary)]
    for attack in dict.fromkeys(result["attack"] for result in results):
        group = [result for result in results if result["attack"] == attack]
        lines += [
            *attack_line(group).split("; "),
            "",
            f"{'accuracy in %':{width}}  {'':5}  {'clean':^20}  {'robust':^33}",
            f"{'defense':{width}}  {'calls':>5}  {'avg':>6} {'worst':>6} {'vote':>6}  {'avg [95 %]':>19} {'worst':>6} "
            f"{'vote':>6}  {'avg - ' + summary['baseline']:>19}",
        ]
        for result in group:
            clean, robust = ([f"{100 * result[kind][rule][0]:6.1f}" for rule in RULES] for kind in KINDS)
            difference = signed(result.get("robust_difference", {}).get("average"))
            lines.append(
                f"{_row(result):{width}}  {result['nfe_defense']:5d}  {' '.join(clean)}  "
                f"{percent(result['robust']['average']):>19} {' '.join(robust[1:])}  {difference:>19}"
            )
        lines.append("")
    lines += [*_attack_lines(results), *_frontier_lines(summary["frontier"])]
    lines.append("avg: mean over runs. worst: right in every run. vote: majority of the runs, a tie counts as wrong.")
    if any("repeated" in result for result in results):
        lines.append("*: samples that an earlier attack left wrong in all runs were not attacked again.")
    if summary["smaller_chunks"]:
        lines.append(f"rows of a network call: {chunk_line(summary)}.")
    if any("attacks" in result for result in results):
        lines.append("ensemble: each sample under the attack that is best against it; its avg is too low by chance.")
    return "\n".join(line.rstrip() for line in lines)
