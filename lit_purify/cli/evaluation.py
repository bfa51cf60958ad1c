"""The command line of ``eval.py``."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace

from lit_purify.atomic import write_whole
from lit_purify.attacks import Attack
from lit_purify.callbacks import Progress, RunWriter, Stopping, WandbReport
from lit_purify.checks.audit import CHECKS, audit_attack
from lit_purify.checks.audited import Counted
from lit_purify.checks.findings import Findings, Memory
from lit_purify.checks.gradcheck import check_gradients, first_samples
from lit_purify.cli import settings as reading
from lit_purify.cli.common import State, fail, guarded, helped, rank
from lit_purify.cli.messages import COMMANDS
from lit_purify.data import ImageDataModule
from lit_purify.errors import InputError, notice
from lit_purify.evaluation import Evaluator, RobustnessTask
from lit_purify.evaluation.estimate import Estimate, chunk_seconds, duration
from lit_purify.evaluation.folder import RunFolder, comparable
from lit_purify.evaluation.own_images import purify_files
from lit_purify.evaluation.records import identity_sha256
from lit_purify.private import settings_of
from lit_purify.report.comparison import GENERATOR, Comparison
from lit_purify.report.html import write_report

_CONFIGS = {"frontier": "configs/eval/digits_frontier.yaml"}
_CONFIG = "configs/eval/digits.yaml"
_print = partial(print, flush=True)


class Evaluation:
    """The objects of a configuration: networks, defenses, attacks and data."""

    def __init__(self, made: Namespace, config: str, folder: RunFolder) -> None:
        self.config, self.folder, self.gallery, self.data = config, folder, made.gallery, made.data
        assert isinstance(self.data, ImageDataModule)
        denoiser = None if made.denoiser is None else made.denoiser.eval()
        defenses = {name: _defense(name, make, denoiser) for name, make in made.defenses.items()}
        named = {name: made[name] for name in inspect.signature(Evaluator).parameters}
        self.evaluator = Evaluator(**named | {"classifier": made.classifier.eval(), "defenses": defenses})
        self.trainer_settings: dict[str, Any] = vars(made.trainer)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that records depend on."""
        return self.evaluator.identity() | self.data.identity()

    def prepare(self) -> None:
        """Fetches and reads the data; raises an ``InputError`` if data, networks and attacks do not match."""
        self.data.prepare_data()
        self.evaluator.check(self.data.evaluated)

    def trainer(self, *callbacks: L.Callback, **changes: Any) -> L.Trainer:  # noqa: ANN401
        """A trainer for the evaluation, with additional callbacks and changed settings."""
        return reading.make_trainer(
            self.trainer_settings | changes,
            callbacks=[*callbacks, *(self.trainer_settings.get("callbacks") or [])],
            default_root_dir=str(self.folder.path),
            # Attacks need gradients, which inference mode forbids.
            inference_mode=False,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def moved(self) -> torch.device:
        """Moves the networks to the device of a single-process command, and returns it."""
        chosen = str(self.trainer_settings.get("accelerator", "auto"))
        cuda = chosen in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        if chosen in ("gpu", "cuda") and not cuda:
            raise InputError(f"trainer.accelerator = {chosen}: torch finds no GPU; use cpu, or leave it out")
        device = torch.device("cuda" if cuda else "cpu")
        self.evaluator.to(device)
        return device


def _defense(name: str, make: Any, denoiser: Any) -> Any:  # noqa: ANN401
    try:
        return make if isinstance(make, torch.nn.Module) else make(denoiser)
    except InputError as error:
        raise InputError(f"defenses.{name}: {error}") from error
    except AttributeError as error:
        if denoiser is None:
            raise InputError(f"defenses.{name}: a purifier needs a denoiser: name its path or class") from error
        raise


def _test(evaluation: Evaluation) -> None:
    """Attacks every defense, and writes records, summary and report."""
    trainer = evaluation.trainer(Stopping(), Progress(), RunWriter(), WandbReport())
    if trainer.is_global_zero:
        # Rank 0 fetches the data first; the other ranks check it in setup.
        evaluation.prepare()
        evaluation.folder.claim(evaluation.identity, evaluation.config, write=True)
    task = RobustnessTask(evaluation.evaluator, evaluation.gallery)
    trainer.test(task, datamodule=evaluation.data, verbose=False)


def _estimate(evaluation: Evaluation) -> None:
    """Prints the expected cost of the evaluation; writes nothing."""
    evaluation.prepare()
    evaluation.moved()
    folder, data, evaluator = evaluation.folder, evaluation.data, evaluation.evaluator
    done = {record.key for record in folder.collect(write=False)}
    if done and (found := folder.differences(evaluation.identity)):
        print(f"{folder.path} holds a run with other settings ({found}): its records are ignored")
        done = set()
    print(f"{data.name} ({data.evaluate_on}), {len(data.evaluated)} samples, {evaluator.runs} runs each")
    processes = evaluation.trainer(logger=False).world_size
    print(Estimate(evaluator, data.evaluated, data.batch_size, done, processes))
    print("Nothing was written.")


def _followed(evaluator: Evaluator) -> tuple[str, Attack]:
    """The first attack that follows a gradient of the defense."""
    for name, attack in evaluator.attacks.items():
        if (attack.gradient, attack.target) == ("exact", "defense"):
            return name, attack
    names = ", ".join(evaluator.attacks)
    raise InputError(f"attacks: none of {names} follows a gradient of the defense: add one, such as PGD")


def _estimate_audit(evaluation: Evaluation, options: Namespace) -> None:
    """Prints the expected cost of the audit: its queries, times the measured time of a chunk; writes nothing."""
    evaluation.prepare()
    device, evaluator, data = evaluation.moved(), evaluation.evaluator, evaluation.data.evaluated
    name, attack = _followed(evaluator)
    image, label, index = first_samples(data, options.samples, device)
    samples, rows, total = len(index), min(32, evaluator.chunk), 0.0
    for defense in evaluator.defenses:
        view = evaluator.views[defense, name]
        about = image, label, index, 0, options.audit_runs, evaluator.chunk, options.proposals, data.domain
        cost = Counted(defense, view, attack, *about)
        list(cost.findings(CHECKS))
        each, differentiated = (
            chunk_seconds(view.function, image[:1], label[:1], rows, follow) for follow in (False, True)
        )
        seconds = samples * ((cost.forward - cost.backward) * each + cost.backward * differentiated) / rows
        calls, total = f"{cost.forward * view.nfe:,d} network calls a sample", total + seconds
        _print(f"{defense:14}  {calls}, {cost.backward * view.nfe:,d} of them differentiated, {duration(seconds)}")
    _print(f"Expected: {duration(total)} on {samples} samples\nNothing was written.")


def _check(evaluation: Evaluation, command: str, options: Namespace) -> bool:
    """Runs gradcheck or audit, writes its JSON file, and returns whether all checks passed."""
    evaluation.prepare()
    evaluator, folder, data = evaluation.evaluator, evaluation.folder, evaluation.data
    # The verdict must belong to the records in the folder.
    folder.claim(evaluation.identity, None, write=False)
    device, seed = evaluation.moved(), evaluator.seed
    count = min(options.samples, len(data.evaluated))
    if command == "gradcheck":
        _print(f"Gradients of {count} sample{'s' * (count > 1)} of {data.name} ({data.evaluate_on})")
        further = options.checks
        found = check_gradients(evaluator.defenses, data.evaluated, options.samples, seed, device, _print, further)
    else:
        name, attack = _followed(evaluator)
        _print(
            f"Audit of {name} ({attack.title}, eps {attack.eps:.4g}), {count} sample{'s' * (count > 1)} of {data.name}"
        )
        views = {defense: evaluator.views[defense, name] for defense in evaluator.defenses}
        counts = options.samples, options.audit_runs, options.proposals
        about = json.dumps([comparable(evaluation.identity), name, *counts, evaluator.chunk], sort_keys=True)
        memory = Memory(folder.path / "audit.partial.jsonl", hashlib.sha256(about.encode()).hexdigest())
        if memory.known:
            _print(f"{memory.path}: resumes after {len(memory.known)} comparisons")
        found = audit_attack(views, attack, data.evaluated, *counts, seed, evaluator.chunk, device, _print, memory)
        found.facts = {"attack": name, **found.facts}
        memory.path.unlink()
    _write_verdict(evaluation, command, found)
    print(f"{command}: {found.conclusion}")
    return found.passed


def _write_verdict(evaluation: Evaluation, command: str, found: Findings) -> None:
    data, folder = evaluation.data, evaluation.folder
    about = {"dataset": data.name, "split": data.evaluate_on}
    content = {**found.json(), **about, "settings_sha256": identity_sha256(comparable(evaluation.identity))}
    write_whole(folder.path / f"{command}.json", json.dumps(content, indent=1) + "\n")
    if folder.summary.exists():
        write_report(folder)


def _purify(evaluation: Evaluation, command: str, options: Namespace) -> bool:
    """Purifies or classifies your own images; returns whether all files could be read."""
    trainer = evaluation.trainer(Stopping(), Progress(), logger=False)
    chosen = {name: options[name] for name in ("output", "defense", "overlays")}
    chosen |= {"classify": command == "predict", "config": evaluation.config}
    return purify_files(evaluation.evaluator, evaluation.data, trainer, options.input, **chosen)


def evaluate(argv: Sequence[str] | None = None) -> None:
    """Runs ``eval.py``; without arguments it evaluates the embedded digits.

    Args:
        argv: Command and flags, see ``--help``; ``None`` uses the arguments of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    words = helped(words, "eval")
    if words[:1] == ["compare"]:
        with guarded():
            return _compare(words[1:]) if rank() == 0 else None
    command = words.pop(0) if words and words[0] in COMMANDS else "test"
    dry = "--dry_run" in words
    if dry and command not in ("test", "frontier", "audit"):
        fail(f"--dry_run works with test, frontier and audit, not with {command}: leave it out")
    if (dry or command in ("gradcheck", "audit")) and rank() != 0:
        # These commands run on rank 0 only.
        return None
    with guarded() as state:
        _run(command, dry, [word for word in words if word != "--dry_run"], state)


def _run(command: str, dry: bool, words: list[str], state: State) -> None:
    if not any(word.partition("=")[0] in ("--help", "--config") for word in words):
        if command in ("purify", "predict"):
            raise InputError(f"{command}: name a configuration with the networks to use: --config FILE")
        words = ["--config", _CONFIGS.get(command, _CONFIG), *words]
    parser = reading.evaluation_parser()
    own = _add_options(parser, command)
    settings = reading.read(words, parser)
    folder = state.folder = RunFolder(reading.run_folder(settings, command))
    config = reading.dump(parser, settings, *own)
    reading.place_loggers(settings, folder.path)
    evaluation = Evaluation(reading.instantiated(parser, settings), config, folder)
    if command == "frontier" and evaluation.data.evaluate_on == "test":
        notice(
            "warning: the best of many points on the test split is optimistic: choose on val (--data.evaluate_on val)"
        )
    # Until here all ranks fail alike, and rank 0 prints the error. From here on their data differs.
    state.running = good = True
    if dry and command == "audit":
        _estimate_audit(evaluation, settings)
    elif dry:
        _estimate(evaluation)
    elif command in ("gradcheck", "audit"):
        good = _check(evaluation, command, settings)
    elif command in ("purify", "predict"):
        good = _purify(evaluation, command, settings)
    else:
        _test(evaluation)
    if not good:
        sys.exit(1)


def _compare(words: Sequence[str]) -> None:
    """Prints how finished evaluations differ from the first one, and writes the comparison page."""
    parser = reading.Parser("eval.py compare", description="Finished evaluations side by side.", allow_abbrev=False)
    parser.flags = words
    parser.add_argument("runs", nargs="*", type=Path, help="Run folders; the first is the baseline.")
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="The HTML page to write.")
    settings = parser.parse_args(words)
    comparison, output = Comparison(settings.runs), settings.output
    try:
        if output.is_file() and GENERATOR not in output.read_text(errors="replace")[:1000]:
            remedy = "choose another file with --output"
            raise InputError(f"{output}: exists and is not a comparison page; {remedy}")
        write_whole(output, comparison.page())
    except OSError as error:
        raise InputError(f"{output}: {str(error.strerror).lower()}; choose another file with --output") from error
    print(f"{comparison.table()}\n\nPage: {output}")


def _add_options(parser: reading.Parser, command: str) -> list[str]:
    """Adds the options of a command; returns their names."""
    before = settings_of(parser)
    add: Callable[..., Any] = parser.add_argument
    if command in ("gradcheck", "audit"):
        count = {"gradcheck": 4, "audit": 32}[command]
        add("--samples", type=int, default=count, help="Number of evaluated samples, from the first.")
    if command == "audit":
        add("--audit_runs", type=int, default=8, help="Runs of each image.")
        add("--proposals", type=int, default=100, help="Steps of the black-box attack.")
    if command in ("purify", "predict"):
        add("--input", type=Path, required=True, help="A folder of images at any depth, or one image.")
        add("--output", type=Path, required=True, help="The folder to write, or to complete.")
        add("--defense", type=str | None, default=None, help="Name of the defense (default: the first with a mask).")
        add("--overlays", type=bool, default=True, help="Also write NAME.mask.png and NAME.overlay.png.")
    return [name for name in settings_of(parser) if name not in before]
