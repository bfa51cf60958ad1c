"""The command line: the only place that reads arguments and the environment."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import TorchCheckpointIO

# Imported for their classes: what is imported can be named in a configuration by its short name.
from lit_purify.callbacks import Gallery, Progress, RecordWriter, Report, Stopping, WandbReport, WandbTraining, Watch
from lit_purify.callbacks.checkpoints import WholeCheckpoints
from lit_purify.callbacks.export import ExportingTrainer
from lit_purify.callbacks.html import write_report
from lit_purify.callbacks.watch import leave
from lit_purify.compare import compare
from lit_purify.data import ImageDataModule
from lit_purify.errors import INTERRUPTED, InputError
from lit_purify.help import EVALUATE, TRAIN
from lit_purify.messages import check_checkpoint, check_configs, essence, explanation
from lit_purify.run_folder import RunFolder, comparable, identify
from lit_purify.tasks import FrontierTask, RobustnessTask, TrainingTask
from lit_purify.tasks.audit import AuditingTrainer
from lit_purify.tasks.estimate import EstimatingTrainer
from lit_purify.tasks.frontier import expand
from lit_purify.tasks.own_images import PurifyingTrainer

_DEFAULT_EVALUATION = "configs/eval/digits.yaml"
_DEFAULT_FRONTIER = "configs/eval/digits_frontier.yaml"
_COMMANDS = ("test", "frontier", "gradcheck", "audit", "purify", "predict")
# What a configuration that is written leaves out: the other commands could not read it.
_OF_ONE_COMMAND = ("ckpt_path", "verbose", "weights_only", "samples", "runs", "proposals")
# Noise, levels and masks are drawn and computed in 32 bits.
_PRECISIONS = ("32", "32-true", "bf16-mixed", "16-mixed")


class _Parser(LightningArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            # This one parses a nested class. It raises: the outer parsers add where in the configuration the class
            # stands, or go on with another type that the place accepts.
            super().error(message, ex)
        _fail(essence(message))


class _CLI(LightningCLI):
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
        _quiet()
        self.argv = argv
        self.running = False
        try:
            check_configs(argv)
            super().__init__(
                task,
                ImageDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=None,
                trainer_class=trainer_class,
                parser_class=_Parser,
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
            # Before the run all processes fail alike, and one of them says so. Later each has data of its own.
            _fail(message, every_rank=self.running)
        finally:
            if self.folder is not None:
                self.folder.release()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run", type=str | None, default=None, help="Folder of this run (default: runs/NAME_OF_THE_CONFIG)."
        )
        parser.add_lightning_class_args(Watch, "watch")

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
        for callback in settings.trainer.callbacks or []:
            if callback.class_path.endswith(".ModelCheckpoint") and callback.init_args.get("dirpath") is None:
                callback.init_args.dirpath = str(self.folder.path / "checkpoints")
        loggers = settings.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if hasattr(logger, "init_args") and logger.init_args.get("save_dir") in (None, "."):
                logger.init_args.save_dir = settings.run

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:  # noqa: ANN401
        """Also makes its processes watch each other, if it has several."""
        trainer = super().instantiate_trainer(**kwargs)
        self._get(self.config_init, "watch").attend(trainer)
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


class _EvaluationTrainer(AuditingTrainer, EstimatingTrainer, PurifyingTrainer):
    """A trainer with all commands of ``eval.py``."""


class _EvaluationCLI(_CLI):
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:  # noqa: ANN401
        """Also turns the families of a frontier into the defenses that they stand for."""
        super().parse_arguments(parser, args)
        if self._settings.get("ckpt_path"):
            raise InputError("ckpt_path: an evaluation has its networks from classifier and denoiser: name files there")
        if families := self._settings.model.init_args.get("families"):
            settings = self.config.as_dict()
            settings[self.config.subcommand]["model"]["init_args"]["points"] = expand(families)
            self.config = parser.parse_object(settings)

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        if self.subcommand != "test":
            # Records nothing: whom the run would tell of it is not for that.
            self._settings.trainer.logger = False
        else:
            # The report prints the table; Lightning's own would repeat it.
            self._settings.verbose = False

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that was given: to make the parsers of all takes seconds."""
        return {self.argv[0]: {"model", "dataloaders", "datamodule"}}

    def before_test(self) -> None:
        """What can be refused is refused before a logger writes anything."""
        assert self.folder is not None
        first = self.trainer.is_global_zero
        if first:
            # The data may have to be fetched; the other processes look in their setup.
            self.datamodule.prepare_data()
            self.model.check(self.datamodule)
        self.folder.claim(self.resolved, write=first, data=self.datamodule.names_sha256 if first else None)
        self.running = True

    def before_gradcheck(self) -> None:
        """Its verdict is about the records beside it: with records of other settings the folder is refused."""
        assert self.folder is not None
        assert isinstance(self.trainer, AuditingTrainer)
        self.folder.claim(self.resolved, write=False)
        self.trainer.settings = comparable(identify(yaml.safe_load(self.resolved)))

    def after_gradcheck(self) -> None:
        """The report shows the verdict, if there is one already. Exit status 1 when a check has failed."""
        assert self.folder is not None
        assert isinstance(self.trainer, AuditingTrainer)
        if self.trainer.is_global_zero and self.folder.summary.exists():
            write_report(self.folder)
        if not self.trainer.passed:
            sys.exit(1)

    before_audit, after_audit = before_gradcheck, after_gradcheck

    def before_estimate(self) -> None:
        """As a test, but that nothing is written."""
        assert self.folder is not None
        assert isinstance(self.trainer, EstimatingTrainer)
        self.folder.claim(self.resolved, write=False)
        self.trainer.records = self.folder.collect(write=False)
        self.model.resume(self.trainer.records, count=False)

    def before_purify(self) -> None:
        """What is made states the settings that it was made by."""
        assert isinstance(self.trainer, PurifyingTrainer)
        self.trainer.settings = identify(yaml.safe_load(self.resolved))
        self.running = True

    def after_purify(self) -> None:
        """The configuration lies beside the images."""
        RunFolder(Path(self._settings.output).expanduser()).write_config(self.resolved, write=_rank() == 0)

    before_predict, after_predict = before_purify, after_purify


