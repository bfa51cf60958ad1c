"""The command line of ``train.py``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins import CheckpointIO

from lit_purify.callbacks import Progress, Stopping, WandbRun, WandbTraining
from lit_purify.cli import settings as reading
from lit_purify.cli.common import State, guarded, helped, rank
from lit_purify.cli.messages import check_checkpoint
from lit_purify.data import ImageDataModule
from lit_purify.errors import InputError, notice
from lit_purify.evaluation.estimate import duration, gibibytes, peak_memory
from lit_purify.evaluation.folder import RunFolder
from lit_purify.functional.images import sample_shape
from lit_purify.models import Classifier, Denoiser
from lit_purify.training import Averaging, Export, TrainingTask
from lit_purify.training.checkpoints import WholeCheckpoints
from lit_purify.training.export import export_network

_COMMANDS = ("fit", "validate", "export")
_WARM, _MEASURED = 2, 5
"""Batches of a dry run: warm-up and measured."""
_ROWS, _DAY = 2, 86400.0


def training_parser() -> reading.Parser:
    """The parser of ``train.py``."""
    parser = reading.make_parser("train.py", "Settings of a training.")
    add: Callable[..., Any] = parser.add_argument
    add("--model", type=TrainingTask, required=True, help="The training task: network and settings.")
    add("--data", type=ImageDataModule | None, default=None, help="The training and validation images.")
    add("--seed_everything", type=int, default=0, help="Seed of weights, noise and shuffling.")
    add("--average", type=float, default=0.999, help="Decay of the weight average; 0 for none.")
    add("--ckpt_path", type=Path | None, default=None, help="Checkpoint to resume from; 'last' is the run's own.")
    add("--output", type=Path | None, default=None, help="The network's file (default: RUN/model.safetensors).")
    add("--half", type=bool, default=False, help="Store 16-bit floats: half the size.")
    own = {"default_root_dir", "use_distributed_sampler", "callbacks"}
    parser.add_class_arguments(L.Trainer, "trainer", instantiate=False, skip=own)
    add("--trainer.callbacks", type=list[L.Callback] | None, default=None, help="Your own callbacks.")
    parser.set_defaults({"trainer.logger": {"class_path": f"{WandbRun.__module__}.WandbRun"}})
    parser.set_defaults({"trainer.enable_progress_bar": False})
    return parser


def _check(settings: Namespace, command: str, folder: RunFolder) -> None:
    """Raises an ``InputError`` for settings that Lightning would reject late or never."""
    if not 0 <= settings.seed_everything < 2**32:
        raise InputError(f"seed_everything = {settings.seed_everything}: use a seed in 0 .. 2**32 - 1")
    last, checkpoint = folder.path / "checkpoints" / "last.ckpt", settings.ckpt_path
    if command == "fit" and checkpoint is None and last.is_file():
        raise InputError(
            f"{folder.path} holds a training already: resume it with --ckpt_path last, or use another folder (--run)"
        )
    if checkpoint is not None and str(checkpoint) == "last":
        settings.ckpt_path = last if last.is_file() else None
        if settings.ckpt_path is None and rank() == 0:
            print(f"{last}: does not exist yet: the training starts from the beginning", file=sys.stderr)
    if settings.ckpt_path is not None:
        check_checkpoint(Path(settings.ckpt_path))


def _trainer(made: Namespace, folder: RunFolder, own: Sequence[L.Callback] = ()) -> L.Trainer:
    settings = vars(made.trainer)
    callbacks = settings.pop("callbacks", None) or []
    # The user's callback replaces the default one of the same kind.
    kinds = (WeightAveraging, Export, ModelCheckpoint)
    taken = [kind for kind in kinds if any(isinstance(callback, kind) for callback in callbacks)]
    if settings.get("enable_checkpointing") is not False:
        own = [*own, ModelCheckpoint(save_last=True)]
    own = [callback for callback in own if not isinstance(callback, tuple(taken))]
    callbacks = [*own, *callbacks, Progress(), Stopping(), WandbTraining()]
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            # In Lightning's own form.
            callback.dirpath = os.path.realpath(folder.path / "checkpoints")
    plugins = settings.pop("plugins", None) or []
    plugins = plugins if isinstance(plugins, list) else [plugins]
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins = [*plugins, WholeCheckpoints()]
    place = str(folder.path)
    return reading.make_trainer(
        settings, plugins=plugins, callbacks=callbacks, default_root_dir=place, use_distributed_sampler=False
    )


def _fit(made: Namespace, config: str, state: State) -> None:
    folder, first = state.folder, -1
    assert folder is not None

    def start(trainer: L.Trainer, task: L.LightningModule) -> None:
        # Written only now: settings that Lightning rejects leave no files.
        nonlocal first
        if trainer.is_global_zero:
            folder.lock()
            folder.write_config(config)
            _warn_of_days(trainer, made)
        state.running, first = True, trainer.global_step

    own: list[L.Callback] = [LambdaCallback(on_train_start=start)]
    own += [Averaging(made.average)] if made.average else []
    trainer = _trainer(made, folder, [*own, Export(made.output, made.half)])
    if trainer.is_global_zero:
        # Before loggers start.
        made.data.prepare_data()
        made.model.check(made.data)
    trainer.fit(made.model, datamodule=made.data, ckpt_path=made.ckpt_path)
    if first in (-1, trainer.global_step) and trainer.is_global_zero:
        print("nothing left to do: the training has finished all steps (raise trainer.max_steps or trainer.max_epochs)")


def _warn_of_days(trainer: L.Trainer, made: Namespace) -> None:
    if trainer.strategy.root_device.type == "cpu":
        samples = made.data.batch_size * trainer.accumulate_grad_batches
        steps = trainer.estimated_stepping_batches - trainer.global_step
        days = steps * samples * seconds_a_sample(made.model.network) / _DAY
        if days > 1:
            slow = f"on this CPU the training takes about {days:.0f} days"
            notice(f"warning: {slow}: use a GPU, a smaller network or fewer steps")


def seconds_a_sample(network: Classifier | Denoiser) -> float:
    """Seconds of a forward and backward pass per sample, timed on the second of two passes; changes no weight."""
    x = torch.zeros(_ROWS, *sample_shape(network.channels, network.size))
    inputs = (x, torch.ones(_ROWS)) if isinstance(network, Denoiser) else (x,)
    training, started = network.training, 0.0
    network.eval()
    for _ in range(2):
        started = perf_counter()
        with torch.enable_grad():
            # Unlike backward(), this does not trigger the averaging of gradients over processes.
            torch.autograd.grad(network(*inputs).sum(), list(network.parameters()), allow_unused=True)
    network.train(training)
    return (perf_counter() - started) / _ROWS


def _measure(made: Namespace, folder: RunFolder) -> None:
    """Prints the expected cost of the training, measured over a few steps; writes nothing."""
    times: list[float] = []

    def tick(trainer: L.Trainer, *_: object) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        times.append(perf_counter())
        trainer.should_stop = len(times) > _WARM + _MEASURED

    off = {"enable_checkpointing": False, "enable_model_summary": False, "limit_val_batches": 0}
    vars(made.trainer).update(off, min_epochs=None, min_steps=None)
    clock = LambdaCallback(on_train_start=tick, on_train_batch_end=tick)
    trainer = _trainer(made, folder, [clock, *([Averaging(made.average)] if made.average else [])])
    trainer.fit(made.model, datamodule=made.data)
    # The training may have fewer batches.
    warm = min(_WARM, len(times) - 2)
    seconds = (times[-1] - times[warm]) / (len(times) - 1 - warm) * trainer.accumulate_grad_batches
    device, steps = trainer.strategy.root_device, int(trainer.estimated_stepping_batches)
    if trainer.is_global_zero:
        print(
            f"{seconds:.3g} s a step on {device}, {steps} steps: {duration(steps * seconds)} without validation; peak "
            f"memory {gibibytes(peak_memory(device))}. Nothing was written."
        )


def train(argv: Sequence[str] | None = None) -> None:
    """Runs ``train.py``: trains a denoiser or a classifier, or writes its network; see ``--help``."""
    words = helped(list(sys.argv[1:] if argv is None else argv), "train")
    with guarded() as state:
        if not words or words[0] not in _COMMANDS:
            raise InputError(f"the command is missing, use one of {', '.join(_COMMANDS)}: fit --config FILE trains")
        command, dry = words.pop(0), "--dry_run" in words
        if dry and command != "fit":
            raise InputError(f"--dry_run works with fit, not with {command}: leave it out")
        words = [word for word in words if word != "--dry_run"]
        parser = training_parser()
        settings = reading.read(words, parser)
        folder = state.folder = RunFolder(reading.run_folder(settings, command))
        _check(settings, "" if dry else command, folder)
        config = reading.dump(parser, settings, "ckpt_path", "output", "half")
        reading.place_loggers(settings, folder.path)
        L.seed_everything(settings.seed_everything, workers=True, verbose=False)
        if command == "export" or dry:
            # Export needs neither loggers nor callbacks.
            settings.trainer.callbacks, settings.trainer.logger = None, False
        made = reading.instantiated(parser, settings)
        if command == "export":
            output = settings.output or folder.path / "model.safetensors"
            if rank() == 0:
                export_network(made.model, output, settings.half, settings.ckpt_path)
            return
        if made.data is None:
            raise InputError("no data given: name a datamodule in the configuration, or with --data")
        if dry:
            _measure(made, folder)
        elif command == "fit":
            _fit(made, config, state)
        else:
            state.running = True
            _trainer(made, folder).validate(made.model, datamodule=made.data, ckpt_path=made.ckpt_path)
