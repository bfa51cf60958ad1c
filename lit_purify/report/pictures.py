"""Pictures of samples: files in the run folder, and data addresses in a page."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from lit_purify.atomic import write_whole
from lit_purify.evaluation import Record, View
from lit_purify.functional.rendering import PANELS, TINT, panels, picture_name
from lit_purify.functional.statistics import outcomes
from lit_purify.report.rows import changes

OUTCOMES = {
    "broken": "broken in every run",
    "shaken": "broken in some runs",
    "survived": "survived every run",
    "wrong": "wrong when clean",
}
_LARGEST = 192
"""Size in pixels up to which a page shows images exactly; larger ones are shrunk to it and compressed."""


def write(view: View, overlays: Path) -> None:
    """Writes a strip of all panels ``NAME.png``, each panel ``panels/NAME.PANEL.png``, and ``NAME.mask.png`` if any.

    For table rows it writes the panels and the mask as arrays of ``NAME.npz``.
    """
    if view.original.ndim == 1:
        stream, arrays = io.BytesIO(), {panel: getattr(view, panel) for panel in (*PANELS, "mask")}
        np.savez(stream, **{name: array.numpy() for name, array in arrays.items() if array is not None})
        return write_whole(overlays / f"{picture_name(*view.record.key)}.npz", stream.getvalue())
    name = picture_name(*view.record.key)
    files = {f"panels/{name}.{panel}.png": getattr(view, panel) for panel in PANELS}
    if view.mask is not None:
        files[f"{name}.mask.png"] = view.mask
    # The strip comes last: if it exists, the others do too.
    for file, image in {**files, f"{name}.png": strip(view)}.items():
        write_whole(overlays / file, _encoded(pil(image), format="png"))


def read(overlays: Path, records: Iterable[Record]) -> Iterator[View]:
    """Reads the pictures of all ranks; records without pictures are skipped."""
    names = {path.name for ending in ("png", "npz") for path in overlays.glob(f"*.{ending}")}
    for record in records:
        name = picture_name(*record.key)
        if f"{name}.npz" in names:
            with np.load(overlays / f"{name}.npz") as arrays:
                found: dict[str, Any] = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
                yield View(record, **{"mask": None, **found})
        if f"{name}.png" in names:
            images = {panel: _image(overlays / "panels" / f"{name}.{panel}.png") for panel in PANELS}
            mask = _image(overlays / f"{name}.mask.png") if f"{name}.mask.png" in names else None
            yield View(record, mask=mask, **images)


def strip(view: View) -> Tensor:
    """Original, adversarial, adversarial with mask, noised and purified image side by side."""
    mask = torch.zeros_like(view.original[:1]) if view.mask is None else view.mask
    images = [view.original, view.adversarial, view.adversarial, view.noised, view.purified]
    return panels(torch.stack(images), mask, overlay=2)


def pil(image: Tensor) -> Image.Image:
    """Converts an image (C, H, W) in [0, 1] with 1, 3 or 4 channels to PIL."""
    return to_pil_image((255 * image).round().clamp(0, 255).byte())


def _image(path: Path) -> Tensor:
    with Image.open(path) as image:
        return pil_to_tensor(image).float() / 255


def _encoded(image: Image.Image, **how: Any) -> bytes:  # noqa: ANN401
    stream = io.BytesIO()
    image.save(stream, **how)
    return stream.getvalue()


def outcome(record: Record) -> str:
    """A key of ``OUTCOMES``. ``wrong`` means that the vote misclassifies the clean image."""
    right = sum(prediction == record.label for prediction in record.adversarial)
    if not outcomes(torch.tensor([record.clean]), torch.tensor([record.label]))[0, 2]:
        return "wrong"
    return "broken" if right == 0 else "survived" if right == len(record.adversarial) else "shaken"


def shown(view: View, classes: Sequence[str], features: Sequence[Sequence[Any]] = ()) -> Mapping[str, Any]:
    """The content of a gallery entry: outcome, predictions, and images as data addresses or changes of the row."""
    record, exact = view.record, max(view.original.shape[-2:]) <= _LARGEST
    rows = view.original.ndim == 1

    def counted(predictions: Sequence[int]) -> str:
        return ", ".join(f"{classes[k]} ({count}\u00d7)" for k, count in Counter(predictions).most_common())

    def address(image: Tensor) -> str:
        small = pil(image)
        small.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
        data = _encoded(small, format="webp", lossless=exact, quality=85)
        return "data:image/webp;base64," + base64.b64encode(data).decode()

    layer = None
    if view.mask is not None and not rows:
        tint = torch.tensor(TINT).reshape(3, 1, 1).expand(-1, *view.mask.shape[1:])
        layer = address(torch.cat([tint, view.mask]))
    return {
        **{"defense": record.defense, "attack": record.attack, "index": record.index},
        "label": classes[record.label],
        "outcome": outcome(record),
        "predictions": {"clean": counted(record.clean), "attacked": counted(record.adversarial)},
        "panels": {} if rows else {name: address(getattr(view, name)) for name in PANELS},
        "changes": changes(view, features) if features else "",
        "exact": exact,
        "mask": layer,
    }
