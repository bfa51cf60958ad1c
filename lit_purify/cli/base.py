"""What both command lines share: one run folder, one line for what is wrong."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

# Imported for their classes: what is imported can be named in a configuration by its short name.
from lit_purify.cli.messages import check_checkpoint, check_configs, essence, explanation, lost_connection
from lit_purify.data import ImageDataModule
from lit_purify.errors import INTERRUPTED, InputError
from lit_purify.evaluation.folder import RunFolder
from lit_purify.private import leave, renew_store

# What a configuration that is written leaves out: the other commands could not read it.
_OF_ONE_COMMAND = ("ckpt_path", "verbose", "weights_only", "samples", "runs", "proposals")

_LAUNCHER = 7.0
"""Seconds that a launcher may take to notice that a process has died."""


class Parser(LightningArgumentParser):
    """Says what is wrong in one line."""

    configs: Sequence[dict[str, Any]] = ()
    """What the configuration files hold."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends with that line."""
        if not self.exit_on_error:
            # This one parses a nested class. It raises: the outer parsers add where in the configuration the class
            # stands, or go on with another type that the place accepts.
            super().error(message, ex)
        fail(essence(message, self.configs))


class CommandLine(LightningCLI):
    """One run folder for everything that a run writes."""

    subcommand: str
    resolved: str
    """The configuration with all defaults, YAML."""
    folder: RunFolder | None = None

    def __init__(
        self,
        task: type[L.LightningModule],
        argv: Sequence[str],
        trainer_class: type[L.Trainer] = L.Trainer,
        **defaults: Any,  # noqa: ANN401
    ) -> None:
        quiet()
        self.argv = argv
        self.running = False
        try:
            Parser.configs = check_configs(argv)
            super().__init__(
                task,
                ImageDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=None,
                trainer_class=trainer_class,
                parser_class=Parser,
                parser_kwargs={"allow_abbrev": False},
                seed_everything_default=0,
                trainer_defaults=defaults,
                auto_configure_optimizers=False,
                args=list(argv),
            )
        except SystemExit as stopped:
            # Lightning's for an interrupted run is that of a traceback.
            if isinstance(stopped.__context__, KeyboardInterrupt):
                leave(INTERRUPTED)
            raise
        except Exception as error:
            message = explanation(error, self.folder)
            if message is None:
                # Not the user's to mend: the traceback says more.
                raise
            if lost_connection(error):
                # Launchers look every five seconds: they end this process, and name the one that died.
                time.sleep(_LAUNCHER)
                fail(message, every_rank=True, status=INTERRUPTED)
            # Before the run all processes fail alike, and one of them says so. Later each has data of its own.
            fail(message, every_rank=self.running)
        finally:
            if self.folder is not None:
                self.folder.release()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what belongs to no class of Lightning's."""
        parser.add_argument(
            "--run", type=str | None, default=None, help="Folder of this run (default: runs/NAME_OF_THE_CONFIG)."
        )

    @property
    def _settings(self) -> Any:  # noqa: ANN401
        return self.config[self.config.subcommand]

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:  # noqa: ANN401
        """Also checks what Lightning uses before it makes the classes."""
        super().parse_arguments(parser, args)
        seed, checkpoint = self._settings.seed_everything, self._settings.get("ckpt_path")
        if not 0 <= seed < 2**32:
            raise InputError(f"seed_everything = {seed} is outside 0 .. 2**32 - 1")
        if checkpoint not in (None, "last", "best", "hpc"):
            check_checkpoint(Path(checkpoint))

    def before_instantiate_classes(self) -> None:
        """Points everything that writes to the run's folder."""
        settings = self._settings
        if settings.run is None:
            sources = settings.get("config") or []
            settings.run = str(Path("runs") / (Path(str(sources[-1])).stem if sources else self.subcommand))
            if sweep := os.environ.get("WANDB_SWEEP_ID"):
                # Every combination of a sweep is a run of its own.
                settings.run = str(Path("runs", f"sweep-{sweep}", os.environ["WANDB_RUN_ID"]))
        self.folder = RunFolder(Path(settings.run))
        # Before places in this folder are filled in, which are none of a run that repeats this one in another.
        stated = yaml.safe_load(str(self._parser(self.subcommand).dump(settings, skip_none=False)))
        self.resolved = yaml.safe_dump({k: v for k, v in stated.items() if k not in _OF_ONE_COMMAND}, sort_keys=False)
        settings.trainer.default_root_dir = settings.run
        if "TORCHELASTIC_RUN_ID" in os.environ and settings.trainer.devices == "auto":
            local = int(os.environ["LOCAL_WORLD_SIZE"])
            settings.trainer.devices, settings.trainer.num_nodes = local, int(os.environ["WORLD_SIZE"]) // local
        for callback in settings.trainer.callbacks or []:
            if callback.class_path.endswith(".ModelCheckpoint") and callback.init_args.get("dirpath") is None:
                callback.init_args.dirpath = str(self.folder.path / "checkpoints")
        loggers = settings.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if hasattr(logger, "init_args") and logger.init_args.get("save_dir") in (None, "."):
                logger.init_args.save_dir = settings.run

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:  # noqa: ANN401
        """Also checks that the trainer counts the processes that a launcher has started."""
        renew_store(rank())
        trainer = super().instantiate_trainer(**kwargs)
        launched = int(os.environ.get("WORLD_SIZE", trainer.world_size))
        if launched != trainer.world_size:
            # Each would take itself for the only one.
            raise InputError(
                f"{launched} processes were started (WORLD_SIZE), the trainer has {trainer.world_size}: add "
                f"--trainer.devices {launched} (with several nodes --trainer.num_nodes)"
            )
        return trainer

    def instantiate_classes(self) -> None:
        """Constructors see nothing but the configuration: whatever they raise is about it."""
        try:
            super().instantiate_classes()
        except Exception as error:
            cause: BaseException = error
            while str(cause).startswith("Does not validate against") and cause.__cause__ is not None:
                # jsonargparse takes it for a value of the wrong type.
                cause = cause.__cause__
            if isinstance(cause, (InputError, MisconfigurationException, OSError)):
                raise cause from None
            frame = traceback.extract_tb(cause.__traceback__)[-1]
            raise InputError(
                f"{cause} ({type(cause).__name__} in {Path(frame.filename).name}:{frame.lineno})"
            ) from error


