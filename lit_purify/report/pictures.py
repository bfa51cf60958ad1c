"""The gallery of a page: single samples, from the overlays of a run."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from lit_purify.evaluation.records import Record
from lit_purify.functional.rendering import TINT, spans
from lit_purify.functional.statistics import outcomes
from lit_purify.report.finished import FinishedRun

OUTCOMES = {
    "broken": "broken in every run",
    "shaken": "broken in some runs",
    "survived": "survived every run",
    "wrong": "wrong when clean",
}
PANELS = ("original", "adversarial", "overlay", "noised", "purified")
_EXACT, _LARGEST = 160, 192
"""Pixels: panels up to the first are kept exactly, larger ones are shrunk to the second and compressed."""


@dataclass(frozen=True)
class Picture:
    """A sample under one defense and one attack.

    Attributes:
        record: What became of it.
        outcome: A key of ``OUTCOMES``.
        panels: What it looked like, addresses of images by name, without the overlay.
        exact: The panels are not compressed.
        mask: A layer to be laid over the adversarial image, where the defense has one.
        clean: How often each class was predicted, in words.
        attacked: The same for the adversarial image.
    """

    record: Record
    outcome: str
    panels: Mapping[str, str]
    exact: bool
    mask: str | None
    clean: str
    attacked: str


def pictures(run: FinishedRun) -> list[Picture]:
    """Of all samples that were drawn, in order, with defenses and attacks in the order of the summary."""
    classes = run.classes
    attacked = [result for result in run.summary["results"] if "attacks" not in result]
    records = [record for result in attacked for record in run.pairs[result["defense"], result["attack"]]]
    found = [_picture(record, path, classes) for record, path in run.folder.pictured(records)]
    return sorted(found, key=lambda picture: picture.record.index)


def outcome(record: Record) -> str:
    """What the runs of a sample say, a key of ``OUTCOMES``; wrong when clean is what the vote gets wrong."""
    right = sum(prediction == record.label for prediction in record.adversarial)
    if not outcomes(torch.tensor([record.clean]), torch.tensor([record.label]))[0, 2]:
        return "wrong"
    return "broken" if right == 0 else "survived" if right == len(record.adversarial) else "shaken"


def _picture(record: Record, path: Path, classes: Sequence[str]) -> Picture:
    with Image.open(path) as strip:
        exact = strip.height <= _EXACT
        panels = {
            name: _address(strip.crop((left, 0, right, strip.height)), exact)
            for name, (left, right) in zip(PANELS, spans(strip.width, len(PANELS)), strict=True)
            if name != "overlay"
        }
    mask, layer = path.with_suffix(".mask.png"), None
    if mask.is_file():
        with Image.open(mask) as small:
            alpha = small.convert("L")
            tint = Image.new("RGB", alpha.size, tuple(round(255 * value) for value in TINT))
            tint.putalpha(alpha)
            layer = _address(tint, exact=True)
    clean, attacked = (_counted(predictions, classes) for predictions in (record.clean, record.adversarial))
    return Picture(record, outcome(record), panels, exact, layer, clean, attacked)


def _counted(predictions: Sequence[int], classes: Sequence[str]) -> str:
    """As ``cat (6), dog (2)``, with a sign for times."""
    return ", ".join(f"{classes[k]} ({count}\u00d7)" for k, count in Counter(predictions).most_common())


def _address(image: Image.Image, exact: bool) -> str:
    if not exact:
        image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, format="webp", lossless=exact, quality=85)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
