"""Records: one for each (defense, attack, sample). Every figure of a report is computed from them."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from lit_purify.atomic import write_whole
from lit_purify.errors import InputError

Key = tuple[str, str, int]


@dataclass(frozen=True)
class Record:
    """The predictions on one sample under one defense and one attack.

    Attributes:
        defense: Name of the defense.
        attack: Name of the attack.
        index: Position of the sample in its split.
        label: True class of the sample.
        clean: Predictions on the clean image, one for each of N runs.
        adversarial: Predictions on the adversarial image, one for each of N runs.
        linf: Linf norm of the perturbation, in pixels of [0, 1].
        l2: L2 norm of the perturbation.
        seconds: This sample's share of the batch's time.
        lost_to: With ``skip_lost``, the earlier attack that broke all runs and whose result this record repeats;
            ``None`` if the attack itself ran.
        chunk: Rows of a network call, if memory was too small for the configured number; else ``None``.
        replicas: With diagnostics, predictions of 100 fresh draws on the adversarial image, see ``diagnose``.
        averaged: With diagnostics, predictions of the logits averaged over the first 1, 10, 30, 50 and 100 draws.
        frozen: With diagnostics, the prediction if attack and defense share a single draw.
    """

    defense: str
    attack: str
    index: int
    label: int
    clean: list[int]
    adversarial: list[int]
    linf: float
    l2: float
    seconds: float
    lost_to: str | None = None
    chunk: int | None = None
    replicas: list[int] | None = None
    averaged: list[int] | None = None
    frozen: int | None = None

    @property
    def key(self) -> Key:
        """(defense, attack, index), unique within an evaluation."""
        return self.defense, self.attack, self.index

    def line(self) -> str:
        """The record as one line of JSON, with its newline."""
        # asdict would copy the lists.
        values = {name: value for name, value in vars(self).items() if value is not None or name not in _OPTIONAL}
        return json.dumps(values) + "\n"


_OPTIONAL = {"lost_to", "chunk", "replicas", "averaged", "frozen"}
"""Fields that a line leaves out if they are ``None``."""
_FIELDS = {field.name for field in fields(Record)} - _OPTIONAL


@contextmanager
def uncollected() -> Iterator[None]:
    """Pauses garbage collection, which would scan all records repeatedly and find no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@uncollected()
def read_records(path: Path) -> list[Record]:
    """The records of a file, in order. Of duplicates the first counts; a torn last line is ignored.

    Raises:
        InputError: A line before the last is not a record.
    """
    if not path.exists():
        return []
    found: dict[Key, Record] = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            values = json.loads(line)
            if values.keys() - _OPTIONAL != _FIELDS:
                raise ValueError("its fields are not those of a record")
            record = Record(**values)
            if {type(p) for p in (record.label, *record.clean, *record.adversarial)} != {int}:
                raise ValueError("its predictions are not class numbers")
            if len(record.clean) != len(record.adversarial):
                raise ValueError("the numbers of clean and adversarial runs differ")
        except (ValueError, TypeError, AttributeError) as error:
            if number == len(lines):
                # No newline: the writer was killed while it wrote this line.
                continue
            raise InputError(f"{path}: line {number} is not a record ({error}); repair or remove it") from error
        found.setdefault(record.key, record)
    return list(found.values())


def in_order(records: Iterable[Record]) -> list[Record]:
    """Sorts records by sample, defense and attack."""
    return sorted(records, key=lambda record: (record.index, record.defense, record.attack))


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Replaces a file atomically by these records."""
    write_whole(path, "".join(record.line() for record in records))


def append_records(stream: BinaryIO, records: Iterable[Record]) -> None:
    """Appends all lines and flushes them to the disk; if that fails, appends none.

    Args:
        stream: Opened for appending, without a buffer.
        records: The new records.
    """
    end = stream.seek(0, os.SEEK_END)
    content = "".join(record.line() for record in records).encode()
    try:
        while content:
            content = content[stream.write(content) :]
        os.fsync(stream.fileno())
    # Includes signals that end the process. Lines that are already complete stay.
    except BaseException:
        if content:
            stream.truncate(end)
        raise


def identity_sha256(settings: Mapping[str, Any]) -> str:
    """Hash of the settings that an audit or gradcheck verdict belongs to."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
