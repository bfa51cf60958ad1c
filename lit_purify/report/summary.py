"""The summary of an evaluation, computed from its records, and the printed table.

Families of defenses, named ``FAMILY/POINT`` such as ``uniform/100``, are compared at equal clean accuracy.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_purify.errors import InputError
from lit_purify.evaluation.evaluator import ENSEMBLE
from lit_purify.evaluation.records import Record
from lit_purify.functional import statistics
from lit_purify.functional.frontier import bootstrap, gap, resampled
from lit_purify.report.diagnostics import diagnosed, diagnosis_lines
from lit_purify.report.rows import by_kind, detection_lines

_RESAMPLES = 2000
"""Bootstrap resamples of the samples, for the intervals of frontiers."""
RULES = ("average", "worst", "majority")
KINDS = ("clean", "robust")
_APPROXIMATE = ("constant_moment", "constant_projection", "identity_projection")
_GRADIENTS = ("exact", "straight_through", "theirs", *_APPROXIMATE, "bpda", "surrogate", "none")
"""Strongest first; ``theirs`` belongs to an attack of another library."""
_POOR = 0.5
"""Relative error above which a denoiser gets a warning."""


@dataclass(frozen=True)
class Summary:
    """Content of ``summary.json``: facts of an evaluation, and its results.

    Attributes:
        undefended_clean_accuracy: Average clean accuracy without a defense, in [0, 1]; ``None`` if not evaluated.
        results: One for each (defense, attack), then one for each ensemble of attacks. Each holds its settings, and its
            ``clean`` and ``robust`` accuracies by rule as [value, low, high] in [0, 1]; see also ``diagnosed``.
        denoising: By defense, the strongest level and the relative error of the predicted noise, see
            ``Evaluator.denoising``.
        arithmetic: Precision of the networks, and how a GPU calls them.
        smaller_chunks: Number of records by chunk, for chunks that were reduced because memory was too small.
        files: sha256 of the files that the records depend on, by path.
        features: For table rows, name, minimum and maximum of each feature.
        frontier: By attack, the comparison of families of defenses, see ``compared``; empty without families.
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
    denoising: dict[str, list[float]] = field(default_factory=dict)
    arithmetic: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    features: list[list[Any]] = field(default_factory=list)
    frontier: dict[str, Any] = field(default_factory=dict)
    schema: int = 1

    @classmethod
    def read(cls, path: Path) -> dict[str, Any]:
        """Content of the file, or an ``InputError`` if it is damaged or another version has written it."""
        try:
            found = cls(**json.loads(path.read_text()))
            _ = range(found.runs), range(found.samples)
            for result in found.results:
                _ = [result[key] for key in ("defense", "attack", "norm", "eps", "attack_steps", "eot", "gradient")]
                _ = [statistics.Interval(*map(float, result[kind][rule])) for kind in KINDS for rule in RULES]
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = str(error).replace("Summary.__init__() ", "")
            remedy = "run the same eval.py command again"
            raise InputError(f"{path}: not a summary of this version ({reason}); {remedy}") from error
        return asdict(found)


class Group(NamedTuple):
    """Records of one (defense, attack), sorted by sample, with labels (B,) and predictions (B, N)."""

    records: list[Record]
    label: Tensor
    clean: Tensor
    robust: Tensor


Pairs = Mapping[tuple[str, str], Group]


def by_pair(records: Iterable[Record]) -> dict[tuple[str, str], Group]:
    """Groups records by (defense, attack)."""
    pairs: dict[tuple[str, str], list[Record]] = {}
    for record in sorted(records, key=lambda record: record.index):
        pairs.setdefault((record.defense, record.attack), []).append(record)

    def group(own: list[Record]) -> Group:
        values = ([getattr(record, name) for record in own] for name in ("label", "clean", "adversarial"))
        return Group(own, *map(torch.tensor, values))

    return {pair: group(own) for pair, own in pairs.items()}


def attacks_of(result: Mapping[str, Any]) -> list[str]:
    """Names of the attacks behind a result: one, or those of an ensemble."""
    return list(result.get("attacks", [result["attack"]]))


