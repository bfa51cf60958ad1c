"""The files of people's own images: which are taken, what is written for each, and where it may be written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_purify.data.folder import IMAGE_KINDS, find_files, open_image
from lit_purify.errors import InputError
from lit_purify.evaluation.folder import comparable

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

    def sha256(self) -> str:
        """Of the file's content."""
        return hashlib.sha256(self.source.read_bytes()).hexdigest()

    def done(self) -> bool:
        """Whether its PNG is there, made from this content."""
        return self.target.exists() and said_by(self.target).get("sha256") == self.sha256()


def said_by(path: Path) -> Mapping[str, Any]:
    """What a PNG says of itself; nothing if it is of another origin."""
    with open_image(path) as image:
        try:
            said = json.loads(image.info.get(KEY, "{}"))
        except ValueError:
            said = None
    return said if isinstance(said, dict) else {}


def check_output(output: Path, settings: Mapping[str, Any]) -> None:
    """Raises an ``InputError`` unless the output is a new folder, or one in which the same settings go on."""
    try:
        before = json.loads((output / "identity.json").read_text())
    except (OSError, ValueError):
        before = None
    if output.exists() and any(output.iterdir()) and (before is None or comparable(before) != comparable(settings)):
        raise InputError(f"output {output}: holds files of another origin, or made by other settings; name another")


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
    for job in jobs:
        for path in (job.target, job.mask, job.overlay):
            if (first := owner.setdefault(path, job)) is not job:
                raise InputError(f"{first.source} and {job.source} would both be written to {path}; rename one of them")
    return jobs, [file for file in files if file not in set(images)]
