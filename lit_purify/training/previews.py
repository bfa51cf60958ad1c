"""Pictures of how purification comes along in a training."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import lightning as L
import torch
from einops import rearrange
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.functional import pad
from torchvision.utils import save_image

from lit_purify.errors import InputError
from lit_purify.evaluation.records import write_whole
from lit_purify.functional.rendering import panels
from lit_purify.training.denoiser import DenoiserTask, PurificationListener, Purified

_GAP = 4


class Previews(Callback, PurificationListener):
    """After each validation writes ``previews/step-000123.png`` into the run's folder, and shows it in W&B.

    A row is a sample. Left to right, for each purifier: the clean image, the mask over it, noised, purified.

    Args:
        samples: How many, the first that are validated on.
    """

    def __init__(self, samples: int = 8) -> None:
        if samples < 1:
            raise InputError(f"samples = {samples}: use at least 1")
        self.samples = samples
        self.rows: dict[str, Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses a task that purifies nothing."""
        if stage == "fit" and not (isinstance(pl_module, DenoiserTask) and pl_module.purifiers):
            raise InputError(
                "Previews shows what purifiers do, the model has none: give it some, or leave Previews out"
            )

    def on_purified(self, trainer: L.Trainer, task: DenoiserTask, batch: Purified) -> None:
        """Keeps the rows of this process."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        image, name = batch.image, batch.purifier
        loader: Any = trainer.val_dataloaders
        chosen = loader.dataset.positions[: self.samples].tolist()
        mask = torch.zeros_like(image[:, :1]) if batch.mask is None else batch.mask

        def row(k: int) -> Tensor:
            images = torch.stack([image[k], image[k], batch.noised[k], batch.purified[k]])
            return panels(images, mask[k], overlay=1, gap=_GAP)

        if name not in self.rows:
            # Also on a process that has none of the samples.
            self.rows[name] = torch.zeros_like(row(0)).repeat(len(chosen), 1, 1, 1)
        for k, index in enumerate(batch.index.tolist()):
            if index in chosen:
                self.rows[name][chosen.index(index)] = row(k)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rank zero puts the rows of all processes together."""
        if not self.rows:
            return
        parts = [trainer.strategy.reduce(part, reduce_op="sum") for part in self.rows.values()]
        caption = "clean, mask, noised, purified by " + ", ".join(self.rows)
        self.rows = {}
        if not trainer.is_global_zero:
            return
        grid = torch.cat([pad(part, (0, _GAP, 0, _GAP), value=1.0) for part in parts], dim=-1)
        # limit_val_batches may have left some out.
        seen = parts[0].flatten(1).any(dim=1)
        picture = rearrange(grid[seen], "n c h w -> c (n h) w")[:, :-_GAP, :-_GAP]
        folder = Path(trainer.default_root_dir) / "previews"
        folder.mkdir(parents=True, exist_ok=True)
        path, stream = folder / f"step-{trainer.global_step:06d}.png", io.BytesIO()
        save_image(picture, stream, format="png")
        write_whole(path, stream.getvalue())
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                # At the step where Lightning has just logged the metrics of this validation.
                step = max(0, trainer.global_step - 1)
                logger.log_image("previews", [str(path)], step=step, caption=[caption])
