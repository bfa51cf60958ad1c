"""Export of trained networks as safetensors files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lit_purify.errors import InputError
from lit_purify.models import Classifier, Denoiser
from lit_purify.models.files import header, save_network, saved_step
from lit_purify.training.task import TrainingTask


class Export(Callback):
    """Writes the network (its weight average, if there is one) as safetensors at the end of a training.

    Args:
        path: The file; ``None`` writes ``model.safetensors`` into the run folder.
        half: Store 16-bit floats, for half the size; loaders return float32.
    """

    def __init__(self, path: Path | None = None, half: bool = False) -> None:
        self.path, self.half = path, half
        self.first: int | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Checks before the training that the network can be written."""
        if stage == "fit" and isinstance(pl_module, TrainingTask):
            _check(pl_module.network, self.path)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remembers the first step, to recognize a training that was already finished."""
        self.first = trainer.global_step

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the network on rank 0. WeightAveraging has already copied its average."""
        if not trainer.is_global_zero or not isinstance(pl_module, TrainingTask):
            return
        path = self.path or Path(trainer.default_root_dir) / "model.safetensors"
        if self.first in (None, trainer.global_step) and trainer.ckpt_path is not None:
            if saved_step(path) == trainer.global_step:
                # Already finished: the file has the last validation's metrics, and other runs know its hash.
                return
            # Killed after the last step: no step ran now, so the average was not copied.
            _load(pl_module, trainer.ckpt_path)
        figures = {name: round(float(value), 6) for name, value in trainer.callback_metrics.items()}
        info = {"origin": pl_module.network.origin, "step": trainer.global_step, "metrics": figures, **pl_module.facts}
        _write(pl_module.network, path, self.half, info)


def export_network(task: TrainingTask, path: Path, half: bool = False, checkpoint: Path | None = None) -> None:
    """Writes a network with its configuration as safetensors.

    Args:
        task: A training task.
        path: The file to write.
        half: Store 16-bit floats, for half the size; loaders return float32.
        checkpoint: A checkpoint of the training; its weight average is used if it has one. ``None`` writes the
            configured network, for example a public one.

    Raises:
        InputError: The network cannot be written there.
    """
    _check(task.network, path)
    info: dict[str, Any] = {"origin": task.network.origin}
    if checkpoint is not None:
        info |= {"step": _load(task, checkpoint), **task.facts}
    _write(task.network, path, half, info)


def _check(network: Classifier | Denoiser, path: Path | None) -> None:
    header(network, {})
    if path is not None and path.suffix != ".safetensors":
        raise InputError(f"{path}: networks are safetensors files: use a name that ends in .safetensors")


def _write(network: Classifier | Denoiser, path: Path, half: bool, info: dict[str, Any]) -> None:
    verb = "Replaced" if path.exists() else "Exported"
    save_network(network, path, info, torch.float16 if half else torch.float32)
    print(f"{verb}: {path}")


def _load(task: TrainingTask, path: str | Path) -> int:
    """Loads the weights of a checkpoint; returns its step."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # WeightAveraging stores its average here, and the last iterate under another key.
    task.load_state_dict(checkpoint["state_dict"])
    return int(checkpoint["global_step"])
