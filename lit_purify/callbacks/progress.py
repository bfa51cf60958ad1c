"""A progress bar that counts samples."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import lightning as L
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from lit_purify.metrics import Record
from lit_purify.tasks.robustness import EvaluationListener, RobustnessTask, View


class Progress(Callback, EvaluationListener):
    """Samples done, running robust accuracy and time left; for the samples of rank zero when there are several."""

    def on_test_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Opens the bar."""
        if batch_idx == 0 and trainer.is_global_zero and isinstance(pl_module, RobustnessTask):
            samples = len(trainer.datamodule.evaluated)  # type: ignore[attr-defined]
            self.pairs = len(pl_module.pairs)
            self.bar = tqdm(
                total=-(-samples // trainer.world_size) * self.pairs,
                initial=pl_module.completed,
                desc="attacking",
                smoothing=0.0,
                file=sys.stderr,
                disable=not sys.stderr.isatty(),
                dynamic_ncols=True,
                bar_format="{desc} |{bar}| {n_fmt}/{total_fmt} samples x defenses, {remaining} left{postfix}",
            )

    def on_evaluated(
        self, trainer: L.Trainer, task: RobustnessTask, records: Sequence[Record], views: Sequence[View]
    ) -> None:
        """Moves the bar."""
        if trainer.is_global_zero:
            defense, attack = records[0].defense, records[0].attack
            self.bar.set_postfix_str(f"{defense}: {task.running(defense, attack):.3f} robust", refresh=False)
            self.bar.update(len(records))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the bar."""
        if trainer.is_global_zero and hasattr(self, "bar"):
            self.bar.close()
