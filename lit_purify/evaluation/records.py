"""One record for each (defense, attack, sample): the evidence that every figure is computed from."""

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

from lit_purify.errors import InputError

Key = tuple[str, str, int]


@dataclass(frozen=True)
class Record:
    """What became of one sample.

    Attributes:
        defense: Name of the defense.
        attack: Name of the attack.
        index: Position of the sample in its split.
        label: Its class.
        clean: The N predictions on the clean image.
        adversarial: The N predictions on the adversarial image.
        linf: Largest change of a pixel of [0, 1].
        l2: Euclidean norm of the change.
        seconds: Time spent on this sample, its share of the batch.
        lost_to: The earlier attack whose image this is, where it left the sample wrong in all runs and the evaluation
            skips what is lost; else ``None``: the attack itself ran.
        chunk: Rows of a network call where memory was too small for as many as configured; else ``None``.
        replicas: With diagnostics, predictions of 100 further draws on the adversarial image, see ``diagnose``.
        averaged: The predictions of their logits, averaged over the first 1, 10, 30, 50 and 100.
        frozen: The prediction where attack and defense share a single draw.
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
        """(defense, attack, index): unique in an evaluation."""
        return self.defense, self.attack, self.index

    def line(self) -> str:
        """One line of JSON."""
        # Unlike asdict, without copies of the lists.
        values = {name: value for name, value in vars(self).items() if value is not None or name not in _OPTIONAL}
        return json.dumps(values) + "\n"


_OPTIONAL = {"lost_to", "chunk", "replicas", "averaged", "frozen"}
"""Left out where they are ``None``, which is the rule."""
_FIELDS = {field.name for field in fields(Record)} - _OPTIONAL


@contextmanager
def uncollected() -> Iterator[None]:
    """Pauses the search for cyclic garbage, which would go through all records again and again, and find none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@uncollected()
def read_records(path: Path) -> list[Record]:
    """The records of a file, in order; of two with one key the first. A torn last line is left out.

    Raises:
        InputError: A line that is not the last cannot be read.
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
                raise ValueError("other fields than a record has")
            record = Record(**values)
            if {type(p) for p in (record.label, *record.clean, *record.adversarial)} != {int}:
                raise ValueError("predictions that are no classes")
            if len(record.clean) != len(record.adversarial):
                raise ValueError("other numbers of clean and adversarial runs")
        except (ValueError, TypeError, AttributeError) as error:
            if number == len(lines):
                # Without its newline: the writer died in the middle of it.
                continue
            raise InputError(f"{path}: line {number} is not a record ({error}); repair or remove it") from error
        found.setdefault(record.key, record)
    return list(found.values())


def in_order(records: Iterable[Record]) -> list[Record]:
    """Sorted by sample, defense and attack."""
    return sorted(records, key=lambda record: (record.index, record.defense, record.attack))


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Replaces a file by these records, atomically."""
    write_whole(path, "".join(record.line() for record in records))


def append_records(stream: BinaryIO, records: Iterable[Record]) -> None:
    """Brings whole lines to the disk, or none of them.

    Args:
        stream: Opened for appending, without a buffer.
        records: What to append.
    """
    end = stream.seek(0, os.SEEK_END)
    content = "".join(record.line() for record in records).encode()
    try:
        while content:
            content = content[stream.write(content) :]
        os.fsync(stream.fileno())
    # Also a signal that ends the process; what is written whole by then stays.
    except BaseException:
        if content:
            stream.truncate(end)
        raise


def identity_sha256(settings: Mapping[str, Any]) -> str:
    """What verdicts name the settings by that they are about."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file or, when that fails, leaves what was there."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            # Else a crash of the machine may leave the new name and no content.
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
