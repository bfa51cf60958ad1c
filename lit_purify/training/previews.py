"""Pictures of purified images during a training."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchvision.utils import save_image

from lit_purify.atomic import write_whole
from lit_purify.data.base import Batch
from lit_purify.defense import Trace
from lit_purify.errors import InputError
from lit_purify.functional.rendering import enlarged, overlaid
from lit_purify.training.denoiser import DenoiserTask

_GAP = 4


class Previews(Callback):
    """Writes ``previews/step-000123.png`` into the run folder after each validation, and logs it to W&B.

    Each row is a sample. Left to right, for each purifier: clean image, clean image with mask, noised, purified.

    Args:
        samples: Number of samples, the first ones of rank 0.
    """

    def __init__(self, samples: int = 8) -> None:
        if samples < 1:
            raise InputError(f"samples = {samples}: use at least 1")
        self.samples = samples
        self.rows: list[list[Tensor]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raises an ``InputError`` for a task without purifiers."""
        if stage == "fit" and not (isinstance(pl_module, DenoiserTask) and pl_module.purifiers):
            raise InputError("Previews: the model has no purifiers to show: add model.purifiers, or remove Previews")

    def on_validation_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Mapping[str, Trace], batch: Batch, *_: int
    ) -> None:
        """Keeps the panels of the first samples, see ``DenoiserTask.validation_step``."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and trainer.is_global_zero:
            for k, image in enumerate(batch["image"][: self.samples - len(self.rows)]):
                self.rows.append([panel for trace in outputs.values() for panel in _panels(image, trace, k)])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes and logs the picture."""
        if not self.rows:
            return
        rows, self.rows = self.rows, []
        folder = Path(trainer.default_root_dir) / "previews"
        folder.mkdir(parents=True, exist_ok=True)
        path, stream = folder / f"step-{trainer.global_step:06d}.png", io.BytesIO()
        save_image(
            [panel for row in rows for panel in row], stream, "png", nrow=len(rows[0]), padding=_GAP, pad_value=1.0
        )
        write_whole(path, stream.getvalue())
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                # The step of this validation's metrics.
                logger.log_image("previews", [str(path)], step=max(0, trainer.global_step - 1))


def _panels(image: Tensor, trace: Trace, k: int) -> Tensor:
    """Four panels (4, 3, H, W) of a purifier for the k-th image of a batch."""
    panels = torch.stack([image, image, trace.noised[k], trace.purified[k]]).expand(-1, 3, -1, -1).clone()
    if trace.mask is not None:
        panels[1] = overlaid(panels[1], trace.mask[k])
    return enlarged(panels)
