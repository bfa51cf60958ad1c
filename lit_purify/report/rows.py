"""Report content for table rows: detection, false alarms, kinds of attacks, and changed columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_purify.evaluation import View
from lit_purify.functional import statistics


def by_kind(shares: Mapping[str, Tensor], label: Tensor, kinds: Sequence[str], runs: int) -> dict[str, Any]:
    """Detection and false alarm rates, and accuracies by kind.

    Args:
        shares: For ``clean`` and ``robust``, the share (B,) of correct runs of each sample.
        label: (B,) true classes; class 0 is harmless.
        kinds: Finer class of each sample.
        runs: N, runs of each sample.

    Returns:
        ``detection``: share of attacks that are not classified as harmless (with two classes, correctly).
        ``false_alarms``: share of harmless samples that are classified as attacks. Both are [value, low, high].
        ``kinds``: number of samples, clean and robust average accuracy, by kind.
    """

    def rate(values: Tensor) -> list[float]:
        return list(statistics.mean_interval(values, runs)) if len(values) else [0.0, 0.0, 1.0]

    found: dict[str, Any] = {"detection": {}, "false_alarms": {}, "kinds": {}}
    for name, right in shares.items():
        found["detection"][name] = rate(right[label > 0])
        found["false_alarms"][name] = rate(1.0 - right[label == 0])
    for kind in sorted(set(kinds), key=lambda kind: (-list(kinds).count(kind), kind)):
        chosen = torch.tensor([each == kind for each in kinds])
        found["kinds"][kind] = [int(chosen.sum()), *(float(right[chosen].mean()) for right in shares.values())]
    return found


def detection_lines(results: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    """The printed table for the results of one attack; empty for data without kinds."""
    if "detection" not in results[0]:
        return []
    lines = [
        f"{'in %':{width}}  {'detection: clean':>19} {'attacked':>19}  {'false alarms: clean':>19} {'attacked':>19}"
    ]
    for result in results:
        cells = [
            "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * end for end in result[name][kind]))
            for name in ("detection", "false_alarms")
            for kind in ("clean", "robust")
        ]
        lines.append(f"{result['defense']:{width}}  {cells[0]:>19} {cells[1]:>19}  {cells[2]:>19} {cells[3]:>19}")
    return [*lines, ""]


def columns(features: Sequence[Sequence[Any]]) -> dict[str, list[int]]:
    """Positions of the features of each column; all categories of a column belong to it."""
    found: dict[str, list[int]] = {}
    for k, (name, *_) in enumerate(features):
        found.setdefault(name.partition("=")[0], []).append(k)
    return found


def changed(views: Iterable[View], features: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """For each defense, attack and column: share of changed rows, mean change, and share of strongly noised rows.

    Args:
        views: Views of table rows.
        features: Name, minimum and maximum of each feature.
    """
    groups: dict[tuple[str, str], list[View]] = {}
    for view in views:
        groups.setdefault(view.record.key[:2], []).append(view)
    found = []
    for (defense, attack), own in groups.items():
        moved = torch.stack([view.adversarial - view.original for view in own]).abs()
        noised = None if own[0].mask is None else torch.stack([view.mask for view in own if view.mask is not None])
        for column, places in columns(features).items():
            size = moved[:, places].amax(dim=1)
            low, high = features[places[0]][1:]
            row = {"defense": defense, "attack": attack, "column": column, "changed": float((size > 0).double().mean())}
            row["mean change"] = float(size.double().mean()) * (high - low or 1.0)
            row["noised strongly"] = None if noised is None else float(noised[:, places].amax(dim=1).double().mean())
            if row["changed"] or row["noised strongly"]:
                found.append(row)
    return found


def changes(view: View, features: Sequence[Sequence[Any]]) -> str:
    """The columns that an attack changed, in their units: before, after, and after purification."""
    words = []
    for column, places in columns(features).items():
        rows = [row[places] for row in (view.original, view.adversarial, view.purified)]
        if rows[0].equal(rows[1]):
            continue
        low, high = features[places[0]][1:]
        if len(places) > 1 or "=" in features[places[0]][0]:
            values = [features[places[int(row.argmax())]][0].partition("=")[2] for row in rows]
        else:
            values = [f"{low + (high - low or 1.0) * float(row):.5g}" for row in rows]
        words.append(f"{column} {values[0]} \u2192 {values[1]} (purified {values[2]})")
    return "; ".join(words) or "unchanged"
