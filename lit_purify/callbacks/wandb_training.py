"""What a training shows in Weights & Biases beside its metrics, with a WandbRun as a logger."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import Any

import lightning as L
import wandb
from lightning.pytorch.callbacks import Callback

from lit_purify.callbacks.wandb_run import WandbRun, log_settings, wandb_run
from lit_purify.evaluation.estimate import peak_memory
from lit_purify.evaluation.folder import RunFolder
from lit_purify.recorded import path_sha256
from lit_purify.training import TrainingTask
from lit_purify.training.export import Export


class WandbTraining(Callback):
    """Logs settings, speed, memory and the error by noise level; rank zero alone.

    Names: ``cost/images_per_second`` and ``cost/peak_memory_gib`` whenever metrics are logged;
    ``val/mse_by_level``, a chart of the validation's ``val/mse_<place>_t<level>``.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs what is trained."""
        if logger := _begun(trainer):
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            facts = {"parameters": sum(p.numel() for p in pl_module.parameters()), "classes": list(data.classes)}
            log_settings(logger, RunFolder(Path(trainer.default_root_dir)), facts)
        self._restart(trainer)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Images of all processes, for each second since the last time."""
        logger = wandb_run(trainer)
        if logger is None:
            return
        self.images += len(batch["image"]) * trainer.world_size
        if trainer.global_step >= self.logged + trainer.log_every_n_steps:  # type: ignore[attr-defined]
            speed = self.images / (time.perf_counter() - self.since)
            values = {"cost/images_per_second": speed, "cost/peak_memory_gib": peak_memory(pl_module.device) / 2**30}
            logger.log_metrics(values, step=_step(trainer))
            self._restart(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws the errors by level; does not count the time."""
        logger = wandb_run(trainer)
        if logger is None or trainer.sanity_checking:
            return
        found: dict[str, dict[int, float]] = {}
        for name, value in trainer.callback_metrics.items():
            if m := re.fullmatch(r"val/mse_(\w+)_t(\d+)", name):
                found.setdefault(m[1], {})[int(m[2])] = float(value)
        if found:
            chart = wandb.plot.line_series(
                xs=[sorted(errors) for errors in found.values()],
                ys=[[errors[level] for level in sorted(errors)] for errors in found.values()],
                keys=list(found),
                title="Error in the predicted noise",
                xname="noise level",
            )
            # Without a connection it cannot be logged; the metrics, which hold the same, are uploaded later.
            with contextlib.suppress(Exception):
                logger.experiment.log({"val/mse_by_level": chart, "trainer/global_step": _step(trainer)})
        self._restart(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The networks that were written: their hashes, and the files where artifacts are wanted."""
        logger = _begun(trainer)
        if logger is None or not isinstance(pl_module, TrainingTask):
            return
        folder = RunFolder(Path(trainer.default_root_dir))
        exports = [callback for callback in trainer.callbacks if isinstance(callback, Export)]  # type: ignore[attr-defined]
        networks = [export.path or folder.path / "model.safetensors" for export in exports]
        hashes = {path.name: path_sha256(path) for path in networks if path.exists()}
        logger.experiment.config.update({"exported_sha256": hashes}, allow_val_change=True)
        logger.log_files("training", "model", [folder.config, *networks, folder.path / "checkpoints"])

    def _restart(self, trainer: L.Trainer) -> None:
        self.images, self.logged, self.since = 0, trainer.global_step, time.perf_counter()


def _begun(trainer: L.Trainer) -> WandbRun | None:
    """The run, which waits no longer."""
    if logger := wandb_run(trainer):
        logger.held = False
    return logger


def _step(trainer: L.Trainer) -> int:
    """Where Lightning logs its metrics: at the step that has just been taken, counted from 0."""
    return max(0, trainer.global_step - 1)
