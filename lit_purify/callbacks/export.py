"""Writing the trained network as a file that evaluations load."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lit_purify.models.files import save_network
from lit_purify.tasks import TrainingTask


class Export(Callback):
    """At the end of a training, writes its network (the weight average, if there is one) as safetensors.

    Args:
        path: The file; ``None`` writes ``model.safetensors`` in the run's folder.
        half: Store 16-bit floats: half the size; they are read as float32.
    """

    def __init__(self, path: Path | None = None, half: bool = False) -> None:
        self.path, self.half = path, half

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rank zero writes."""
        if not trainer.is_global_zero or not isinstance(pl_module, TrainingTask):
            return
        # WeightAveraging has copied its average into the module at on_train_end.
        path = self.path or Path(trainer.default_root_dir) / "model.safetensors"
        figures = {name: round(float(value), 6) for name, value in trainer.callback_metrics.items()}
        dtype = torch.float16 if self.half else torch.float32
        verb = "Replaced" if path.exists() else "Exported"
        save_network(pl_module.network, path, {"step": trainer.global_step, "metrics": figures}, dtype)
        print(f"{verb}: {path}")
