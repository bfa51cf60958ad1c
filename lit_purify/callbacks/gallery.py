"""Pictures of what purification does to single samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from lit_purify.evaluation import EvaluationListener, Record, RobustnessTask, View
from lit_purify.evaluation.folder import RunFolder
from lit_purify.report import pictures


class Gallery(Callback, EvaluationListener):
    """Writes the pictures of the first samples into ``overlays/``; each process writes those of its own samples."""

    def on_evaluated(
        self, trainer: L.Trainer, task: RobustnessTask, records: Sequence[Record], views: Sequence[View]
    ) -> None:
        """Before the records: a sample whose record is there is not shown again."""
        for view in views:
            pictures.write(view, RunFolder(Path(trainer.default_root_dir)).overlays)
