"""What an evaluation has found so far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from lit_purify.evaluation.records import Key, Record


@dataclass(frozen=True)
class View:
    """A sample's pictures in the first run: images (C, H, W) in [0, 1], mask (1, H, W) or ``None``; of rows (F,)."""

    record: Record
    original: Tensor
    adversarial: Tensor
    noised: Tensor
    purified: Tensor
    mask: Tensor | None


class Ledger:
    """What an evaluation knows already: which records exist, which samples are lost, clean predictions.

    Attributes:
        done: Keys of all records.
        lost: Records of samples that were wrong in all runs.
        clean: Clean predictions by (defense, sample, chunk): they are the same under every attack.
        chunk: Rows of a network call that fit into memory; ``None`` before any call.
    """

    def __init__(self) -> None:
        self.done: set[Key] = set()
        self.lost: dict[Key, Record] = {}
        self.clean: dict[tuple[str, int, int | None], list[int]] = {}
        self.chunk: int | None = None

    def note(self, records: Iterable[Record]) -> None:
        """Takes down records."""
        for record in records:
            self.done.add(record.key)
            self.clean[record.defense, record.index, record.chunk] = record.clean
            if record.label not in record.adversarial:
                self.lost[record.key] = record
