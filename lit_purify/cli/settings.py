"""Settings from YAML files and flags: ``class_path`` and its arguments side by side, paths for networks."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import lightning as L
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

# Imported for their classes: a class that is imported can be named in a configuration by its short name.
from lit_purify import callbacks
from lit_purify.attacks import Attack
from lit_purify.cli.common import fail
from lit_purify.cli.messages import essence
from lit_purify.data import ImageDataModule
from lit_purify.defense import Gradient, Purifier
from lit_purify.errors import InputError
from lit_purify.models import Classifier, Denoiser

_CLASS = {"class_path", "init_args", "dict_kwargs"}
_LOADERS = {"denoiser": "lit_purify.models.load_denoiser", "classifier": "lit_purify.models.load_classifier"}
_TRAINER = ("accelerator", "strategy", "devices", "num_nodes", "precision", "logger", "deterministic", "benchmark")
"""Arguments of the trainer that mean something in an evaluation."""


class Parser(ArgumentParser):
    """Says what is wrong in one line."""

    configs: Sequence[dict[str, Any]] = ()
    """The contents of the configuration files."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends with that line."""
        if not self.exit_on_error:
            # This one parses a nested class. It raises: the outer parsers add where in the configuration the class
            # stands, or go on with another type that the place accepts.
            super().error(message, ex)
        fail(essence(message, self.configs))


def make_parser(program: str, description: str) -> Parser:
    """A parser that reads configurations."""
    jsonargparse.set_loader("lit_purify", load, (yaml.YAMLError, InputError))
    parser = Parser(prog=program, parser_mode="lit_purify", description=description)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; flags after it replace its settings.")
    parser.add_argument("--run", type=Path | None, default=None, help="Run folder (default: runs/NAME_OF_CONFIG).")
    return parser


def evaluation_parser() -> Parser:
    """The parser of all commands that evaluate."""
    parser = make_parser("eval.py", "Settings of an evaluation.")
    parser.add_argument("--classifier", type=Classifier, required=True, help="The classifier: a path, or a class.")
    parser.add_argument(
        "--denoiser", type=Denoiser | None, default=None, help="The denoiser of all purifiers: a path, or a class."
    )
    defense: Any = Callable[[Denoiser], Purifier] | Classifier
    parser.add_argument(
        "--defenses", type=dict[str, defense], required=True, help="By name: purifiers, or paths of other classifiers."
    )
    parser.add_argument("--attacks", type=dict[str, Attack], required=True, help="Attacks by name.")
    parser.add_argument(
        "--gradients",
        type=dict[str, Gradient] | None,
        default=None,
        help="What attacks differentiate, by the attack's name (default: Exact).",
    )
    parser.add_argument("--baseline", type=str | None, default=None, help="Defense to compare to (default: the first).")
    parser.add_argument("--runs", type=int, default=8, help="N, runs of each sample with fresh noise.")
    parser.add_argument("--chunk", type=int, default=64, help="Rows of a network call; part of a result's identity.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of all noise.")
    parser.add_argument("--skip_lost", type=bool, default=False, help="Leave out what an earlier attack took entirely.")
    parser.add_argument("--gallery", type=int, default=12, help="Samples whose pictures are shown.")
    parser.add_argument("--data", type=ImageDataModule, required=True, help="The evaluated images.")
    others = set(inspect.signature(L.Trainer).parameters) - set(_TRAINER)
    parser.add_class_arguments(L.Trainer, "trainer", instantiate=False, skip=others)
    parser.add_argument("--trainer.callbacks", type=list[L.Callback] | None, default=None, help="Callbacks of yours.")
    parser.set_defaults({"trainer.logger": {"class_path": f"{callbacks.__name__}.WandbRun"}})
    return parser


def load(text: str) -> Any:  # noqa: ANN401
    """YAML, with ``{class_path: C, a: 1}`` for ``{class_path: C, init_args: {a: 1}}``, and paths for networks."""
    found = yaml.safe_load(text)
    return simplified(found) if isinstance(found, dict) else found


