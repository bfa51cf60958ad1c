"""What goes to Weights & Biases, when a WandbLogger is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import wandb
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from lit_purify.metrics import Record
from lit_purify.run_folder import RunFolder
from lit_purify.tasks.robustness import EvaluationListener, RobustnessTask, View


class WandbReport(Callback, EvaluationListener):
    """Logs running accuracies, mask overlays that can be toggled, and a table of samples; rank zero alone.

    Scalars are ``running/<defense>/<attack>``, ``robust/<defense>/<attack>/<rule>`` and ``clean/<defense>/<rule>``.
    """

    def on_evaluated(
        self, trainer: L.Trainer, task: RobustnessTask, records: Sequence[Record], views: Sequence[View]
    ) -> None:
        """Running robust accuracy of one pair, over the samples of rank zero."""
        logger = _logger(trainer)
        if logger is not None:
            defense, attack = records[0].defense, records[0].attack
            logger.log_metrics({f"running/{defense}/{attack}": task.running(defense, attack)})

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reads what all processes have written into the run's folder."""
        logger = _logger(trainer)
        if logger is None or not isinstance(pl_module, RobustnessTask):
            return
        folder = RunFolder(Path(trainer.default_root_dir))
        classes = trainer.datamodule.classes  # type: ignore[attr-defined]
        rows: list[list[Any]] = []
        overlays: list[wandb.Image] = []
        for record in folder.collect(write=False):
            picture = folder.overlays / f"{record.defense}.{record.attack}.{record.index:06d}.png"
            if not picture.exists():
                continue
            rows.append(
                [
                    record.defense,
                    record.attack,
                    record.index,
                    classes[record.label],
                    _names(record.clean, classes),
                    _names(record.adversarial, classes),
                    record.linf,
                    record.l2,
                    wandb.Image(str(picture)),
                ]
            )
            mask = picture.with_suffix(".mask.png")
            if mask.exists():
                overlays.append(_with_mask(picture, mask, f"{record.defense}, sample {record.index}"))
        columns = ["defense", "attack", "index", "label", "clean", "adversarial", "linf", "l2", "images"]
        logger.log_table("samples", columns=columns, data=rows)
        if overlays:
            logger.experiment.log({"masks": overlays})
        place = logger.experiment.dir
        logger.experiment.finish()
        if logger._offline:
            print(f"W&B: offline run, upload it with: wandb sync {Path(place).parent}")


def _logger(trainer: L.Trainer) -> WandbLogger | None:
    if not trainer.is_global_zero:
        return None
    return next((logger for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)


def _names(predictions: Sequence[int], classes: Sequence[str]) -> str:
    return ", ".join(classes[p] for p in predictions)


def _with_mask(picture: Path, mask: Path, caption: str) -> wandb.Image:
    """The adversarial panel of a picture with its mask as a layer of its own."""
    with Image.open(picture) as strip, Image.open(mask) as small:
        # The strip is square panels with gaps between them; the second is the adversarial image.
        height = strip.height
        gap = (strip.width - 5 * height) // 4
        panel = strip.crop((height + gap, 0, 2 * height + gap, height))
        layer = np.array(small.convert("L").resize(panel.size, Image.Resampling.NEAREST)) > 127
    return wandb.Image(
        panel,
        caption=caption,
        masks={"strong_noise": {"mask_data": layer.astype(np.uint8), "class_labels": {0: "weak", 1: "strong"}}},
    )
