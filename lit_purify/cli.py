"""The command line: the only place that reads arguments and the environment."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

# Imported for their classes: what is imported can be named in a configuration by its short name.
from lit_purify import attacks, callbacks, data, defense, models, tasks  # noqa: F401
from lit_purify.callbacks import Gallery, Progress, RecordWriter, Report, WandbReport
from lit_purify.data import ImageDataModule
from lit_purify.errors import InputError
from lit_purify.run_folder import RunFolder
from lit_purify.tasks import RobustnessTask, TrainingTask

_DEFAULT_EVALUATION = "configs/eval/digits.yaml"


class _Parser(LightningArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        _fail(_essence(message))


class _CLI(LightningCLI):
    """One run folder for everything that a run writes."""

    subcommand: str

    def __init__(self, task: type[L.LightningModule], argv: Sequence[str], **defaults: Any) -> None:  # noqa: ANN401
        super().__init__(
            task,
            ImageDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            parser_class=_Parser,
            parser_kwargs={"allow_abbrev": False},
            seed_everything_default=0,
            trainer_defaults=defaults,
            auto_configure_optimizers=False,
            args=list(argv),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run", type=str | None, default=None, help="Folder of this run (default: runs/NAME_OF_THE_CONFIG)."
        )

    @property
    def _settings(self) -> Any:  # noqa: ANN401
        return self.config[self.subcommand]

    def before_instantiate_classes(self) -> None:
        """Points everything that writes to the run's folder."""
        settings = self._settings
        if settings.run is None:
            sources = settings.get("config") or []
            settings.run = str(Path("runs") / (Path(str(sources[-1])).stem if sources else self.subcommand))
        self.folder = RunFolder(Path(settings.run))
        settings.trainer.default_root_dir = str(self.folder.path)
        loggers = settings.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if hasattr(logger, "init_args") and logger.init_args.get("save_dir") in (None, "."):
                logger.init_args.save_dir = str(self.folder.path)

    def claim(self) -> None:
        """Writes the configuration into the run's folder, or checks that it agrees with the one there."""
        text = self._parser(self.subcommand).dump(self._settings, skip_none=False)
        self.folder.claim(text, write=_rank() == 0)


class _EvaluationCLI(_CLI):
    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        # The report prints the table; Lightning's own would repeat it.
        self._settings.verbose = False

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"test": {"model", "dataloaders", "datamodule"}}

    def before_test(self) -> None:
        self.claim()


class _TrainingCLI(_CLI):
    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
        }

    def before_fit(self) -> None:
        self.folder.write_config(self._parser(self.subcommand).dump(self._settings, skip_none=False), _rank() == 0)


def evaluate(argv: Sequence[str] | None = None) -> None:
    """``eval.py``: attacks defenses and reports what survives; no arguments evaluate the embedded digits."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] != ["test"]:
        given = ["test", *given]
    if not any(word == "--help" or word == "-h" or word.split("=")[0] == "--config" for word in given):
        given = ["test", "--config", _DEFAULT_EVALUATION, *given[1:]]
    _guard(
        lambda: _EvaluationCLI(
            RobustnessTask,
            given,
            # An attack differentiates, which Lightning's inference mode forbids.
            inference_mode=False,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            callbacks=[RecordWriter(), Gallery(), Progress(), WandbReport(), Report()],
        )
    )


def train(argv: Sequence[str] | None = None) -> None:
    """``train.py fit --config ...``: trains a denoiser or a classifier."""
    given = list(sys.argv[1:] if argv is None else argv)
    _guard(lambda: _TrainingCLI(TrainingTask, given, use_distributed_sampler=False, enable_progress_bar=sys.stderr.isatty()))


def _guard(run: Callable[[], object]) -> None:
    """Turns what the user can mend into one line and exit status 2."""
    _quiet()
    try:
        run()
    except InputError as error:
        _fail(_worker_message(str(error)))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(f"{error.filename or 'the run folder'}: no space left; free some, or choose another folder with --run")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            _fail(f"{error.filename}: no right to write there; choose another folder with --run")
        raise


def _fail(message: str) -> NoReturn:
    if _rank() == 0:
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.stderr.flush()
    sys.exit(2)


def _rank() -> int:
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_PROCID") or 0)


def _worker_message(message: str) -> str:
    """The last line of what a loader's worker process raised, else the message."""
    lines = [line for line in message.splitlines() if line.strip()]
    return re.sub(r"^[\w.]+Error: ", "", lines[-1]) if "Original Traceback" in message else " ".join(lines)


def _essence(message: str) -> str:
    """The one line of a nested parser error that says what to mend."""
    return " ".join(message.split())


def _quiet() -> None:
    """Keeps remarks that no user can act on off the screen."""
    os.environ.setdefault("WANDB_SILENT", "true")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for pattern in (
        ".*does not have many workers.*",
        ".*deprecat.*",
        ".*isinstance.*treespec.*",
        ".*Checkpoint directory.*",
        ".*using a `DistributedSampler`.*",
        ".*args parameter is intended.*",
        ".*smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message=pattern)
