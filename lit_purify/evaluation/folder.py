"""The folder of a run: what lies where in it, and whether a run may go on in it."""

from __future__ import annotations

import fcntl
import json
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lit_purify.errors import InputError
from lit_purify.evaluation.records import Record, in_order, read_records, uncollected, write_records, write_whole
from lit_purify.recorded import SHA256

_MISSING = object()
_SHOWN = 5
"""Differing settings that an error message lists."""


class RunFolder:
    """Paths of a run.

    Args:
        path: The folder; made when something is written.

    Attributes:
        config: The resolved configuration, which repeats the run.
        identity: What the records depend on: settings, and hashes of the files they name.
        records: One line for each record.
        summary: Accuracies of every result.
        report: What people look at.
        overlays: Images of the gallery.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.identity = path / "config.yaml", path / "identity.json"
        self.records, self.summary = path / "records.jsonl", path / "summary.json"
        self.report, self.overlays = path / "report.html", path / "overlays"
        self._lock: BinaryIO | None = None

    def part(self, rank: int) -> Path:
        """Where a process other than rank zero appends its records: every file has one writer."""
        return self.records if rank == 0 else self.path / f"records.rank{rank}.jsonl"

    def open_part(self, rank: int) -> BinaryIO:
        """Opens what a process appends its records to.

        ``collect`` has removed the parts of an earlier run. What is left of that run, if it still lives, holds a file
        without a name, and learns so from its next write.

        Raises:
            InputError: Another process is writing there.
        """
        try:
            return self.part(rank).open("ab" if rank == 0 else "xb", buffering=0)
        except FileExistsError as error:
            raise InputError(_taken(self.part(rank))) from error

    @uncollected()
    def collect(self, write: bool) -> list[Record]:
        """All records of all processes, sorted; on request merged into ``records.jsonl``, which mends a torn line."""
        parts = [self.records, *sorted(self.path.glob("records.rank*.jsonl"))]
        found = {record.key: record for part in reversed(parts) for record in read_records(part)}
        records = in_order(found.values())
        # Also without a whole record: the next line must not be joined to a torn one.
        if write and any(part.exists() for part in parts):
            write_records(self.records, records)
            for part in parts[1:]:
                part.unlink()
        return records

    def lock(self) -> None:
        """Keeps other runs out of the folder until it is released, or this process ends.

        Raises:
            InputError: Another run is writing there.
        """
        self.release()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("wb")
        # Worker processes of a loader outlive a killed run for some seconds: they must not hold its lock.
        os.register_at_fork(after_in_child=self._lock.close)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise InputError(_taken(self.path)) from error
        except OSError:
            # A file system without locks. Two runs there would take each other's parts away, and so notice.
            pass

    def release(self) -> None:
        """Lets other runs in."""
        if self._lock is not None:
            self._lock.close()

    def write_config(self, text: str) -> None:
        """Writes the resolved configuration, YAML."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.config, text)

    def claim(self, identity: Mapping[str, Any], config: str | None, write: bool) -> None:
        """Makes the folder this run's own; a process that writes locks it before it looks at anything.

        Args:
            identity: What the records depend on.
            config: The resolved configuration, YAML; ``None`` where there is none.
            write: Whether this process writes.

        Raises:
            InputError: The folder holds records of a run with other settings, or another run is writing there.
        """
        if write:
            self.lock()
        before = self._identity_before()
        if before is None and self.collect(write=False):
            raise InputError(
                f"{self.path} holds records, but no {self.identity.name} that says of which settings: choose another "
                "folder, or remove that one"
            )
        # Without records there is nothing that other settings could mix with.
        if (found := self.differences(identity)) and self.collect(write=False):
            raise InputError(
                f"{self.path} holds a run with other settings ({found}): choose another folder, or remove that one"
            )
        if write:
            if config is not None:
                self.write_config(config)
            write_whole(self.identity, json.dumps(identity, indent=1))

    def differences(self, identity: Mapping[str, Any]) -> str:
        """How the run in the folder differs from this one, in a few of its settings; empty where it does not."""
        there, here = comparable(self._identity_before() or identity), comparable(identity)
        keys = [key for key in {**here, **there} if there.get(key, _MISSING) != here.get(key, _MISSING)]
        # Of an object that one of them does not have its arguments say nothing more, and hashes say least.
        keys = sorted((k for k in keys if k.rpartition(".")[0] not in keys), key=lambda k: k.endswith(SHA256))
        shown = [f"{key}: {_short(there, key)} there, {_short(here, key)} here" for key in keys[:_SHOWN]]
        return "; ".join(shown) + (f"; {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")

    def _identity_before(self) -> dict[str, Any] | None:
        if not self.identity.exists():
            return None
        try:
            found = json.loads(self.identity.read_text())
            if not isinstance(found, dict):
                raise ValueError("no settings in it")
        except ValueError as error:
            raise InputError(f"{self.identity}: damaged ({error}): choose another folder") from error
        return found


def _taken(path: Path) -> str:
    return f"{path}: another run is writing there; wait for it, or choose another folder"


def _short(settings: Mapping[str, Any], key: str) -> str:
    """A value in few characters."""
    return reprlib.repr(settings[key]).strip("'") if key in settings else "nothing"


def comparable(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity such that those of runs with equal records are equal: a file is its content, wherever it lies.

    What made a network does not count beside its weights' hash.
    """
    made = {key.removesuffix(f".weights{SHA256}") for key in identity if key.endswith(f".weights{SHA256}")}
    return {key: value for key, value in identity.items() if key + SHA256 not in identity and key not in made}


def file_hashes(identity: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of the files that an identity names, by their path."""
    keys = [key for key in identity if key + SHA256 in identity]
    return {str(identity[key]): identity[key + SHA256] for key in keys}
