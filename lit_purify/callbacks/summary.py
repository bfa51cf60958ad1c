"""From records to the figures of ``summary.json`` and the printed table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_purify.functional.statistics import Interval, accuracies, outcomes, paired_difference
from lit_purify.metrics import Record

RULES = ("average", "worst", "majority")


def summarize(
    records: Sequence[Record], described: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], baseline: str
) -> dict[str, Any]:
    """The content of ``summary.json``.

    Args:
        records: One for each (defense, attack, sample), the same samples for all pairs.
        described: What each (defense, attack) states about itself.
        facts: What holds for the whole evaluation.
        baseline: The defense that paired differences are taken to.
    """
    by_pair: dict[tuple[str, str], list[Record]] = {}
    for record in sorted(records, key=lambda record: record.index):
        by_pair.setdefault((record.defense, record.attack), []).append(record)
    survived = {
        pair: outcomes(_predictions(group, "adversarial"), _labels(group)).unbind(dim=1)
        for pair, group in by_pair.items()
    }
    results = []
    for result in described:
        pair = result["defense"], result["attack"]
        group = by_pair[pair]
        entry = dict(result)
        for name, field in (("clean", "clean"), ("robust", "adversarial")):
            entry[name] = _accuracies(_predictions(group, field), _labels(group))
        if pair[0] != baseline:
            first = survived[baseline, pair[1]]
            entry["robust_difference"] = {
                rule: list(paired_difference(first[k], survived[pair][k])) for k, rule in enumerate(RULES)
            }
        entry["linf"], entry["l2"] = max(r.linf for r in group), max(r.l2 for r in group)
        entry["seconds"] = sum(r.seconds for r in group)
        results.append(entry)
    undefended = [entry["clean"]["average"][0] for entry in results if entry["nfe_defense"] == 0]
    return {
        "schema": 1,
        **facts,
        "baseline": baseline,
        "undefended_clean_accuracy": undefended[0] if undefended else None,
        "results": results,
    }


def _accuracies(predictions: Tensor, labels: Tensor) -> dict[str, list[float]]:
    values = outcomes(predictions, labels)
    found = accuracies(values.sum(dim=0), values.square().sum(dim=0), len(values), predictions.shape[1])
    return {rule: list(getattr(found, rule)) for rule in RULES}


def _predictions(records: Sequence[Record], field: str) -> Tensor:
    return torch.tensor([getattr(record, field) for record in records])


def _labels(records: Sequence[Record]) -> Tensor:
    return torch.tensor([record.label for record in records])


def headline(summary: Mapping[str, Any]) -> str:
    """What was evaluated, in a line."""
    return (
        f"{summary['dataset']} ({summary['split']}), {summary['samples']} samples, {summary['runs']} runs each; "
        f"classifier {summary['classifier']}"
    )


def attack_line(result: Mapping[str, Any]) -> str:
    """What an attack is, in a line."""
    return (
        f"{result['attack']}: {result['norm']} <= {result['eps']:.4g}, {result['attack_steps']} steps, "
        f"EOT {result['eot']}, {result['gradient']} gradient; {result['attack_title']}"
    )


def percent(value: Sequence[float]) -> str:
    """An interval as ``value [low, high]`` in percent."""
    estimate = Interval(*value)
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def signed(value: Sequence[float]) -> str:
    """A difference as ``+value [low, high]`` in points."""
    estimate = Interval(*value)
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


def table(summary: Mapping[str, Any]) -> str:
    """What ``eval.py`` prints: at most 100 columns for names of up to 14 letters."""
    results = summary["results"]
    width = max(10, *(len(result["defense"]) for result in results))
    lines = ["", headline(summary)]
    for attack in dict.fromkeys(result["attack"] for result in results):
        group = [result for result in results if result["attack"] == attack]
        lines += [
            *attack_line(group[0]).split("; "),
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
                f"{result['defense']:{width}}  {result['nfe_defense']:5d}  {' '.join(points)}  "
                f"{percent(robust['average']):>19} {' '.join(rest)}  {difference:>19}"
            )
        lines.append("")
    lines.append("avg: mean over runs. worst: right in every run. vote: majority of the runs, a tie counts as wrong.")
    return "\n".join(line.rstrip() for line in lines)
