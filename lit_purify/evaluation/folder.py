"""The run folder: its files, its lock, and the check whether a run may resume in it."""

from __future__ import annotations

import fcntl
import json
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lit_purify.atomic import write_whole
from lit_purify.errors import InputError
from lit_purify.evaluation.records import Record, in_order, read_records, uncollected, write_records
from lit_purify.recorded import SHA256

_MISSING = object()
_SHOWN = 5
"""Differing settings that an error message lists."""


class RunFolder:
    """The files of a run.

    Args:
        path: The folder; the first write creates it.

    Attributes:
        config: The resolved configuration; it repeats the run.
        identity: The settings that records depend on, with hashes of the files they name.
        records: The records, one a line.
        summary: The accuracies of every result.
        report: The report as HTML.
        overlays: Pictures of the gallery.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.identity = path / "config.yaml", path / "identity.json"
        self.records, self.summary = path / "records.jsonl", path / "summary.json"
        self.report, self.overlays = path / "report.html", path / "overlays"
        self._lock: BinaryIO | None = None

    def part(self, rank: int) -> Path:
        """The records file of a rank. Each rank writes its own file; rank 0 writes ``records.jsonl``."""
        return self.records if rank == 0 else self.path / f"records.rank{rank}.jsonl"

    def open_part(self, rank: int) -> BinaryIO:
        """Opens the records file of a rank for appending.

        ``collect`` has deleted the parts of an earlier run. If a process of that run is still alive, its next write
        finds that its file is gone.

        Raises:
            InputError: Another run is writing to the folder.
        """
        try:
            return self.part(rank).open("ab" if rank == 0 else "xb", buffering=0)
        except FileExistsError as error:
            raise InputError(_taken(self.part(rank))) from error

    @uncollected()
    def collect(self, write: bool) -> list[Record]:
        """All records of all ranks, sorted. ``write`` merges them into ``records.jsonl`` and removes torn lines."""
        parts = [self.records, *sorted(self.path.glob("records.rank*.jsonl"))]
        found = {record.key: record for part in reversed(parts) for record in read_records(part)}
        records = in_order(found.values())
        # Even without a complete record: the next line must not continue a torn one.
        if write and any(part.exists() for part in parts):
            write_records(self.records, records)
            for part in parts[1:]:
                part.unlink()
        return records

    def lock(self) -> None:
        """Locks the folder against other runs, until ``release`` or the end of this process.

        Raises:
            InputError: Another run is writing to the folder.
        """
        self.release()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("wb")
        # Dataloader workers outlive a killed run for some seconds and must not hold its lock.
        os.register_at_fork(after_in_child=self._lock.close)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise InputError(_taken(self.path)) from error
        except OSError:
            # The file system has no locks. Two runs would delete each other's parts, and stop.
            pass

    def release(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            self._lock.close()

    def write_config(self, text: str) -> None:
        """Writes the resolved configuration (YAML)."""
        write_whole(self.config, text)

    def claim(self, identity: Mapping[str, Any], config: str | None, write: bool) -> None:
        """Checks that this run may use the folder; with ``write``, locks it and writes identity and configuration.

        Args:
            identity: The settings that records depend on.
            config: The resolved configuration (YAML), if there is one.
            write: Whether this process writes.

        Raises:
            InputError: The folder holds records of other settings, or another run is writing to it.
        """
        if write:
            self.lock()
        before = self._identity_before()
        if before is None and self.collect(write=False):
            raise InputError(
                f"{self.path} holds records, but no {self.identity.name} with their settings: choose another folder or "
                "remove this one"
            )
        # Without records, other settings can mix with nothing.
        if (found := self.differences(identity)) and self.collect(write=False):
            raise InputError(
                f"{self.path} holds a run with other settings ({found}): choose another folder, or remove this one"
            )
        if write:
            if config is not None:
                self.write_config(config)
            write_whole(self.identity, json.dumps(identity, indent=1))

    def differences(self, identity: Mapping[str, Any]) -> str:
        """Names some settings in which the run in the folder differs from this one; empty if none differs."""
        there, here = comparable(self._identity_before() or identity), comparable(identity)
        keys = [key for key in {**here, **there} if there.get(key, _MISSING) != here.get(key, _MISSING)]
        # If an object is missing on one side, its arguments add nothing. Hashes come last: they tell the reader least.
        keys = sorted((k for k in keys if k.rpartition(".")[0] not in keys), key=lambda k: k.endswith(SHA256))
        shown = [f"{key}: {_short(there, key)} there, {_short(here, key)} here" for key in keys[:_SHOWN]]
        return "; ".join(shown) + (f"; {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")

    def _identity_before(self) -> dict[str, Any] | None:
        if not self.identity.exists():
            return None
        try:
            found = json.loads(self.identity.read_text())
            if not isinstance(found, dict):
                raise ValueError("it holds no settings")
        except ValueError as error:
            raise InputError(f"{self.identity}: damaged ({error}): choose another folder") from error
        return found


def _taken(path: Path) -> str:
    return f"{path}: another run is writing there; wait for it, or choose another folder"


def _short(settings: Mapping[str, Any], key: str) -> str:
    """A setting's value, shortened."""
    return reprlib.repr(settings[key]).strip("'") if key in settings else "nothing"


def comparable(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Drops paths and constructors of hashed objects from an identity: runs with equal records then compare equal."""
    made = {key.removesuffix(f".weights{SHA256}") for key in identity if key.endswith(f".weights{SHA256}")}
    return {key: value for key, value in identity.items() if key + SHA256 not in identity and key not in made}


def file_hashes(identity: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of the files in an identity, by path."""
    keys = [key for key in identity if key + SHA256 in identity]
    return {str(identity[key]): identity[key + SHA256] for key in keys}