class _TrainingCLI(_CLI):
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
        """The configuration is written when the first batches have shown that data and networks fit."""

        def place(trainer: L.Trainer, task: L.LightningModule, stage: str) -> None:
            # Before WeightAveraging copies the task: else its average stays on the CPU, and every step waits for that.
            task.to(trainer.strategy.root_device)

        def start(trainer: L.Trainer, task: L.LightningModule) -> None:
            assert self.folder is not None
            if trainer.is_global_zero:
                self.folder.lock()
            self.folder.write_config(self.resolved, write=trainer.is_global_zero)
            self.running = True

        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [LambdaCallback(setup=place, on_train_start=start), *callbacks, WandbTraining()]


def evaluate(argv: Sequence[str] | None = None) -> None:
    """``eval.py``: attacks defenses and reports what survives; no arguments evaluate the embedded digits.

    ``eval.py gradcheck`` checks that attacks differentiate what is defended, ``eval.py audit`` that no other attack is
    stronger than the configured one. ``eval.py frontier`` evaluates families of defenses, and compares them at equal
    clean accuracy. ``eval.py compare`` sets finished evaluations side by side. ``eval.py purify`` and ``predict``
    take people's own images through a defense.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["compare"]:
        try:
            compare(given[1:])
        except InputError as error:
            _fail(str(error))
        return
    given = _helped(given, EVALUATE)
    command = given.pop(0) if given and given[0] in _COMMANDS else "test"
    # An evaluation like any other, of many defenses.
    frontier = command == "frontier"
    command = "test" if frontier else command
    if "--dry_run" in given:
        if command != "test":
            _fail(f"--dry_run goes with test and frontier, not with {command}: leave it out")
        given.remove("--dry_run")
        command = "estimate"
    if not any(word in ("-h", "--help", "-c") or word.split("=")[0] == "--config" for word in given):
        given = ["--config", _DEFAULT_FRONTIER if frontier else _DEFAULT_EVALUATION, *given]
    _EvaluationCLI(
        FrontierTask if frontier else RobustnessTask,
        [command, *given],
        trainer_class=_EvaluationTrainer,
        # An attack differentiates, which Lightning's inference mode forbids.
        inference_mode=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        # Pictures before records: a sample whose record is there is not shown again.
        callbacks=[Stopping(), Gallery(), RecordWriter(), Progress(), Report(), WandbReport()]
        if command == "test"
        else [Stopping(), Progress()],
    )


def train(argv: Sequence[str] | None = None) -> None:
    """``train.py fit --config ...``: trains a denoiser or a classifier; ``train.py export ...`` writes its network."""
    given = _helped(list(sys.argv[1:] if argv is None else argv), TRAIN)
    _TrainingCLI(
        TrainingTask,
        given,
        trainer_class=ExportingTrainer,
        use_distributed_sampler=False,
        enable_progress_bar=sys.stderr.isatty(),
        callbacks=[Stopping()],
    )


def _helped(given: list[str], page: str) -> list[str]:
    """The arguments; when they ask for help, a page that fits a screen is all there is."""
    if "-h" in given or "--help" in given:
        print(page, end="")
        sys.exit(0)
    return ["--help" if word == "--help_all" else word for word in given]


def _fail(message: str, every_rank: bool = False) -> NoReturn:
    rank = _rank()
    if rank == 0 or every_rank:
        print(f"{Path(sys.argv[0]).name}: error: {message}" + (f" [rank {rank}]" if rank else ""), file=sys.stderr)
    sys.stderr.flush()
    sys.exit(2)


def _rank() -> int:
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_PROCID") or 0)


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
        # Of it the loader knows: see data/base.py.
        ".*your dataloader is not resumable.*",
        # Of few samples a process may get none.
        ".*was called before the ``update`` method.*",
        # Metrics are summed over processes already.
        ".*sync_dist=True.*",
    ):
        warnings.filterwarnings("ignore", message=pattern)
