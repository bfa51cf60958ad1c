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
    """Samples done, running robust accuracy and time left; of several processes, rank zero speaks for all."""

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
            self.bar = tqdm(
                total=len(trainer.datamodule.evaluated) * len(pl_module.pairs),  # type: ignore[attr-defined]
                initial=pl_module.completed,
                desc="attacking",
                smoothing=0.0,
                file=sys.stderr,
                # A log gets a line now and then, where a terminal gets a bar that moves.
                mininterval=0.1 if sys.stderr.isatty() else 60.0,
                dynamic_ncols=True,
                bar_format="{desc} |{bar}| {n_fmt}/{total_fmt} samples x defenses, {remaining} left{postfix}",
            )

    def on_evaluated(
        self, trainer: L.Trainer, task: RobustnessTask, records: Sequence[Record], views: Sequence[View]
    ) -> None:
        """Moves the bar."""
        if trainer.is_global_zero:
            defense, attack = records[0].defense, records[0].attack
            self.bar.set_postfix_str(f"{defense}: {100 * task.running(defense, attack):.1f} % robust", refresh=False)
            self.bar.update(min(len(records) * trainer.world_size, self.bar.total - self.bar.n))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the bar."""
        if trainer.is_global_zero and hasattr(self, "bar"):
            self.bar.close()
