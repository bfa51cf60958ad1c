"""The command line of ``eval.py``: a shell around what notebooks call."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse import Namespace

from lit_purify.attacks import Attack
from lit_purify.callbacks import Gallery, Progress, RecordWriter, Report, Stopping, WandbReport
from lit_purify.checks.audit import audit_attack
from lit_purify.checks.findings import Findings
from lit_purify.checks.gradcheck import check_gradients
from lit_purify.cli.common import fail, guarded, helped, rank
from lit_purify.cli.compare import compare
from lit_purify.cli.help import EVALUATE
from lit_purify.cli.messages import COMMANDS
from lit_purify.cli.settings import (
    Parser,
    dump,
    evaluation_parser,
    instantiated,
    make_trainer,
    place_loggers,
    read,
    run_folder,
)
from lit_purify.data import ImageDataModule
from lit_purify.errors import InputError
from lit_purify.evaluation import Evaluator, RobustnessTask
from lit_purify.evaluation.estimate import Estimate
from lit_purify.evaluation.folder import RunFolder, comparable
from lit_purify.evaluation.own_files import Existing
from lit_purify.evaluation.own_images import purify_files
from lit_purify.evaluation.records import identity_sha256, write_whole
from lit_purify.report.html import write_report

_DEFAULTS = {"frontier": "configs/eval/digits_frontier.yaml"}
_DEFAULT = "configs/eval/digits.yaml"


class Evaluation:
    """What a configuration describes: networks, defenses, attacks and data, made and checked.

    Args:
        settings: Of the parser.
        made: The same with its classes made.
        config: The resolved configuration, YAML.
    """

    def __init__(self, settings: Namespace, made: Namespace, config: str, folder: RunFolder) -> None:
        self.config, self.folder, self.settings = config, folder, settings
        self.data: ImageDataModule = made.data
        self.gallery: int = made.gallery
        denoiser = None if made.denoiser is None else made.denoiser.eval()
        self.evaluator = Evaluator(
            made.classifier.eval(),
            {name: _defense(name, make, denoiser) for name, make in made.defenses.items()},
            made.attacks,
            made.gradients,
            made.baseline,
            made.runs,
            made.chunk,
            made.seed,
            made.skip_lost,
        )
        self.trainer_arguments: dict[str, Any] = vars(made.trainer)

    @property
    def identity(self) -> dict[str, Any]:
        """What the records depend on."""
        precision = str(self.trainer_arguments.get("precision"))
        stated = {} if precision in ("None", "32", "32-true") else {"precision": precision}
        return self.evaluator.identity() | self.data.identity() | stated

    def prepare(self) -> None:
        """Fetches and reads the data; refuses what does not fit."""
        self.data.prepare_data()
        self.evaluator.check(self.data.evaluated)

    def trainer(self, *callbacks: L.Callback, logged: bool) -> L.Trainer:
        """A trainer for the evaluation."""
        given = self.trainer_arguments | ({} if logged else {"logger": False})
        return make_trainer(
            given,
            callbacks=[*callbacks, *(given.get("callbacks") or [])],
            default_root_dir=str(self.folder.path),
            # An attack differentiates, which Lightning's inference mode forbids.
            inference_mode=False,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def device(self) -> torch.device:
        """Where a command of one process runs."""
        chosen = str(self.trainer_arguments.get("accelerator", "auto"))
        cuda = chosen in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        if chosen in ("gpu", "cuda") and not cuda:
            raise InputError(f"trainer.accelerator = {chosen}: torch finds none; take cpu, or leave it out")
        return torch.device("cuda" if cuda else "cpu")


def _defense(name: str, make: Any, denoiser: Any) -> Any:  # noqa: ANN401
    if isinstance(make, torch.nn.Module):
        return make
    try:
        return make(denoiser)
    except InputError as error:
        raise InputError(f"defenses.{name}: {error}") from error
    except AttributeError as error:
        if denoiser is None:
            raise InputError(f"defenses.{name}: a purifier needs a denoiser: set one, by its path or class") from error
        raise


def test(evaluation: Evaluation) -> None:
    """Attacks every defense, and writes records, summary and report."""
    callbacks = Stopping(), Gallery(), RecordWriter(), Progress(), Report(), WandbReport()
    # Pictures before records: a sample whose record exists is not shown again.
    trainer = evaluation.trainer(*callbacks, logged=True)
    if trainer.is_global_zero:
        # The data may have to be fetched; the other processes look in their setup.
        evaluation.prepare()
        evaluation.folder.claim(evaluation.identity, evaluation.config, write=True)
    task = RobustnessTask(evaluation.evaluator, evaluation.gallery)
    trainer.test(task, datamodule=evaluation.data, verbose=False)


def estimate(evaluation: Evaluation) -> None:
    """Measures what the evaluation will cost, and writes nothing."""
    evaluation.prepare()
    folder, data, device = evaluation.folder, evaluation.data, evaluation.device()
    done = {record.key for record in folder.collect(write=False)}
    if done and (found := folder.differences(evaluation.identity)):
        print(f"{folder.path} holds a run with other settings ({found}): its records do not count")
        done = set()
    processes = evaluation.trainer(logged=False).world_size
    print(f"{data.name} ({data.evaluate_on}), {len(data.evaluated)} samples, {evaluation.evaluator.runs} runs each")
    measured = Estimate(evaluation.evaluator.to(device), data.evaluated, data.batch_size, done, processes)
    print(f"{measured}\nNothing was written.")


def check(evaluation: Evaluation, command: Literal["gradcheck", "audit"], options: Namespace) -> bool:
    """Checks the defenses, and writes ``gradcheck.json`` or ``audit.json``; returns whether they passed."""
    evaluation.prepare()
    evaluator, folder, data = evaluation.evaluator, evaluation.folder, evaluation.data
    # The verdict is about the records beside it: with records of other settings the folder is refused.
    folder.claim(evaluation.identity, None, write=False)
    device = evaluation.device()
    evaluator.to(device)

    def say(line: str) -> None:
        print(line, flush=True)

    count = min(options.samples, len(data.evaluated))
    if command == "gradcheck":
        say(f"Gradients of {count} samples of {data.name} ({data.evaluate_on})")
        found = check_gradients(evaluator.defenses, data.evaluated, options.samples, evaluator.seed, device, say)
    else:
        name, attack = _followed(evaluator.attacks)
        say(f"Audit of {name} ({attack.title}, eps {attack.eps:.4g}) on {count} samples of {data.name}")
        views = {defense: evaluator.views[defense, name] for defense in evaluator.defenses}
        found = audit_attack(
            views,
            attack,
            data.evaluated,
            options.samples,
            options.audit_runs,
            options.proposals,
            evaluator.seed,
            evaluator.chunk,
            device,
            say,
        )
        found.facts = {"attack": name, **found.facts}
    _write_verdict(evaluation, command, found)
    print(f"{command}: {found.conclusion}")
    return found.passed


def _followed(attacks: Mapping[str, Attack]) -> tuple[str, Attack]:
    """The first attack that follows a gradient of the defense."""
    usable = [(name, a) for name, a in attacks.items() if (a.gradient, a.target) == ("exact", "defense")]
    if not usable:
        names = ", ".join(attacks)
        raise InputError(f"attacks: none of {names} follows a gradient of the defense: add one, such as PGD")
    return usable[0]


def _write_verdict(evaluation: Evaluation, command: str, found: Findings) -> None:
    data, folder = evaluation.data, evaluation.folder
    about = {"dataset": data.name, "split": data.evaluate_on}
    digest = identity_sha256(comparable(evaluation.identity))
    folder.path.mkdir(parents=True, exist_ok=True)
    content = {**found.json(), **about, "settings_sha256": digest}
    write_whole(folder.path / f"{command}.json", json.dumps(content, indent=1) + "\n")
    if folder.summary.exists():
        write_report(folder)


def purify(evaluation: Evaluation, command: Literal["purify", "predict"], options: Namespace) -> bool:
    """Takes people's own images through a defense; returns whether all could be read."""
    trainer = evaluation.trainer(Stopping(), Progress(), logged=False)
    return purify_files(
        evaluation.evaluator,
        evaluation.data,
        trainer,
        options.input,
        options.output,
        options.defense,
        options.existing,
        options.overlays,
        classify=command == "predict",
        config=evaluation.config,
    )


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
    dry = "--dry_run" in given
    if dry and command not in ("test", "frontier"):
        fail(f"--dry_run goes with test and frontier, not with {command}: leave it out")
    given = [word for word in given if word != "--dry_run"]
    if (dry or command in ("gradcheck", "audit")) and rank() != 0:
        # These run once: the first process speaks for all.
        return
    with guarded() as state:
        if not any(word.partition("=")[0] in ("--help", "--config") for word in given):
            if command in ("purify", "predict"):
                raise InputError(f"{command}: name a configuration, whose networks and size are used: --config FILE")
            given = ["--config", _DEFAULTS.get(command, _DEFAULT), *given]
        parser = evaluation_parser()
        _add_options(parser, command)
        settings = read(given, parser)
        folder = state.folder = RunFolder(run_folder(settings, command))
        config = dump(parser, settings, *_OPTIONS)
        place_loggers(settings, folder.path)
        evaluation = Evaluation(settings, instantiated(parser, settings), config, folder)
        # Before the run all processes fail alike, and one of them says so. Later each has data of its own.
        state.running = good = True
        if dry:
            estimate(evaluation)
        elif command in ("gradcheck", "audit"):
            good = check(evaluation, command, settings)  # type: ignore[arg-type]
        elif command in ("purify", "predict"):
            good = purify(evaluation, command, settings)  # type: ignore[arg-type]
        else:
            test(evaluation)
        if not good:
            sys.exit(1)


_OPTIONS = ("samples", "audit_runs", "proposals", "input", "output", "defense", "existing", "overlays")


def _add_options(parser: Parser, command: str) -> None:
    """What belongs to one command."""
    add: Callable[..., Any] = parser.add_argument
    if command in ("gradcheck", "audit"):
        count = {"gradcheck": 4, "audit": 32}[command]
        add("--samples", type=int, default=count, help="How many of the evaluated samples, from the first.")
    if command == "audit":
        add("--audit_runs", type=int, default=8, help="Runs of each image.")
        add("--proposals", type=int, default=100, help="Steps of the black-box attack.")
    if command in ("purify", "predict"):
        add("--input", type=Path, required=True, help="A folder of images at any depth, or one image.")
        add("--output", type=Path, required=True, help="The folder to write; subfolders are kept.")
        add("--defense", type=str | None, default=None, help="Name of the defense (default: the first with a mask).")
        add("--existing", type=Existing, default="refuse", help="skip goes on, replace writes anew what was made here.")
        add("--overlays", type=bool, default=True, help="Write NAME.mask.png and NAME.overlay.png too.")
