"""Input and output files of ``purify`` and ``predict``."""

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
"""Key of the PNG text that holds the hash of the source and the predictions."""


@dataclass(frozen=True)
class Job:
    """A source file and the files that are made from it.

    Attributes:
        name: Path of the source within the input folder.
        source: The image to read.
        target: The purified PNG to write; mask and overlay are beside it.
    """

    name: str
    source: Path
    target: Path

    @property
    def mask(self) -> Path:
        """The mask's PNG: white where the noise was strong."""
        return self.target.with_suffix(".mask.png")

    @property
    def overlay(self) -> Path:
        """The overlay as PNG. Left to right: input as the classifier takes it, the same with mask, noised, purified."""
        return self.target.with_suffix(".overlay.png")

    def sha256(self) -> str:
        """Hash of the source's content."""
        return hashlib.sha256(self.source.read_bytes()).hexdigest()

    def done(self) -> bool:
        """Whether the target exists and was made from the same content."""
        return self.target.exists() and embedded(self.target).get("sha256") == self.sha256()


def embedded(path: Path) -> Mapping[str, Any]:
    """The metadata that this library wrote into a PNG; empty for other PNGs."""
    with open_image(path) as image:
        try:
            metadata = json.loads(image.info.get(KEY, "{}"))
        except ValueError:
            metadata = None
    return metadata if isinstance(metadata, dict) else {}


def check_output(output: Path, settings: Mapping[str, Any]) -> None:
    """Raises an ``InputError`` unless the output is empty or was written with the same settings."""
    try:
        before = json.loads((output / "identity.json").read_text())
    except (OSError, ValueError):
        before = None
    if output.exists() and any(output.iterdir()) and (before is None or comparable(before) != comparable(settings)):
        raise InputError(f"output {output}: holds files of another origin or of other settings: name another folder")


def plan(folder: Path, output: Path) -> tuple[list[Job], list[Path]]:
    """Plans the files to write.

    Returns:
        The jobs, and the files that are not images.

    Raises:
        InputError: There are no images, or the output would overwrite files.
    """
    if not folder.exists():
        raise InputError(f"input {folder}: no such folder or file; check the path")
    if output.exists() and not output.is_dir():
        raise InputError(f"output {output}: is a file: name a folder")
    root = folder if folder.is_dir() else folder.parent
    if output.resolve().is_relative_to(root.resolve()) and folder.is_dir():
        raise InputError(f"output {output}: lies in the input folder, which stays unchanged: name a folder outside it")
    files = find_files(folder) if folder.is_dir() else [folder]
    images = [file for file in files if file.name.lower().endswith(IMAGE_KINDS) or not folder.is_dir()]
    if not images:
        raise InputError(f"input {folder}: no images in it; use files that end in {', '.join(IMAGE_KINDS)}")
    names = [file.relative_to(root) for file in images]
    jobs = [Job(str(name), file, (output / name).with_suffix(".png")) for name, file in zip(names, images, strict=True)]
    owners: dict[Path, Job] = {}
    for job in jobs:
        for path in (job.target, job.mask, job.overlay):
            if (first := owners.setdefault(path, job)) is not job:
                raise InputError(f"{first.source} and {job.source} would both be written to {path}: rename one of them")
    return jobs, [file for file in files if file not in set(images)]
