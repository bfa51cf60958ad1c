"""Ending a run in good order when a scheduler says so."""

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
_SAVING = b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once, without\n"


class Stopping(Callback):
    """On SIGTERM or SIGUSR1 (preemption, the end of the time granted) to any process, all of them end.

    An evaluation, or a purification of images, ends at once: all that is done is on the disk. A training finishes its
    step, saves ``checkpoints/last.ckpt``, and ends; from there it takes the very steps that it would have taken. It
    does so upon Ctrl-C as well; a second one ends it at once.

    Lightning's own handlers talk to the other processes, and save, wherever the signal finds them. In a training to
    be put after all callbacks that change weights.
    """

    stopped = False

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends at once."""
        for signum in _SIGNALS:
            signal.signal(signum, _end)

    on_predict_start = on_test_start

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Waits for the end of a step."""
        self.step = trainer.global_step
        for signum in (*_SIGNALS, signal.SIGINT):
            signal.signal(signum, self._note)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
                # The run's own: it would write the next one beside one that it does not know.
                last = Path(callback.dirpath) / "last.ckpt"
                callback.last_model_path = str(last) if last.is_file() else callback.last_model_path

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """There is no step any more to wait for."""
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """All processes agree to stop after the same step."""
        if trainer.global_step == self.step:
            # Gradients are being accumulated, which checkpoints do not hold.
            return
        self.step = trainer.global_step
        if not trainer.strategy.reduce_boolean_decision(self.stopped, all=False):
            return
        path = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            print(f"stopped after step {trainer.global_step}: go on with ckpt_path: {path}", file=sys.stderr)
        raise KeyboardInterrupt

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.stopped = True
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # Not print, which may be what was interrupted.
            os.write(2, _SAVING)


def _end(signum: int, frame: FrameType | None) -> NoReturn:
    # A second signal, from a launcher that sees another process end, must not disturb the ending.
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    # As Ctrl-C, upon which Lightning ends the processes that it has started as well.
    raise KeyboardInterrupt
