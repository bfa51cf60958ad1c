"""Ends a run cleanly on a signal from a scheduler or user."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_SAVING = b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once, without one\n"


class Stopping(Callback):
    """Ends all processes if any of them gets SIGTERM or SIGUSR1 (preemption, time limit).

    An evaluation or a purification ends at once; finished results are on the disk. A training finishes its step, saves
    ``checkpoints/last.ckpt`` and ends; it resumes with the same steps as an uninterrupted training. Ctrl-C does the
    same, and a second Ctrl-C ends the training at once.

    Lightning's own handlers communicate and save at any point of a step. In a training, put this after all callbacks
    that change weights.
    """

    stopped = False

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sets handlers that end the run at once."""
        for signum in _SIGNALS:
            signal.signal(signum, _end)

    on_predict_start = on_test_start

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sets handlers that end the training after its current step."""
        self.step = trainer.global_step
        for signum in (*_SIGNALS, signal.SIGINT):
            signal.signal(signum, self._note)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
                # Otherwise it would write a second file beside an existing last.ckpt.
                last = Path(callback.dirpath) / "last.ckpt"
                callback.last_model_path = str(last) if last.is_file() else callback.last_model_path

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restores Ctrl-C: no step is left to wait for."""
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Stops all processes after the same step."""
        if trainer.global_step == self.step:
            # Checkpoints do not store accumulated gradients.
            return
        self.step = trainer.global_step
        if not trainer.strategy.reduce_boolean_decision(self.stopped, all=False):
            return
        path = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            print(f"stopped after step {trainer.global_step}: resume with ckpt_path: {path}", file=sys.stderr)
        raise KeyboardInterrupt

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.stopped = True
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # Not print: the signal may have interrupted a print.
            os.write(2, _SAVING)


def _end(signum: int, frame: FrameType | None) -> NoReturn:
    # A launcher may send a second signal when another process ends: ignore it.
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    # Like Ctrl-C: Lightning then also ends the processes that it started.
    raise KeyboardInterrupt
