"""Accuracy over fresh replicas and under frozen noise, as numbers and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_purify.evaluation.diagnostics import REPLICAS
from lit_purify.evaluation.records import Record
from lit_purify.functional.statistics import outcomes, wilson

WAYS = ("averaged", "vote")
"""How replicas decide jointly: by averaged logits or by vote."""


def diagnosed(records: Sequence[Record]) -> dict[str, Any]:
    """Accuracies of one (defense, attack) over replicas and under frozen noise; empty without diagnostics.

    Returns:
        ``{"replicas": {"averaged": [[count, value, low, high], ...], "vote": ...}, "frozen": [value, low, high]}``.
    """
    if any(record.replicas is None for record in records):
        return {}
    label, replicas, averaged, frozen = (
        torch.tensor([getattr(record, name) for record in records])
        for name in ("label", "replicas", "averaged", "frozen")
    )

    def share(right: Tensor) -> list[float]:
        return list(wilson(float(right.double().mean()), len(right)))

    votes = [outcomes(replicas[:, :count], label)[:, 2] for count in REPLICAS]
    ways = dict(zip(WAYS, ((averaged == label[:, None]).unbind(dim=1), votes), strict=True))
    found = {
        way: [[count, *share(each)] for count, each in zip(REPLICAS, right, strict=True)] for way, right in ways.items()
    }
    return {"replicas": found, "frozen": share(frozen == label)}


def diagnosis_lines(results: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    """The printed table for the results of one attack; empty without diagnostics."""
    known = [result for result in results if "frozen" in result]
    if not known:
        return []
    head = " ".join(f"{count:>11}" for count in REPLICAS)
    lines = ["", "robust accuracy in % of fresh replicas, logits averaged / vote, and under frozen noise"]
    lines.append(f"{'defense':{width}}  {head}  {'frozen':>6}")
    for result in known:
        pairs = zip(*(result["replicas"][way] for way in WAYS), strict=True)
        cells = " ".join(f"{f'{100 * a[1]:.1f} / {100 * b[1]:.1f}':>11}" for a, b in pairs)
        lines.append(f"{result['defense']:{width}}  {cells}  {100 * result['frozen'][0]:6.1f}")
    return lines