def groups_of(pairs: Pairs, result: Mapping[str, Any], kind: str = "robust") -> list[Group]:
    """The records behind a result, one group for each attack; for ``clean`` only the first, as all are equal."""
    groups = [pairs[result["defense"], attack] for attack in attacks_of(result)]
    return groups[:1] if kind == "clean" else groups


def outcomes_of(pairs: Pairs, result: Mapping[str, Any], kind: str) -> Tensor:
    """``outcomes`` (B, 3) of the clean or robust runs, as the worst case over the attacks of a result."""
    return statistics.ensemble(
        torch.stack([statistics.outcomes(getattr(g, kind), g.label) for g in groups_of(pairs, result, kind)])
    )


def summarize(
    records: Iterable[Record], described: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], baseline: str
) -> dict[str, Any]:
    """The content of ``summary.json``.

    Args:
        records: One for each (defense, attack, sample), with the same samples for all pairs.
        described: Settings of each (defense, attack), see ``Evaluator.describe``.
        facts: Facts about the whole evaluation, see ``Evaluator.facts``.
        baseline: The defense that the others are compared with.
    """
    pairs, kinds = by_pair(records), facts.get("kinds", {})
    facts = {name: value for name, value in facts.items() if name != "kinds"}
    described = [*described, *ensembles(described)]
    found = {(r["defense"], r["attack"], kind): outcomes_of(pairs, r, kind) for r in described for kind in KINDS}
    # The first attack of each threat model: the others are compared with it.
    firsts = {(result["norm"], result["eps"]): result["attack"] for result in reversed(described)}
    results = []
    for result in described:
        defense, attack, groups = result["defense"], result["attack"], groups_of(pairs, result)
        entry, own = dict(result), [record for group in groups for record in group.records]
        runs = len(own[0].clean)
        for kind in KINDS:
            values = found[defense, attack, kind]
            shares = statistics.accuracies(values.sum(dim=0), values.square().sum(dim=0), len(values), runs)
            entry[kind] = {rule: list(getattr(shares, rule)) for rule in RULES}
            for name, share in (("resubmission", statistics.survival), ("vote", statistics.vote)):
                rows = entry.setdefault(name, {}).setdefault(kind, [])
                for draws in statistics.submissions(runs):
                    each = [share(getattr(g, kind), g.label, draws) for g in groups_of(pairs, result, kind)]
                    rows.append([draws, *statistics.mean_interval(torch.stack(each).amin(dim=0), runs)])
            if defense != baseline:
                entry[f"{kind}_difference"] = _differences(found[baseline, attack, kind], values)
        if kinds:
            averages = {kind: found[defense, attack, kind][:, 0] for kind in KINDS}
            entry |= by_kind(averages, groups[0].label, [kinds[record.index] for record in groups[0].records], runs)
        repeated, first = sum(record.lost_to is not None for record in own), firsts[result["norm"], result["eps"]]
        if len(groups) > 1 and runs > 1:
            right = torch.stack([group.robust == group.label[:, None] for group in groups])
            entry["robust_average_held_out"] = list(statistics.mean_interval(statistics.held_out(right), runs))
        elif len(groups) == 1 and repeated:
            entry["repeated"] = repeated
        elif len(groups) == 1 and attack != first:
            less = _differences(found[defense, first, "robust"], found[defense, attack, "robust"])
            entry["attack_difference"] = {"to": first, **less}
        if len(groups) == 1:
            entry |= diagnosed(own)
        entry |= {norm: max(getattr(record, norm) for record in own) for norm in ("linf", "l2")}
        entry["seconds"] = sum(record.seconds for record in own)
        results.append(entry)
    frontiers, defenses = {}, list(dict.fromkeys(result["defense"] for result in described))
    for attack in dict.fromkeys(result["attack"] for result in described) if families(defenses) else ():
        columns = [torch.stack([found[name, attack, kind][:, 0] for kind in KINDS], dim=1) for name in defenses]
        frontiers[attack] = compared(torch.stack(columns, dim=1), defenses)
    undefended = [entry["clean"]["average"][0] for entry in results if entry.get("undefended")]
    clean = next(iter(undefended), None)
    about = Summary(**facts, baseline=baseline, undefended_clean_accuracy=clean, results=results, frontier=frontiers)
    return asdict(about)


