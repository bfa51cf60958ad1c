"""The command line: the only place that reads arguments and the environment."""

from __future__ import annotations

import difflib
import errno
import inspect
import logging
import os
import pydoc
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

# Imported for their classes: what is imported can be named in a configuration by its short name.
from lit_purify import attacks, callbacks, data, defense, models, tasks
from lit_purify.callbacks import Gallery, Progress, RecordWriter, Report, WandbReport
from lit_purify.data import ImageDataModule
from lit_purify.defense import Purifier
from lit_purify.errors import InputError
from lit_purify.run_folder import RunFolder
from lit_purify.tasks import RobustnessTask, TrainingTask

_DEFAULT_EVALUATION = "configs/eval/digits.yaml"


class _Parser(LightningArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            # This one parses a nested class. It raises: the outer parsers add where in the configuration the class
            # stands, or go on with another type that the place accepts.
            super().error(message, ex)
        _fail(_essence(message))


class _CLI(LightningCLI):
    """One run folder for everything that a run writes."""

    subcommand: str

    def __init__(self, task: type[L.LightningModule], argv: Sequence[str], **defaults: Any) -> None:  # noqa: ANN401
        _quiet()
        self.folder: RunFolder | None = None
        self.running = False
        try:
            _check_configs(argv)
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
        except Exception as error:
            message = _explanation(error, self.folder)
            if message is None:
                # Not the user's to mend: the traceback says more.
                raise
            # Before the run all processes fail alike, and one of them says so. Later each has data of its own.
            _fail(message, every_rank=self.running)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
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
            _check_checkpoint(Path(checkpoint))

    def before_instantiate_classes(self) -> None:
        """Points everything that writes to the run's folder."""
        settings = self._settings
        if settings.run is None:
            sources = settings.get("config") or []
            settings.run = str(Path("runs") / (Path(str(sources[-1])).stem if sources else self.subcommand))
        self.folder = RunFolder(Path(settings.run))
        settings.trainer.default_root_dir = settings.run
        loggers = settings.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if hasattr(logger, "init_args") and logger.init_args.get("save_dir") in (None, "."):
                logger.init_args.save_dir = settings.run

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

    @property
    def resolved(self) -> str:
        """The configuration with all defaults, YAML."""
        return str(self._parser(self.subcommand).dump(self._settings, skip_none=False))


class _EvaluationCLI(_CLI):
    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        # The report prints the table; Lightning's own would repeat it.
        self._settings.verbose = False

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"test": {"model", "dataloaders", "datamodule"}}

    def before_test(self) -> None:
        """What can be refused is refused before a logger writes anything."""
        assert self.folder is not None
        first = _rank() == 0
        if first:
            # The data may have to be fetched; the other processes look in their setup.
            self.datamodule.prepare_data()
            self.model.check(self.datamodule)
        self.folder.claim(self.resolved, write=first)
        self.running = True


class _TrainingCLI(_CLI):
    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
        }

    def before_fit(self) -> None:
        """The configuration is written when the first batches have shown that data and networks fit."""

        def start(trainer: L.Trainer, task: L.LightningModule) -> None:
            assert self.folder is not None
            self.folder.write_config(self.resolved, write=trainer.is_global_zero)
            self.running = True

        self.trainer.callbacks.insert(0, LambdaCallback(on_train_start=start))  # type: ignore[attr-defined]


def evaluate(argv: Sequence[str] | None = None) -> None:
    """``eval.py``: attacks defenses and reports what survives; no arguments evaluate the embedded digits."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] != ["test"]:
        given = ["test", *given]
    if not any(word in ("-h", "--help", "-c") or word.split("=")[0] == "--config" for word in given):
        given = ["test", "--config", _DEFAULT_EVALUATION, *given[1:]]
    _EvaluationCLI(
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


def train(argv: Sequence[str] | None = None) -> None:
    """``train.py fit --config ...``: trains a denoiser or a classifier."""
    given = list(sys.argv[1:] if argv is None else argv)
    _TrainingCLI(TrainingTask, given, use_distributed_sampler=False, enable_progress_bar=sys.stderr.isatty())


def _fail(message: str, every_rank: bool = False) -> NoReturn:
    rank = _rank()
    if rank == 0 or every_rank:
        print(f"{Path(sys.argv[0]).name}: error: {message}" + (f" [rank {rank}]" if rank else ""), file=sys.stderr)
    sys.stderr.flush()
    sys.exit(2)


def _rank() -> int:
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_PROCID") or 0)


def _check_configs(argv: Sequence[str]) -> None:
    """Names the file that is at fault; the parser's messages do not."""
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        name, _, value = word.partition("=")
        path = Path(value or following)
        if name not in ("-c", "--config") or path.suffix not in (".yaml", ".yml", ".json"):
            continue
        if not path.is_file():
            raise InputError(f"{path}: no such configuration; name another with --config")
        try:
            found = yaml.safe_load(path.read_text())
        except yaml.MarkedYAMLError as error:
            where = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
            raise InputError(f"{path}: not valid YAML: {where}{error.problem}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not a text file of YAML: is it a configuration?") from error
        if not isinstance(found, dict):
            raise InputError(f"{path}: holds no settings (key: value lines): is it a configuration?")


