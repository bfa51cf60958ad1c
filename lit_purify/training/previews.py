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

from lit_purify.data.base import Batch
from lit_purify.defense import Trace
from lit_purify.errors import InputError
from lit_purify.evaluation.records import write_whole
from lit_purify.functional.rendering import panels
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
        self.rows: list[Tensor] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raises an ``InputError`` for a task without purifiers."""
        if stage == "fit" and not (isinstance(pl_module, DenoiserTask) and pl_module.purifiers):
            raise InputError("Previews: the model has no purifiers to show: add model.purifiers, or remove Previews")

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Mapping[str, Trace],
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the panels of the first samples, see ``DenoiserTask.validation_step``."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and trainer.is_global_zero:
            for k, image in enumerate(batch["image"][: self.samples - len(self.rows)]):
                self.rows.append(torch.cat([_panels(image, trace, k) for trace in outputs.values()], dim=-1))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes and logs the picture."""
        if not self.rows:
            return
        picture, self.rows = torch.cat(self.rows, dim=-2)[:, :-_GAP, :-_GAP], []
        folder = Path(trainer.default_root_dir) / "previews"
        folder.mkdir(parents=True, exist_ok=True)
        path, stream = folder / f"step-{trainer.global_step:06d}.png", io.BytesIO()
        save_image(picture, stream, format="png")
        write_whole(path, stream.getvalue())
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                # The step of this validation's metrics.
                logger.log_image("previews", [str(path)], step=max(0, trainer.global_step - 1))


def _panels(image: Tensor, trace: Trace, k: int) -> Tensor:
    """Four panels of a purifier for the k-th image of a batch, with a gap to the right and below."""
    mask = torch.zeros_like(image[:1]) if trace.mask is None else trace.mask[k]
    shown = panels(torch.stack([image, image, trace.noised[k], trace.purified[k]]), mask, overlay=1, gap=_GAP)
    return torch.nn.functional.pad(shown, (0, _GAP, 0, _GAP), value=1.0)