def _differences(first: Tensor, second: Tensor) -> dict[str, list[float]]:
    return {rule: list(statistics.paired_difference(first[:, k], second[:, k])) for k, rule in enumerate(RULES)}


def ensembles(described: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Describes the worst case over several attacks, for each defense and each threat model with several attacks.

    Attacks of different norms or radii are never combined. A setting on which the attacks differ becomes a list.
    """
    groups: dict[tuple[str, float, str], list[Mapping[str, Any]]] = {}
    for result in described:
        groups.setdefault((result["norm"], result["eps"], result["defense"]), []).append(result)
    several = {key: group for key, group in groups.items() if len(group) > 1}
    models, found = {(norm, eps) for norm, eps, _ in several}, []
    for (norm, eps, _), group in several.items():
        keys = [key for key in group[0] if key not in ("queries", "diagnostics")]
        values: dict[str, list[Any]] = {key: [result.get(key) for result in group] for key in keys}
        entry = {key: each[0] if all(value == each[0] for value in each) else each for key, each in values.items()}
        entry |= {
            "attack": ENSEMBLE if len(models) == 1 else f"{ENSEMBLE}-{norm}-{eps:.4g}",
            "attacks": values["attack"],
            "attack_title": f"for each sample the best of {', '.join(values['attack'])}",
            "attack_steps": sum(values["attack_steps"]),
            "eot": max(values["eot"]),
            "gradient": min(values["gradient"], key=_GRADIENTS.index),
            "nfe_attack": max(values["nfe_attack"]),
            "stopping": "; ".join(f"{result['attack']}: {result['stopping']}" for result in group),
        }
        found.append(entry)
    return found


def families(defenses: Iterable[str]) -> dict[str, list[str]]:
    """Defenses by the name before '/'; empty without two families, one of them with two points."""
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(defenses):
        if "/" in name:
            found.setdefault(name.partition("/")[0], []).append(name)
    return found if len(found) > 1 and max(map(len, found.values())) > 1 else {}


def compared(shares: Tensor, defenses: Sequence[str]) -> list[dict[str, Any]]:
    """How each two families differ under one attack.

    Args:
        shares: (B, P, 2) shares of correct runs, clean and attacked, for each sample and defense. They are averages,
            because only averages of mixtures are linear.
        defenses: Names of the P defenses.
    """
    means, draws = shares.mean(dim=0), resampled(shares, _RESAMPLES)
    columns = {name: [defenses.index(each) for each in own] for name, own in families(defenses).items()}

    def between(first: list[int], second: list[int]) -> statistics.Interval:
        return bootstrap(means, draws, len(shares), lambda p: gap(p[:, first], p[:, second]))

    comparisons = []
    for (to, first), (family, second) in itertools.combinations(columns.items(), 2):
        found = between(first, second)
        # NaN if the families share no clean accuracy; JSON has no NaN.
        difference = None if math.isnan(found.value) else list(found)
        verdict = "above" if found.low > 0 else "below" if found.high < 0 else "not distinguishable"
        comparisons.append({"family": family, "to": to, "difference": difference, "verdict": verdict})
    return comparisons


def attack_line(results: Sequence[Mapping[str, Any]]) -> str:
    """One line about an attack, with the gradients that its results used."""
    result = results[0]
    parts = [f"{result['attack']}: {result['norm']} <= {result['eps']:.4g}"]
    # The attacks of an ensemble have their own lines.
    if "attacks" not in result:
        words = {"none": "no", "theirs": "their own"}
        kinds = dict.fromkeys(words.get(r["gradient"], r["gradient"]) for r in results)
        masks = dict.fromkeys(r.get("mask_gradient", "none") for r in results)
        if result["gradient"] != "theirs":
            parts += [f"{result['attack_steps']} steps", f"EOT {result['eot']}"]
        parts += [f"{' or '.join(kinds)} gradient", *(f"{m} mask" for m in masks if m not in ("none", "frozen"))]
    return f"{', '.join(parts)}; {result['attack_title']}"


def denoising_lines(summary: Mapping[str, Any]) -> list[str]:
    """One line about how well the denoisers denoise the evaluated images, and a warning about poor ones."""
    errors = {(level, error) for level, error in summary["denoising"].values()}
    if not errors:
        return []
    listed = ", ".join(f"{error:.2f} at t = {level:g}" for level, error in sorted(errors))
    poor = [name for name, (_, error) in summary["denoising"].items() if error > _POOR]
    warning = (
        f"warning: {', '.join(poor)} hardly denoise these samples: their robust accuracy does not come from denoising"
    )
    return [f"noise left by a call of the denoiser: {listed} (1 is all of it)", *([warning] if poor else [])]


def percent(value: Sequence[float]) -> str:
    """A value with its interval in percent, as ``value [low, high]``."""
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * each for each in value))


def signed(value: Sequence[float] | None) -> str:
    """A difference in points as ``+value [low, high]``; empty for ``None``."""
    return "" if value is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * each for each in value))


def table(summary: Mapping[str, Any]) -> str:
    """The table that ``eval.py`` prints; at most 100 columns wide for names of up to 14 letters."""
    results = summary["results"]
    rows = [result["defense"] + (" *" if "repeated" in result else "") for result in results]
    width = max(10, *map(len, rows))
    split = f" ({summary['split']})" if summary["split"] else ""
    samples = f"{summary['dataset']}{split}, {summary['samples']} samples, {summary['runs']} runs each"
    lines = ["", f"{samples}; classifier {summary['classifier']}", *denoising_lines(summary)]
    if summary["arithmetic"] not in ("", "float32"):
        lines.append(summary["arithmetic"])
    for attack in dict.fromkeys(result["attack"] for result in results):
        group = [(row, result) for row, result in zip(rows, results, strict=True) if result["attack"] == attack]
        lines += [
            *attack_line([result for _, result in group]).split("; "),
            "",
            f"{'accuracy in %':{width}}  {'':5}  {'clean':^20}  {'robust':^33}",
            f"{'defense':{width}}  {'calls':>5}  {'avg':>6} {'worst':>6} {'vote':>6}  {'avg [95 %]':>19} {'worst':>6} "
            f"{'vote':>6}  {'avg - ' + summary['baseline']:>19}",
        ]
        for row, result in group:
            clean, robust = ([f"{100 * result[kind][rule][0]:6.1f}" for rule in RULES] for kind in KINDS)
            lines.append(
                f"{row:{width}}  {result['nfe_defense']:5d}  {' '.join(clean)}  "
                f"{percent(result['robust']['average']):>19} {' '.join(robust[1:])}  "
                f"{signed(result.get('robust_difference', {}).get('average')):>19}"
            )
        lines += [*diagnosis_lines([result for _, result in group], width), ""]
        lines += detection_lines([result for _, result in group], width)
    for attack, comparisons in summary["frontier"].items():
        lines.append(f"families at equal clean accuracy under {attack}, robust avg in points")
        for each in comparisons:
            less = signed(each["difference"]) or "nowhere as clean"
            lines.append(f"  {each['family']} less {each['to']}: {less}, {each['verdict']}")
        lines += ["  The best of many points on the same samples is optimistic: evaluate a choice on test.", ""]
    lines.append("avg: mean over runs. worst: right in every run. vote: majority of the runs, a tie counts as wrong.")
    if any("repeated" in result for result in results):
        lines.append("*: samples that an earlier attack left wrong in all runs were not attacked again.")
    for chunk, count in summary["smaller_chunks"].items():
        lines.append(f"{count} records: {chunk} rows a network call, not {summary['chunk']} (too little memory).")
    if any("frozen" in result for result in results):
        lines.append(
            "frozen: the attacker knows all noise; what survives comes from denoising, the rest from randomness."
        )
    if any("attacks" in result for result in results):
        lines.append("ensemble: each sample under the attack that is best against it; its avg is too low by chance.")
    return "\n".join(line.rstrip() for line in lines)