def simplified(node: Any, key: str = "", parent: str = "") -> Any:  # noqa: ANN401
    """The long form of a tree of settings."""
    if isinstance(node, list):
        return [simplified(item, key, parent) for item in node]
    if isinstance(node, dict):
        # YAML reads some names as numbers or booleans.
        named = {_name(k, parent=key): simplified(value, _name(k, parent=key), key) for k, value in node.items()}
        arguments = {k: value for k, value in named.items() if k not in _CLASS}
        if "class_path" not in named or not arguments:
            return named
        others = {k: value for k, value in named.items() if k in _CLASS}
        return {**others, "init_args": {**arguments, **(named.get("init_args") or {})}}
    role = "classifier" if parent == "defenses" or key == "network" else key
    return network(role, node) if isinstance(node, str) and _is_file(node) and role in _LOADERS else node


def _is_file(text: str) -> bool:
    return text.endswith(".safetensors") or text.startswith(("hf:/", "https:/", "http:/"))


def network(role: str, path: str) -> dict[str, Any]:
    """The network in a file."""
    return {"class_path": _LOADERS[role], "init_args": {"path": path}}


def _name(key: Any, parent: str) -> str:  # noqa: ANN401
    if isinstance(key, str):
        return key
    raise InputError(f"{parent}: YAML reads the name {key!r} as {type(key).__name__}: write it in quotes")


def arguments(given: Sequence[str]) -> list[str]:
    """The flags, with paths of networks written as a configuration would."""
    found: list[str] = []
    for word, following in zip(["", *given], [*given, ""], strict=True):
        flag, equals, value = following.partition("=")
        if following.startswith("--") and equals:
            found.append(f"{flag}={_written(flag, value)}")
        elif following:
            found.append(_written(word, following))
    return found


def _written(flag: str, value: str) -> str:
    """The value of a flag; a path of a network as its loader."""
    name = flag.removeprefix("--")
    role = "classifier" if name.startswith("defenses.") and name.count(".") == 1 else name.rpartition(".")[2]
    if flag.startswith("--") and role in _LOADERS and _is_file(value):
        return yaml.safe_dump(network(role, value), default_flow_style=True, width=10**6).strip()
    return value


def run_folder(settings: Namespace, command: str) -> Path:
    """The folder of a run: the one that was named, or one with the configuration's name."""
    if settings.run is not None:
        return Path(settings.run).expanduser()
    if sweep := os.environ.get("WANDB_SWEEP_ID"):
        # Every combination of a sweep is a run of its own.
        return Path("runs", f"sweep-{sweep}", os.environ["WANDB_RUN_ID"])
    sources = settings.get("config") or []
    return Path("runs") / (Path(str(sources[-1])).stem if sources else command)


def dump(parser: ArgumentParser, settings: Namespace, *left_out: str) -> str:
    """The settings with all defaults, as YAML that ``--config`` reads."""
    stated = yaml.safe_load(parser.dump(settings, format="yaml", skip_validation=True))
    kept = {key: value for key, value in stated.items() if key not in ("config", "run", *left_out)}
    return yaml.safe_dump(kept, sort_keys=False)


def place_loggers(settings: Namespace, folder: Path) -> None:
    """Points loggers to the run's folder."""
    loggers = settings.trainer.logger
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if isinstance(logger, Namespace) and logger.init_args.get("save_dir") in (None, "."):
            logger.init_args.save_dir = str(folder)


def launched(given: Mapping[str, Any]) -> dict[str, Any]:
    """Devices and strategy of processes that torchrun has started, where the settings leave them open.

    Raises:
        InputError: The settings name another number of processes: each would take itself for the only one.
    """
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world == 1:
        return {}
    devices, nodes = given.get("devices", "auto"), int(given.get("num_nodes") or 1)
    if "TORCHELASTIC_RUN_ID" in os.environ and devices == "auto":
        devices, nodes = local, world // local
    if isinstance(devices, int) and devices * nodes != world:
        raise InputError(
            f"{world} processes were started (WORLD_SIZE), the trainer has {devices * nodes}: add --trainer.devices "
            f"{local} (with several nodes --trainer.num_nodes)"
        )
    strategy = given.get("strategy", "auto")
    return {"devices": devices, "num_nodes": nodes, "strategy": "ddp" if strategy == "auto" else strategy}
