"""The state of an evaluation: existing records and known predictions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from lit_purify.evaluation.records import Key, Record


@dataclass(frozen=True)
class View:
    """A sample in the first run: images (C, H, W) in [0, 1] and mask (1, H, W) or ``None``; table rows are (F,)."""

    record: Record
    original: Tensor
    adversarial: Tensor
    noised: Tensor
    purified: Tensor
    mask: Tensor | None


class Ledger:
    """Existing records, lost samples and clean predictions of an evaluation.

    Attributes:
        done: Keys of all records.
        lost: Records of lost samples: wrong in all runs.
        clean: Clean predictions by (defense, sample, chunk); all attacks share them.
        chunk: Rows of a network call that fit into memory; ``None`` before the first call.
    """

    def __init__(self) -> None:
        self.done: set[Key] = set()
        self.lost: dict[Key, Record] = {}
        self.clean: dict[tuple[str, int, int | None], list[int]] = {}
        self.chunk: int | None = None

    def add(self, records: Iterable[Record]) -> None:
        """Adds records."""
        for record in records:
            self.done.add(record.key)
            self.clean[record.defense, record.index, record.chunk] = record.clean
            if record.label not in record.adversarial:
                self.lost[record.key] = record
