"""The files of people's own images: which are taken, what is written for each, and what must not be written over."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lit_purify.data.folder import IMAGE_KINDS, find_files, open_image
from lit_purify.errors import InputError

Existing = Literal["refuse", "skip", "replace"]

KEY = "lit_purify"
"""Of the text in a PNG that says what it was made from, and what it was taken for."""


@dataclass(frozen=True)
class Job:
    """A file and what becomes of it.

    Attributes:
        name: Path of the file in the input folder.
        source: The file.
        target: The purified PNG; the mask and the overlay lie beside it.
    """

    name: str
    source: Path
    target: Path

    @property
    def mask(self) -> Path:
        """White where the noise was strong."""
        return self.target.with_suffix(".mask.png")

    @property
    def overlay(self) -> Path:
        """Left to right: the image as the classifier takes it, the mask over it, noised, purified."""
        return self.target.with_suffix(".overlay.png")

    @property
    def too_long(self) -> bool:
        """Whether the overlay's name, with an ending while it is written, has more than 255 bytes."""
        return len(os.fsencode(self.overlay.name)) + len(".partial") > 255

    def sha256(self) -> str:
        """Of the file's content."""
        return hashlib.sha256(self.source.read_bytes()).hexdigest()

    def made(self, path: Path, settings_sha256: str) -> bool:
        """Whether a PNG was made from this file, by these settings."""
        said = said_by(path)
        return (said.get("settings_sha256"), said.get("sha256")) == (settings_sha256, self.sha256())


def said_by(path: Path) -> Mapping[str, Any]:
    """What a PNG says of itself; nothing if it is of another origin."""
    with open_image(path) as image:
        try:
            said = json.loads(image.info.get(KEY, "{}"))
        except ValueError:
            said = None
    return said if isinstance(said, dict) else {}


def plan(folder: Path, output: Path) -> tuple[list[Job], list[Path]]:
    """What is to be made, and the files that are no images."""
    if not folder.exists():
        raise InputError(f"input {folder}: no such folder or file")
    if output.exists() and not output.is_dir():
        raise InputError(f"output {output}: is a file; name a folder")
    root = folder if folder.is_dir() else folder.parent
    if output.resolve().is_relative_to(root.resolve()) and folder.is_dir():
        raise InputError(f"output {output}: lies in the input folder, whose files are not touched; name another")
    files = find_files(folder) if folder.is_dir() else [folder]
    images = [file for file in files if file.name.lower().endswith(IMAGE_KINDS) or not folder.is_dir()]
    if not images:
        raise InputError(f"input {folder}: no images in it; it needs {', '.join(IMAGE_KINDS)}")
    names = [file.relative_to(root) for file in images]
    jobs = [Job(str(name), file, (output / name).with_suffix(".png")) for name, file in zip(names, images, strict=True)]
    owner: dict[Path, Job] = {}
    sources = {job.source.resolve() for job in jobs}
    for job in jobs:
        for path in (job.target, job.mask, job.overlay):
            if path.resolve() in sources:
                raise InputError(
                    f"output {output}: {path} is an image of the input, which is not touched; name another"
                )
            if (first := owner.setdefault(path, job)) is not job:
                raise InputError(f"{first.source} and {job.source} would both be written to {path}; rename one of them")
    return jobs, [file for file in files if file not in set(images)]


def left_to_do(jobs: Sequence[Job], others: Sequence[Path], existing: Existing, settings_sha256: str) -> list[Job]:
    """The jobs that are to be done; ``others`` are files that are written when all are."""
    if existing == "refuse":
        outputs = [path for job in jobs for path in (job.target, job.mask, job.overlay)] + list(others)
        found = next((path for path in outputs if path.exists()), None)
        if found is not None:
            raise InputError(f"{found}: exists already; existing: skip goes on, existing: replace makes it again")
    if existing == "replace":
        made = (path for job in jobs for path in (job.target, job.mask, job.overlay) if path.exists())
        if (strange := next((path for path in made if not said_by(path)), None)) is not None:
            raise InputError(f"{strange}: was not made here, so it is not replaced; name another output")
    there = {job for job in jobs if job.target.exists()}
    if not there and (strange := next((path for path in others if path.exists()), None)):
        raise InputError(f"{strange}: exists already, and none of the images: name another output")
    if existing == "replace":
        return list(jobs)
    for job in jobs:
        # Of an image that was interrupted, its mask and overlay may be there.
        for path in (job.target,) if job in there else (job.mask, job.overlay):
            if path.exists() and not job.made(path, settings_sha256):
                raise InputError(
                    f"{path}: was made from another image or by other settings; name another output, or make all "
                    "again with existing: replace"
                )
    return [job for job in jobs if job not in there]
