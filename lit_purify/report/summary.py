"""From records to the figures of ``summary.json`` and the printed table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from textwrap import wrap
from typing import Any

import torch
from torch import Tensor

from lit_purify.evaluation.module import ENSEMBLE
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

RULES = ("average", "worst", "majority")
_GRADIENTS = ("exact", "bpda", "surrogate", "none")


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
    def adversarial(self) -> Tensor:
        """Predictions on adversarial images, (B, N)."""
        return torch.tensor([record.adversarial for record in self])


Pairs = Mapping[tuple[str, str], Group]


def summarize(
    records: Iterable[Record], described: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], baseline: str
) -> dict[str, Any]:
    """The content of ``summary.json``.

    Args:
        records: One for each (defense, attack, sample), the same samples for all pairs.
        described: What each (defense, attack) states about itself.
        facts: What holds for the whole evaluation.
        baseline: The defense that paired differences are taken to.
    """
    pairs = by_pair(records)
    described = [*described, *ensembles(described)]
    survived = {(result["defense"], result["attack"]): robust_outcomes(pairs, result) for result in described}
    cleanly = {(result["defense"], result["attack"]): clean_outcomes(pairs, result) for result in described}
    firsts = _first_attacks(described)
    results = []
    for result in described:
        pair, groups = (result["defense"], result["attack"]), groups_of(pairs, result)
        entry = dict(result)
        runs = len(groups[0][0].clean)
        for name, values in (("clean", cleanly[pair]), ("robust", survived[pair])):
            found = accuracies(values.sum(dim=0), values.square().sum(dim=0), len(values), runs)
            entry[name] = {rule: list(getattr(found, rule)) for rule in RULES}
        for name, share in (("resubmission", survival), ("vote", vote)):
            entry[name] = {
                kind: [
                    [draws, *mean_interval(_lowest(share, chosen, field, draws), runs)] for draws in submissions(runs)
                ]
                for kind, field, chosen in (("clean", "clean", groups[:1]), ("robust", "adversarial", groups))
            }
        if len(groups) > 1 and runs > 1:
            right = torch.stack([g.adversarial == g.label[:, None] for g in groups])
            entry["robust_average_held_out"] = list(mean_interval(held_out(right), runs))
        if pair[0] != baseline:
            entry["robust_difference"] = _differences(survived[baseline, pair[1]], survived[pair])
            entry["clean_difference"] = _differences(cleanly[baseline, pair[1]], cleanly[pair])
        repeated = sum(record.lost_to is not None for record in groups[0]) if len(groups) == 1 else 0
        if repeated:
            entry["repeated"] = repeated
        first = firsts[result["norm"], result["eps"]]
        # Of one that left samples out the difference would be that of all attacks so far.
        if len(groups) == 1 and pair[1] != first and not repeated:
            entry["attack_difference"] = {"to": first, **_differences(survived[pair[0], first], survived[pair])}
        entry["linf"], entry["l2"] = (max(getattr(r, norm) for g in groups for r in g) for norm in ("linf", "l2"))
        entry["seconds"] = sum(r.seconds for g in groups for r in g)
        results.append(entry)
    undefended = [entry["clean"]["average"][0] for entry in results if entry["nfe_defense"] == 0]
    return {
        "schema": 1,
        **facts,
        "baseline": baseline,
        "undefended_clean_accuracy": undefended[0] if undefended else None,
        "results": results,
    }


def _differences(first: Tensor, second: Tensor) -> dict[str, list[float]]:
    return {rule: list(paired_difference(first[:, k], second[:, k])) for k, rule in enumerate(RULES)}


def _first_attacks(described: Sequence[Mapping[str, Any]]) -> dict[tuple[str, float], str]:
    """Of each threat model the attack that the others are compared to."""
    return {(result["norm"], result["eps"]): result["attack"] for result in reversed(described)}


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
    """What an ensemble states: what its attacks agree on, a list where they do not; of costs the sum."""
    values = {key: [result[key] for result in group] for key in group[0]}
    combined = {key: found[0] if all(v == found[0] for v in found) else found for key, found in values.items()}
    if "queries" in values:
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


def by_pair(records: Iterable[Record]) -> dict[tuple[str, str], Group]:
    """Records of each (defense, attack), in the order of the samples."""
    pairs: dict[tuple[str, str], Group] = {}
    for record in sorted(records, key=lambda record: record.index):
        pairs.setdefault((record.defense, record.attack), Group()).append(record)
    return pairs


def groups_of(pairs: Pairs, result: Mapping[str, Any]) -> list[Group]:
    """The records behind a result: of one attack, or of each that an ensemble is made of."""
    return [pairs[result["defense"], attack] for attack in result.get("attacks", [result["attack"]])]


def clean_outcomes(pairs: Pairs, result: Mapping[str, Any]) -> Tensor:
    """(B, 3) ``outcomes`` of the clean runs, which are the same under every attack."""
    group = groups_of(pairs, result)[0]
    return outcomes(group.clean, group.label)


def robust_outcomes(pairs: Pairs, result: Mapping[str, Any]) -> Tensor:
    """(B, 3) ``outcomes`` under the attack, or under the ensemble of attacks."""
    groups = groups_of(pairs, result)
    return ensemble(torch.stack([outcomes(g.adversarial, g.label) for g in groups]))


def _lowest(share: Callable[[Tensor, Tensor, int], Tensor], groups: Sequence[Group], field: str, draws: int) -> Tensor:
    return torch.stack([share(getattr(group, field), group.label, draws) for group in groups]).amin(dim=0)


def headline(summary: Mapping[str, Any]) -> str:
    """What was evaluated, in a line."""
    return (
        f"{summary['dataset']} ({summary['split']}), {summary['samples']} samples, {summary['runs']} runs each; "
        f"classifier {summary['classifier']}"
    )


def attack_line(results: Sequence[Mapping[str, Any]]) -> str:
    """What an attack is, in a line; its results may differ in the gradient that it took of each defense."""
    result = results[0]
    if "attacks" in result:
        # Each has a line of its own; their steps do not add up to those of an attack.
        return f"{result['attack']}: {result['norm']} <= {result['eps']:.4g}; {result['attack_title']}"
    kinds = ["no" if r["gradient"] == "none" else r["gradient"] for r in results]
    masks = [r.get("mask_gradient", "none") for r in results]
    return (
        f"{result['attack']}: {result['norm']} <= {result['eps']:.4g}, {result['attack_steps']} steps, "
        f"EOT {result['eot']}, {' or '.join(dict.fromkeys(kinds))} gradient"
        f"{''.join(f', {mask} mask' for mask in dict.fromkeys(masks) if mask not in ('none', 'frozen'))}; "
        f"{result['attack_title']}"
    )


def chunk_line(summary: Mapping[str, Any]) -> str:
    """With how many rows networks were called, in a line."""
    fewer = [f"{count} records with {rows}" for rows, count in summary.get("smaller_chunks", {}).items()]
    if not fewer:
        return f"{summary['chunk']}"
    return f"{summary['chunk']}, but {', '.join(fewer)}, for want of memory: equal to others up to rounding only"


def percent(value: Sequence[float]) -> str:
    """An interval as ``value [low, high]`` in percent."""
    estimate = Interval(*value)
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def signed(value: Sequence[float]) -> str:
    """A difference as ``+value [low, high]`` in points."""
    estimate = Interval(*value)
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


def _row(result: Mapping[str, Any]) -> str:
    return result["defense"] + (" *" if "repeated" in result else "")


def _attack_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each attack leaves more than the first one of its kind, on the same samples."""
    found: dict[str, list[str]] = {}
    for result in results:
        if "attack_difference" in result:
            less = result["attack_difference"]
            said = f"{result['defense']} {signed(less['average'])}".replace(" ", "\xa0")
            found.setdefault(f"{result['attack']} less {less['to']}", []).append(said)
    if not found:
        return []
    lines = ["robust avg between attacks, in points"]
    for name, differences in found.items():
        text = f"  {name}: {', '.join(differences)}"
        lines += wrap(text, 100, subsequent_indent="    ", break_on_hyphens=False)
    return [*(line.replace("\xa0", " ") for line in lines), ""]


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
            clean, robust = result["clean"], result["robust"]
            points = [f"{100 * clean[rule][0]:6.1f}" for rule in RULES]
            rest = [f"{100 * robust[rule][0]:6.1f}" for rule in RULES[1:]]
            difference = signed(result["robust_difference"]["average"]) if "robust_difference" in result else ""
            lines.append(
                f"{_row(result):{width}}  {result['nfe_defense']:5d}  {' '.join(points)}  "
                f"{percent(robust['average']):>19} {' '.join(rest)}  {difference:>19}"
            )
        lines.append("")
    lines += _attack_lines(results)
    lines.append("avg: mean over runs. worst: right in every run. vote: majority of the runs, a tie counts as wrong.")
    if any("repeated" in result for result in results):
        lines.append(
            "*: what an earlier attack left wrong in all runs was not attacked again; as of all attacks so far."
        )
    if summary.get("smaller_chunks"):
        lines.append(f"rows of a network call: {chunk_line(summary)}.")
    if any("attacks" in result for result in results):
        lines.append("ensemble: each sample under the attack that is best against it; its avg is too low by chance.")
    return "\n".join(line.rstrip() for line in lines)