def helped(given: list[str], page: str) -> list[str]:
    """The arguments; when they ask for help, a page that fits a screen is all there is."""
    if "-h" in given or "--help" in given:
        print(page, end="")
        sys.exit(0)
    return ["--help" if word == "--help_all" else word for word in given]


def fail(message: str, every_rank: bool = False, status: int = 2) -> NoReturn:
    """Ends with one line, and exit status 2 for wrong input."""
    own = rank()
    if own == 0 or every_rank:
        print(f"{Path(sys.argv[0]).name}: error: {message}" + (f" [rank {own}]" if own else ""), file=sys.stderr)
    leave(status)


def rank() -> int:
    """Of this process, before torch.distributed knows it."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_PROCID") or 0)


def quiet() -> None:
    """Keeps remarks that no user can act on off the screen."""
    os.environ.setdefault("WANDB_SILENT", "true")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names of files need not be text of the terminal's encoding.
            stream.reconfigure(errors="backslashreplace")
    for name in ("pytorch.utilities.rank_zero", "pytorch.trainer.connectors.checkpoint_connector", "fabric.utilities"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    for pattern in (
        ".*does not have many workers.*",
        ".*deprecat.*",
        ".*isinstance.*treespec.*",
        ".*Checkpoint directory.*",
        # The first of several commands that are the same.
        ".*there is no last checkpoint available.*",
        ".*using a `DistributedSampler`.*",
        ".*args parameter is intended.*",
        ".*smaller than the logging interval.*",
        # Of it the loader knows: see data/base.py.
        ".*your dataloader is not resumable.*",
        # Of few samples a process may get none.
        ".*was called before the ``update`` method.*",
        # Metrics are summed over processes already.
        ".*sync_dist=True.*",
    ):
        warnings.filterwarnings("ignore", message=pattern)
