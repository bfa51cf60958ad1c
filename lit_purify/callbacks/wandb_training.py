"""Logs settings and costs of a training to Weights & Biases, with a WandbRun as the logger."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lit_purify.callbacks.wandb_run import log_settings, wandb_run
from lit_purify.data.base import Batch
from lit_purify.evaluation.estimate import peak_memory
from lit_purify.evaluation.folder import RunFolder
from lit_purify.recorded import path_sha256
from lit_purify.training.export import Export


class WandbTraining(Callback):
    """Logs settings, speed, memory, and hashes of exported networks on rank 0."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the settings, and starts the clock."""
        if logger := wandb_run(trainer):
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            facts = {"parameters": sum(p.numel() for p in pl_module.parameters()), "classes": list(data.classes)}
            log_settings(logger, RunFolder(Path(trainer.default_root_dir)), facts)
        self._restart(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Logs samples per second of all processes, and peak memory, whenever metrics are logged."""
        self.samples += len(batch["index"]) * trainer.world_size
        if trainer.global_step >= self.logged + trainer.log_every_n_steps:  # type: ignore[attr-defined]
            if logger := wandb_run(trainer):
                costs = {"images_per_second": self.samples / (perf_counter() - self.since)}
                costs["peak_memory_gib"] = peak_memory(pl_module.device) / 2**30
                # Like Lightning, which counts steps from 0.
                logger.log_metrics({f"cost/{k}": v for k, v in costs.items()}, step=trainer.global_step - 1)
            self._restart(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restarts the clock, so that the time of validation does not count."""
        self._restart(trainer)

    def _restart(self, trainer: L.Trainer) -> None:
        self.samples, self.logged, self.since = 0, trainer.global_step, perf_counter()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the hashes of the exported networks."""
        if logger := wandb_run(trainer):
            folder = RunFolder(Path(trainer.default_root_dir))
            exports = [callback for callback in trainer.callbacks if isinstance(callback, Export)]  # type: ignore[attr-defined]
            networks = [export.path or folder.path / "model.safetensors" for export in exports]
            hashes = {path.name: path_sha256(path) for path in networks if path.exists()}
            logger.experiment.config.update({"exported_sha256": hashes}, allow_val_change=True)
