"""The command line of ``eval.py``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from lit_purify.callbacks import Gallery, Progress, RecordWriter, Report, Stopping, WandbReport
from lit_purify.checks.audit import AuditingTrainer
from lit_purify.cli.base import CommandLine, fail, helped, rank
from lit_purify.cli.compare import compare
from lit_purify.cli.help import EVALUATE
from lit_purify.cli.messages import COMMANDS
from lit_purify.errors import InputError
from lit_purify.evaluation import FrontierTask, RobustnessTask
from lit_purify.evaluation.estimate import EstimatingTrainer
from lit_purify.evaluation.folder import RunFolder, comparable, identify
from lit_purify.evaluation.frontier import expand
from lit_purify.evaluation.own_images import PurifyingTrainer
from lit_purify.report.html import write_report

_DEFAULT_EVALUATION = "configs/eval/digits.yaml"
_DEFAULT_FRONTIER = "configs/eval/digits_frontier.yaml"


class _EvaluationTrainer(AuditingTrainer, EstimatingTrainer, PurifyingTrainer):
    """A trainer with all commands of ``eval.py``."""


class _EvaluationCLI(CommandLine):
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
        """The configuration lies beside the images. Exit status 1 when some of them could not be read."""
        assert isinstance(self.trainer, PurifyingTrainer)
        RunFolder(Path(self._settings.output).expanduser()).write_config(self.resolved, write=rank() == 0)
        if self.trainer.unreadable:
            sys.exit(1)

    before_predict, after_predict = before_purify, after_purify


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
            fail(str(error))
        return
    given = helped(given, EVALUATE)
    command = given.pop(0) if given and given[0] in COMMANDS else "test"
    # An evaluation like any other, of many defenses.
    frontier = command == "frontier"
    command = "test" if frontier else command
    if "--dry_run" in given:
        if command != "test":
            fail(f"--dry_run goes with test and frontier, not with {command}: leave it out")
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
