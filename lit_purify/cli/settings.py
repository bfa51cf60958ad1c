"""Settings from YAML files and flags: ``class_path`` and its arguments side by side, paths for networks."""

from __future__ import annotations

import inspect
import os
import socket
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import lightning as L
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException

# Imported for their classes: a class that is imported can be named in a configuration by its short name.
from lit_purify import callbacks
from lit_purify.attacks import Attack
from lit_purify.checks.gradcheck import Check
from lit_purify.cli.common import fail, rank
from lit_purify.cli.messages import shortened
from lit_purify.data import ImageDataModule
from lit_purify.defense import Purifier
from lit_purify.errors import InputError
from lit_purify.evaluation import Evaluator
from lit_purify.models import Classifier, Denoiser
from lit_purify.private import renew_store, settings_of
from lit_purify.shipped import shipped

_CLASS = {"class_path", "init_args", "dict_kwargs"}
_LOADERS = {"denoiser": "lit_purify.models.load_denoiser", "classifier": "lit_purify.models.load_classifier"}
_TRAINER = ("accelerator", "strategy", "devices", "num_nodes", "logger", "deterministic", "benchmark")
"""Arguments of the trainer that apply to an evaluation."""
_PRECISIONS = ("32", "32-true", "bf16-mixed", "16-mixed")
_FORKED = ("ddp_spawn", "ddp_fork", "ddp_notebook")


class Parser(ArgumentParser):
    """A parser that reports errors in one line."""

    flags: Sequence[str] = ()
    """Arguments of the command line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the error in one line and exits."""
        if not self.exit_on_error:
            # This parser handles a nested class. It raises, so that outer parsers can add the place or try another
            # type.
            super().error(message, ex)
        fail(shortened(message, settings_of(self), self.flags))


def read(words: Sequence[str], parser: Parser) -> Namespace:
    """Reads the settings from configuration files and flags; exits with one line if they are wrong."""
    parser.flags = arguments(words)
    settings = parser.parse_args(parser.flags)
    for kind in ("defenses", "attacks"):
        for name in [name for name, value in (settings.get(kind) or {}).items() if value is None]:
            del settings[kind][name]
            if kind == "defenses" and settings.baseline == name:
                settings.baseline = None
    trainer = settings.trainer
    if trainer.get("precision") is not None and str(trainer.precision) not in _PRECISIONS:
        # Noise, levels and masks are drawn and computed in 32 bits.
        raise InputError(f"trainer.precision = {trainer.precision}: use 32-true, bf16-mixed or 16-mixed")
    if isinstance(trainer.strategy, str) and trainer.strategy.startswith(_FORKED):
        raise InputError(f"trainer.strategy = {trainer.strategy}: use ddp, or start the processes with torchrun")
    return settings


