"""What a training shows in Weights & Biases beside its metrics, with a WandbRun as a logger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lit_purify.callbacks.wandb_run import log_settings, wandb_run
from lit_purify.evaluation.folder import RunFolder
from lit_purify.recorded import path_sha256
from lit_purify.training.export import Export


class WandbTraining(Callback):
    """Logs settings, and hashes of the networks that were written."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs what is trained."""
        if logger := wandb_run(trainer):
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            facts = {"parameters": sum(p.numel() for p in pl_module.parameters()), "classes": list(data.classes)}
            log_settings(logger, RunFolder(Path(trainer.default_root_dir)), facts)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs what came of it."""
        if logger := wandb_run(trainer):
            folder = RunFolder(Path(trainer.default_root_dir))
            exports = [callback for callback in trainer.callbacks if isinstance(callback, Export)]  # type: ignore[attr-defined]
            networks = [export.path or folder.path / "model.safetensors" for export in exports]
            hashes = {path.name: path_sha256(path) for path in networks if path.exists()}
            logger.experiment.config.update({"exported_sha256": hashes}, allow_val_change=True)
