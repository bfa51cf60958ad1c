"""Writing the trained network as a file that evaluations load."""

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
    """At the end of a training, writes its network (the weight average, if there is one) as safetensors.

    Args:
        path: The file; ``None`` writes ``model.safetensors`` in the run's folder.
        half: Store 16-bit floats: half the size; they are read as float32.
    """

    def __init__(self, path: Path | None = None, half: bool = False) -> None:
        self.path, self.half = path, half
        self.first: int | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses before the training what cannot be written after it."""
        if stage == "fit" and isinstance(pl_module, TrainingTask):
            _check(pl_module.network, self.path)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A training that has had all its steps may be begun, too."""
        self.first = trainer.global_step

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rank zero writes. At the end of the training, before this, WeightAveraging has copied its average."""
        if not trainer.is_global_zero or not isinstance(pl_module, TrainingTask):
            return
        path = self.path or Path(trainer.default_root_dir) / "model.safetensors"
        if self.first in (None, trainer.global_step) and trainer.ckpt_path is not None:
            if saved_step(path) == trainer.global_step:
                # Finished before: the file has the figures of the last validation, and runs that read it know its hash.
                return
            # Killed after its last step: nothing was left to train, so nothing is copied either.
            _take_up(pl_module, trainer.ckpt_path)
        figures = {name: round(float(value), 6) for name, value in trainer.callback_metrics.items()}
        info = {"origin": pl_module.network.origin, "step": trainer.global_step, "metrics": figures, **pl_module.facts}
        _write(pl_module.network, path, self.half, info)


def export_network(task: TrainingTask, path: Path, half: bool = False, checkpoint: Path | None = None) -> None:
    """Writes a network with its configuration as safetensors.

    Args:
        task: A training task.
        path: The file.
        half: Store 16-bit floats: half the size; they are read as float32.
        checkpoint: A checkpoint of the training, whose weight average is taken if it has one; ``None`` writes the
            network as it is configured: a public checkpoint, read and written.

    Raises:
        InputError: The network cannot be written there.
    """
    _check(task.network, path)
    info: dict[str, Any] = {"origin": task.network.origin}
    if checkpoint is not None:
        info |= {"step": _take_up(task, checkpoint), **task.facts}
    _write(task.network, path, half, info)


def _check(network: Classifier | Denoiser, path: Path | None) -> None:
    header(network, {})
    if path is not None and path.suffix != ".safetensors":
        raise InputError(f"{path}: networks are written as safetensors: let the name end in .safetensors")


def _write(network: Classifier | Denoiser, path: Path, half: bool, info: dict[str, Any]) -> None:
    verb = "Replaced" if path.exists() else "Exported"
    save_network(network, path, info, torch.float16 if half else torch.float32)
    print(f"{verb}: {path}")


def _take_up(task: TrainingTask, path: str | Path) -> int:
    """Takes the weights of a checkpoint; returns its step."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # WeightAveraging keeps its average there, and the last iterate under another key.
    task.load_state_dict(checkpoint["state_dict"])
    return int(checkpoint["global_step"])
