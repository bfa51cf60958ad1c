"""The command line of ``train.py``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_purify.callbacks import Stopping, WandbTraining
from lit_purify.callbacks.wandb_run import WandbRun
from lit_purify.cli.base import CommandLine, helped, rank
from lit_purify.cli.help import TRAIN
from lit_purify.cli.messages import check_checkpoint
from lit_purify.errors import InputError
from lit_purify.training import TrainingTask
from lit_purify.training.checkpoints import WholeCheckpoints
from lit_purify.training.export import ExportingTrainer

# Noise, levels and masks are drawn and computed in 32 bits.
_PRECISIONS = ("32", "32-true", "bf16-mixed", "16-mixed")


class _TrainingCLI(CommandLine):
    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
            "export": {"model", "datamodule"},
        }

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        assert self.folder is not None
        precision = self._settings.trainer.precision
        if precision is not None and str(precision) not in _PRECISIONS:
            raise InputError(f"trainer.precision = {precision}: a training takes {', '.join(_PRECISIONS)}")
        last = self.folder.path / "checkpoints" / "last.ckpt"
        if self.subcommand == "fit" and self._settings.ckpt_path is None and last.is_file():
            raise InputError(
                f"{self.folder.path} holds a training already: go on with --ckpt_path {last}, or choose another folder "
                "with --run"
            )
        if self._settings.get("ckpt_path") == "last":
            keepers = [c for c in self._settings.trainer.callbacks or [] if c.class_path.endswith(".ModelCheckpoint")]
            if last.is_file():
                check_checkpoint(last)
            elif rank() == 0 and all(keeper.init_args.dirpath == str(last.parent) for keeper in keepers):
                print(f"{last}: not there yet, the training begins anew", file=sys.stderr)
        if self.subcommand == "export":
            # Reads a file and writes one: the devices, loggers and callbacks of the run are not for that.
            trainer = self._settings.trainer
            trainer.update(self._parser("export").get_defaults().trainer)
            trainer.accelerator, trainer.logger, trainer.default_root_dir = "cpu", False, self._settings.run

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:  # noqa: ANN401
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpoints()
        return trainer

    def before_fit(self) -> None:
        """Configuration and W&B wait until the first batches have shown that data and networks fit."""

        def place(trainer: L.Trainer, task: L.LightningModule, stage: str) -> None:
            # Before WeightAveraging copies the task: else its average stays on the CPU, and every step waits for that.
            task.to(trainer.strategy.root_device)

        def start(trainer: L.Trainer, task: L.LightningModule) -> None:
            assert self.folder is not None
            if trainer.is_global_zero:
                self.folder.lock()
                self.folder.write_config(self.resolved)
            self.running = True

        for logger in self.trainer.loggers:
            if isinstance(logger, WandbRun):
                logger.held = True
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [LambdaCallback(setup=place, on_train_start=start), *callbacks, WandbTraining()]

    def after_fit(self) -> None:
        """A training that was over already took no step."""
        if not self.running and self.trainer.is_global_zero:
            print("nothing left to do: the training has had all its steps (trainer.max_steps, trainer.max_epochs)")


def train(argv: Sequence[str] | None = None) -> None:
    """``train.py fit --config ...``: trains a denoiser or a classifier; ``train.py export ...`` writes its network."""
    given = helped(list(sys.argv[1:] if argv is None else argv), TRAIN)
    _TrainingCLI(
        TrainingTask,
        given,
        trainer_class=ExportingTrainer,
        use_distributed_sampler=False,
        enable_progress_bar=sys.stderr.isatty(),
        callbacks=[Stopping()],
    )
