"""Pictures of what purification does to single samples."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchvision.utils import save_image

from lit_purify.evaluation.folder import RunFolder
from lit_purify.evaluation.module import EvaluationListener, RobustnessTask, View
from lit_purify.evaluation.records import Record, write_whole
from lit_purify.functional.rendering import panels


class Gallery(Callback, EvaluationListener):
    """Writes ``overlays/DEFENSE.ATTACK.INDEX.png``: original, adversarial, mask overlay, noised, purified.

    Beside it the bare mask at its own size, ``....mask.png``, where the defense has one.
    """

    def on_evaluated(
        self, trainer: L.Trainer, task: RobustnessTask, records: Sequence[Record], views: Sequence[View]
    ) -> None:
        """Whichever process holds a sample writes its picture."""
        folder = RunFolder(Path(trainer.default_root_dir)).overlays
        folder.mkdir(parents=True, exist_ok=True)
        for view in views:
            defense, attack, index = view.record.key
            mask = torch.zeros_like(view.original[:1]) if view.mask is None else view.mask
            images = torch.stack([view.original, view.adversarial, view.adversarial, view.noised, view.purified])
            strip = panels(images, mask, overlay=2)
            _save(strip, folder / f"{defense}.{attack}.{index:06d}.png")
            if view.mask is not None:
                _save(view.mask, folder / f"{defense}.{attack}.{index:06d}.mask.png")


def _save(image: Tensor, path: Path) -> None:
    """Whole or not at all: a sample whose record is there is not shown again."""
    stream = io.BytesIO()
    save_image(image, stream, format="png")
    write_whole(path, stream.getvalue())
