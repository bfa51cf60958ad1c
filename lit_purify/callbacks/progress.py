"""A progress bar that counts samples."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import lightning as L
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from lit_purify.metrics import Record
from lit_purify.tasks.robustness import EvaluationListener, RobustnessTask, View


class Progress(Callback, EvaluationListener):
    """Samples done, running robust accuracy and time left; of several processes, rank zero speaks for all."""

    bar: tqdm | None = None

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
            self.total = len(trainer.datamodule.evaluated) * len(pl_module.pairs)  # type: ignore[attr-defined]
            self.said = time.monotonic()
            self.bar = tqdm(
                total=self.total,
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
        if self.bar is not None:
            defense, attack = records[0].defense, records[0].attack
            self.bar.set_postfix_str(f"{defense}: {100 * task.running(defense, attack):.1f} % robust", refresh=False)
            self.bar.update(min(len(records) * trainer.world_size, self.total - self.bar.n))
            if self.bar.disable and time.monotonic() > self.said + 60.0:
                # A log gets a line a minute, where a terminal gets a bar.
                self.said = time.monotonic()
                print(f"{task.completed} of {self.total} samples x defenses on this process", flush=True)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that what is said of the error gets a line of its own."""
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