def _check_checkpoint(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; check ckpt_path")
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    # The unpickler fails in many ways on what is not a checkpoint.
    except Exception as error:
        raise InputError(f"{path}: refused, it is not a checkpoint that train.py saved (.ckpt)") from error


def _explanation(error: Exception, folder: RunFolder | None) -> str | None:
    """One line about what a user can mend, ``None`` about anything else."""
    if isinstance(error, (InputError, MisconfigurationException)):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # A worker process of a loader adds its traceback, with the message at its end.
        return re.sub(r"^[\w.]+Error: ", "", lines[-1]) if "Original Traceback" in str(error) else " ".join(lines)
    place = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if isinstance(error, (TypeError, ValueError)) and place.is_relative_to(Path(L.__file__).parent):
        # Lightning refuses a combination of settings.
        return " ".join(str(error).split())
    if isinstance(error, RuntimeError) and str(error).startswith("Error(s) in loading state_dict"):
        return "ckpt_path: the checkpoint is of another network than the one configured"
    if isinstance(error, RuntimeError) and re.search("by peer|remote process exited", str(error)):
        return "another process of this run ended; its own message says why"
    if not isinstance(error, OSError):
        return None
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if folder is None or (error.filename is None and not full):
        return " ".join(str(error).split())
    # A write into an open file does not name it: it is one of the run's own.
    path, run = Path(error.filename or folder.path), folder.path.absolute()
    own = path.absolute().is_relative_to(run) or run.is_relative_to(path.absolute())
    reason = "no space left" if full else str(error.strerror).lower()
    return f"{path}: {reason}; {'choose another folder with --run' if own else 'check the path'}"


_CALLABLE = re.compile(
    r"Type collections\.abc\.Callable\[.*?\] expects a function or a callable class: ((?s:.*?))"
    r"\. Got value: Namespace\((?:class_path='([\w.]+)'.*|.*class_path='([\w.]+)'\))$",
    re.MULTILINE,
)
_NO_CLASS = r"Not a valid subclass|Dict must include|.*(subclass spec|codec can't decode|has no attribute)"
"""What is said when something stands where a class is due; of a path given there, it is tried to read the file."""
_NO_REASON = re.compile(
    r"Does not validate|Subtypes:|Errors:|Given value|Expected an? (<class '[\w.]+'>|[\w.]+\[.*\])$|Expected a path but"
    rf"|Problem with given class_path|Subclass types expect|an? (class|dict) |$|{_NO_CLASS}"
)
"""Lines of a parser error that say how it was reached, or which other types a value is not of."""


def _essence(message: str) -> str:
    """The one line of a nested parser error that says what to mend.

    jsonargparse tells how it went down into the configuration (``Parser key "model": ... Problem with given class_path
    ...: ...``), tries every type that a place accepts, and repeats the value at each level. What helps is the keys on
    the way and the reason at its end.
    """
    keys = list(dict.fromkeys(re.findall(r'Parser key "([\w.]+)"', message)))
    flags = re.findall(r"Given value: NestedArg\(key='([\w.]+)'", message)
    # A flag is repeated at each level as well; the outermost stands last and has the whole name.
    place = f"{keys[0]}.init_args.{flags[-1]}" if keys and flags else ".".join(keys)
    at = f"{place}: " if place else ""
    message = re.sub(r'Parser key "[\w.]+":', "", message)
    # A purifier is made by a function, about whose class_path the message is worded differently.
    message = _CALLABLE.sub(lambda m: f"Problem with given class_path '{m[2] or m[3]}':\n{m[1]}", message)
    message = re.sub(r"Type collections\.abc\.Callable\[.*?callable class: ", "", message)

    if m := re.search(r'"subcommand" to be one of \{(.+?)\}', message):
        return f"say what to do, one of {m[1]}: fit --config FILE trains"
    if m := re.search(r"unrecognized arguments: ([^\s=]+)|does not accept option '(.+)'", message):
        if m[1] and not m[1].startswith("-"):
            return f"unexpected argument {m[1]}; settings are given as --NAME VALUE"
        name = (m[1] or m[2]).removeprefix("--")
        return f"there is no setting {name}; {_nearest(name, _SETTINGS) or '--help lists all'}"
    if m := re.search(r"class_path '([\w.]+)':\s+Option '(.+)' is not accepted", message):
        options = _options(m[1])
        return f"{at}{_last(m[1])} has no option {m[2]}; {_nearest(m[2], options) or 'it has ' + ', '.join(options)}"
    if m := re.search(r"(?:class_path '([\w.]+)':\s+)?the following arguments are required: (.+)", message):
        if m[1]:
            return f"{at}{_last(m[1])} needs {m[2]}"
        return f"no {re.sub('(fit|test|validate)[.]', '', m[2])} given: name a configuration with --config"
    if m := re.search(r"Expected a dot import path string: (.+)", message):
        if m[1] in _CLASSES:
            return f"{at}{m[1]} is of another kind than is needed here"
        return f"{at}there is no class {m[1]}; {_nearest(m[1], _CLASSES) or 'classes of others need their full path'}"
    if m := re.search(r"module '(.+)' has no attribute '(\w+)'|(No module named '.+')", message):
        near = _nearest(m[2], dir(pydoc.locate(m[1]))) if m[1] else ""
        return f"{at}{m[3] or f'there is no {m[2]} in {m[1]}'}; {near or 'check class_path'}"
    reasons = [line for text in message.splitlines() if not _NO_REASON.match(line := text.strip(" -"))]
    if reasons:
        return at + _tidy(reasons[0])
    if re.search(_NO_CLASS, message):
        return f"{at}a class is needed: give its class_path and init_args"
    # No type of a union fits: the innermost union is the last that lists its types, and the first that ends.
    types = re.findall(r"Subtypes: \[(.+)\]$", message, re.MULTILINE)
    values = re.findall(r"Given value: (.+)$", message, re.MULTILINE)
    return at + _tidy(f"Expected a {types[-1]}. Got value: {values[0]}" if types and values else message)


_CLASSES = [name for module in (attacks, callbacks, data, defense, models, tasks) for name in module.__all__]
_SETTINGS = ["config", "run", "seed_everything", "ckpt_path", "model", "data", "trainer"]
_SETTINGS += [f"trainer.{name}" for name in inspect.signature(L.Trainer).parameters]


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _tidy(text: str) -> str:
    """Types as people write them."""
    text = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", text)
    text = re.sub(r"typing\.Literal\[(.*?)\]", r"\1", text)
    if m := re.search(r"Expected an? (.+)\. Got value: (.+)", text):
        return f"expected {m[1].replace(', ', ' or ').replace('NoneType', 'null')}; got {m[2]}"
    return " ".join(text.split())


def _options(class_path: str) -> list[str]:
    """What a configuration can give to a class or function."""
    made: Any = pydoc.locate(class_path)
    names = inspect.signature(made).parameters
    # A task makes its purifiers for its networks.
    given = {"denoiser", "classifier"} if inspect.isclass(made) and issubclass(made, Purifier) else set()
    return [name for name in names if name not in given]


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else ""


def _quiet() -> None:
    """Keeps remarks that no user can act on off the screen."""
    os.environ.setdefault("WANDB_SILENT", "true")
    for name in ("pytorch.utilities.rank_zero", "fabric.utilities"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    for pattern in (
        ".*does not have many workers.*",
        ".*deprecat.*",
        ".*isinstance.*treespec.*",
        ".*Checkpoint directory.*",
        ".*using a `DistributedSampler`.*",
        ".*args parameter is intended.*",
        ".*smaller than the logging interval.*",
        # Metrics are summed over processes already.
        ".*sync_dist=True.*",
    ):
        warnings.filterwarnings("ignore", message=pattern)
