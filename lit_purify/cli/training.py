"""The command line of ``train.py``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_purify.callbacks import Stopping, WandbTraining
from lit_purify.callbacks.wandb_run import WandbRun
from lit_purify.cli.common import State, guarded, helped, rank, unwrapped
from lit_purify.cli.help import TRAIN
from lit_purify.cli.messages import check_checkpoint, check_configs
from lit_purify.cli.settings import Parser, arguments, dump, launched, make_parser, place_loggers, run_folder
from lit_purify.data import ImageDataModule
from lit_purify.errors import InputError
from lit_purify.evaluation.folder import RunFolder
from lit_purify.private import renew_store
from lit_purify.training import TrainingTask
from lit_purify.training.checkpoints import WholeCheckpoints
from lit_purify.training.export import export_network

# Noise, levels and masks are drawn and computed in 32 bits.
_PRECISIONS = ("32", "32-true", "bf16-mixed", "16-mixed")
_COMMANDS = ("fit", "validate", "export")


def _parser(command: str) -> Parser:
    parser = make_parser("train.py", "Settings of a training.")
    parser.add_argument("--model", type=TrainingTask, required=True, help="What is trained, and how.")
    parser.add_argument("--data", type=ImageDataModule | None, default=None, help="The images.")
    parser.add_argument("--seed_everything", type=int, default=0, help="Seed of weights, noise and shuffling.")
    parser.add_argument(
        "--ckpt_path", type=Path | None, default=None, help="Go on from this checkpoint; 'last' is the run's own."
    )
    if command == "export":
        parser.add_argument(
            "--output", type=Path | None, default=None, help="The file (default: RUN/model.safetensors)."
        )
        parser.add_argument("--half", type=bool, default=False, help="Store 16-bit floats: half the size.")
    own = {"default_root_dir", "use_distributed_sampler"}
    parser.add_class_arguments(L.Trainer, "trainer", instantiate=False, skip=own)
    parser.set_defaults({"trainer.enable_progress_bar": sys.stderr.isatty()})
    return parser


def _check(settings: Namespace, command: str, folder: RunFolder) -> None:
    """Refuses what Lightning would refuse late, or not at all."""
    if not 0 <= settings.seed_everything < 2**32:
        raise InputError(f"seed_everything = {settings.seed_everything} is outside 0 .. 2**32 - 1")
    precision = settings.trainer.precision
    if precision is not None and str(precision) not in _PRECISIONS:
        raise InputError(f"trainer.precision = {precision}: a training takes {', '.join(_PRECISIONS)}")
    last, given = folder.path / "checkpoints" / "last.ckpt", settings.ckpt_path
    if command == "fit" and given is None and last.is_file():
        raise InputError(
            f"{folder.path} holds a training already: go on with --ckpt_path last, or choose another folder with --run"
        )
    if given is not None and str(given) == "last":
        settings.ckpt_path = last if last.is_file() else None
        if settings.ckpt_path is None and rank() == 0:
            print(f"{last}: does not exist yet, the training begins from the start", file=sys.stderr)
    if settings.ckpt_path is not None:
        check_checkpoint(Path(settings.ckpt_path))


def _trainer(settings: Namespace, made: Namespace, folder: RunFolder) -> L.Trainer:
    renew_store(rank())
    given = vars(made.trainer)
    callbacks = given.pop("callbacks", None) or []
    trainer = L.Trainer(
        **given | launched(given),
        callbacks=[*(callbacks if isinstance(callbacks, list) else [callbacks]), Stopping()],
        default_root_dir=str(folder.path),
        use_distributed_sampler=False,
    )
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpoints()
    return trainer


def _fit(trainer: L.Trainer, task: TrainingTask, made: Namespace, config: str, state: State) -> None:
    """Configuration and W&B wait until the first batches have shown that data and networks fit."""
    folder, stepped = state.folder, False
    assert folder is not None

    def place(trainer: L.Trainer, task: L.LightningModule, stage: str) -> None:
        # Before WeightAveraging copies the task: else its average stays on the CPU, and every step waits for that.
        task.to(trainer.strategy.root_device)

    def start(trainer: L.Trainer, task: L.LightningModule) -> None:
        nonlocal stepped
        if trainer.is_global_zero:
            folder.lock()
            folder.write_config(config)
        state.running = stepped = True

    for logger in trainer.loggers:
        if isinstance(logger, WandbRun):
            logger.held = True
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks[:] = [LambdaCallback(setup=place, on_train_start=start), *callbacks, WandbTraining()]
    trainer.fit(task, datamodule=made.data, ckpt_path=made.ckpt_path)
    if not stepped and trainer.is_global_zero:
        print("nothing left to do: the training has had all its steps (trainer.max_steps, trainer.max_epochs)")


def train(argv: Sequence[str] | None = None) -> None:
    """``train.py fit --config ...``: trains a denoiser or a classifier; ``train.py export ...`` writes its network."""
    given = helped(list(sys.argv[1:] if argv is None else argv), TRAIN)
    with guarded() as state:
        if not given or given[0] not in _COMMANDS:
            raise InputError(f"say what to do, one of {', '.join(_COMMANDS)}: fit --config FILE trains")
        command = given.pop(0)
        Parser.configs = check_configs(given)
        parser = _parser(command)
        settings = parser.parse_args(arguments(given))
        folder = state.folder = RunFolder(run_folder(settings, command))
        _check(settings, command, folder)
        config = dump(parser, settings, "ckpt_path", "output", "half")
        for callback in _listed(settings.trainer.callbacks):
            if callback.class_path.endswith(".ModelCheckpoint") and callback.init_args.get("dirpath") is None:
                callback.init_args.dirpath = str(folder.path / "checkpoints")
        place_loggers(settings, folder.path)
        L.seed_everything(settings.seed_everything, workers=True, verbose=False)
        if command == "export":
            # Reads a file and writes one: the devices, loggers and callbacks of the run are not for that.
            settings.trainer = Namespace()  # type: ignore[no-untyped-call]
        try:
            made = parser.instantiate(settings)
        except Exception as error:
            raise unwrapped(error) from error
        if command == "export":
            output = settings.output or folder.path / "model.safetensors"
            export_network(made.model, output, settings.half, settings.ckpt_path)
            return
        if made.data is None:
            raise InputError("no data given: name a datamodule in the configuration, or with --data")
        trainer = _trainer(settings, made, folder)
        if command == "fit":
            _fit(trainer, made.model, made, config, state)
        else:
            state.running = True
            trainer.validate(made.model, datamodule=made.data, ckpt_path=made.ckpt_path)


def _listed(found: Any) -> list[Any]:  # noqa: ANN401
    return found if isinstance(found, list) else [found] if found is not None else []