def make_parser(program: str, description: str) -> Parser:
    """A parser with ``--config`` and ``--run``."""
    jsonargparse.set_loader("lit_purify", load, (yaml.YAMLError,))
    parser = Parser(prog=program, parser_mode="lit_purify", description=description, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file; later flags override its settings.")
    parser.add_argument("--run", type=Path | None, default=None, help="Run folder (default: runs/NAME_OF_CONFIG).")
    return parser


def evaluation_parser() -> Parser:
    """The parser of all commands of ``eval.py`` but compare."""
    parser = make_parser("eval.py", "Settings of an evaluation.")
    add: Callable[..., Any] = parser.add_argument
    defense: Any = Callable[[Denoiser], Purifier] | Classifier | None
    add("--classifier", type=Classifier, required=True, help="The classifier: a path, or a class.")
    add("--denoiser", type=Denoiser | None, default=None, help="The denoiser of all purifiers: a path, or a class.")
    add("--defenses", type=dict[str, defense], required=True, help="By name; a path is a classifier, null removes one.")
    add("--attacks", type=dict[str, Attack | None], required=True, help="Attacks by name.")
    parser.add_class_arguments(Evaluator, instantiate=False, skip={"classifier", "defenses", "attacks"})
    add("--checks", type=list[Check], default=[], help="Your own checks for gradcheck: import paths.")
    add("--gallery", type=int, default=12, help="Number of samples with pictures.")
    add("--data", type=ImageDataModule, required=True, help="The evaluated images.")
    others = set(inspect.signature(L.Trainer).parameters) - set(_TRAINER)
    parser.add_class_arguments(L.Trainer, "trainer", instantiate=False, skip=others)
    add("--trainer.callbacks", type=list[L.Callback] | None, default=None, help="Your own callbacks.")
    parser.set_defaults({"trainer.logger": {"class_path": f"{callbacks.__name__}.WandbRun"}})
    return parser


def check_config(path: Path) -> None:
    """Raises an ``InputError`` about a wrong configuration that names the file; the parser's errors do not."""
    if not path.is_file():
        raise InputError(f"{path}: no such configuration; name another with --config")
    try:
        found = load(path.read_text())
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise InputError(f"{path}: not valid YAML, correct it: {where}{error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML text file: name a configuration") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no settings (key: value lines): name a configuration")


def load(text: str) -> Any:  # noqa: ANN401
    """Reads YAML with ``{class_path: C, a: 1}`` for ``{class_path: C, init_args: {a: 1}}`` and paths for networks."""
    found = yaml.safe_load(text)
    return simplified(found) if isinstance(found, dict) else found


def simplified(node: Any, key: str = "", parent: str = "") -> Any:  # noqa: ANN401
    """Expands the short form of settings to the long form of jsonargparse."""
    if isinstance(node, list):
        return [simplified(item, key, parent) for item in node]
    if isinstance(node, dict):
        if odd := [name for name in node if not isinstance(name, str)]:
            place, kind = f"{key}: " if key else "", type(odd[0]).__name__
            raise InputError(f"{place}YAML reads a name here as {odd[0]!r} ({kind}): put it in quotes")
        named = {k: simplified(value, k, key) for k, value in node.items()}
        arguments = {k: value for k, value in named.items() if k not in _CLASS}
        if "class_path" not in named or not arguments:
            return named
        others = {k: value for k, value in named.items() if k in _CLASS}
        return {**others, "init_args": {**arguments, **(named.get("init_args") or {})}}
    if not isinstance(node, str):
        return node
    text = str(Path(node).expanduser()) if node.startswith("~/") else node
    role = "classifier" if parent == "defenses" or key == "network" else key
    is_file = text.endswith(".safetensors") or text.startswith(("hf:/", "https:/", "http:/"))
    return {"class_path": _LOADERS[role], "init_args": {"path": text}} if is_file and role in _LOADERS else text


def arguments(words: Sequence[str]) -> list[str]:
    """The flags, with paths of networks in the long form; raises an ``InputError`` about a wrong configuration file."""
    found, before = list[str](), ""
    for word in words:
        flag, equals, value = word.partition("=")
        own = word.startswith("--") and equals
        found.append(f"{flag}={_written(flag, value)}" if own else _written(before, word))
        before = word
    return found


def _written(flag: str, value: str) -> str:
    """The value of a flag; the path of a network becomes its loader."""
    if not flag.startswith("--") or value.startswith("--"):
        return value
    *_, parent, key = ["", *flag.removeprefix("--").split(".")]
    if key == "config":
        path = shipped(Path(value))
        check_config(path)
        return str(path)
    found = simplified(value, key, parent)
    return found if isinstance(found, str) else yaml.safe_dump(found, default_flow_style=True, width=10**6).strip()


def instantiated(parser: Parser, settings: Namespace) -> Namespace:
    """Builds the objects of the settings. Constructors get only settings, so their errors are input errors."""
    try:
        return parser.instantiate(settings)
    except Exception as error:
        cause: BaseException = error
        while str(cause).startswith("Does not validate against") and cause.__cause__ is not None:
            # jsonargparse reports it as a value of the wrong type.
            cause = cause.__cause__
        if isinstance(cause, (InputError, MisconfigurationException, OSError)):
            raise cause from error
        frame = traceback.extract_tb(cause.__traceback__)[-1]
        place = f"{type(cause).__name__} in {Path(frame.filename).name}:{frame.lineno}"
        raise InputError(f"{cause} ({place})") from error


def run_folder(settings: Namespace, command: str) -> Path:
    """The run folder: the named one, or else one with the name of the configuration."""
    if settings.run is not None:
        return Path(settings.run)
    if sweep := os.environ.get("WANDB_SWEEP_ID"):
        # Each combination of a sweep has its own run folder.
        return Path("runs", f"sweep-{sweep}", os.environ["WANDB_RUN_ID"])
    sources = settings.get("config") or []
    return Path("runs") / (Path(str(sources[-1])).stem if sources else command)


def dump(parser: ArgumentParser, settings: Namespace, *left_out: str) -> str:
    """All settings, with defaults, as YAML for ``--config``."""
    stated = yaml.safe_load(parser.dump(settings, format="yaml", skip_none=False, skip_validation=True))
    kept = {key: value for key, value in stated.items() if key not in ("config", "run", *left_out)}
    return yaml.safe_dump(kept, sort_keys=False)


def place_loggers(settings: Namespace, folder: Path) -> None:
    """Sets the folder of loggers to the run folder."""
    loggers = settings.trainer.logger
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if isinstance(logger, Namespace) and logger.init_args.get("save_dir") in (None, "."):
            logger.init_args.save_dir = str(folder)


def make_trainer(settings: Mapping[str, Any], **own: Any) -> L.Trainer:  # noqa: ANN401
    """Makes a trainer, with the processes of a launcher or with its own.

    Raises:
        InputError: A launcher started another number of processes, or the port is in use.
    """
    renew_store(rank())
    trainer = L.Trainer(**{**settings, **_launched(settings), **own})
    if trainer.world_size > 1 and not {"WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"} & os.environ.keys():
        _check_port(os.environ.get("MASTER_PORT", "0"))
    world = int(os.environ.get("WORLD_SIZE", trainer.world_size))
    if world != trainer.world_size:
        raise InputError(
            f"{world} processes were started (WORLD_SIZE), the trainer has {trainer.world_size}: add --trainer.devices "
            f"{world} --trainer.strategy ddp (with several nodes --trainer.num_nodes)"
        )
    return trainer


def _check_port(port: str) -> None:
    """Raises an ``InputError`` if another program uses the port: the processes would wait for a long time."""
    try:
        with socket.create_server(("", int(port))):
            pass
    except (OSError, OverflowError, ValueError) as error:
        raise InputError(
            f"MASTER_PORT = {port}: the port cannot be used; unset it, or use another ({error})"
        ) from error


def _launched(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Devices and strategy for processes of torchrun, if the settings leave them open."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return {}
    local, devices = int(os.environ["LOCAL_WORLD_SIZE"]), settings.get("devices", "auto")
    found = {"devices": local, "num_nodes": int(os.environ["WORLD_SIZE"]) // local} if devices == "auto" else {}
    strategy = settings.get("strategy", "auto")
    return {**found, "strategy": "ddp" if strategy == "auto" else strategy}
