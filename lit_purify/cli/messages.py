"""Errors as one line that says what to mend."""

from __future__ import annotations

import difflib
import errno
import inspect
import pydoc
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

# What is imported here can be named in a configuration by its short name, and is suggested where a name is wrong.
from lit_purify import attacks, callbacks, data, defense, evaluation, models, training
from lit_purify.defense import Purifier
from lit_purify.errors import InputError
from lit_purify.evaluation.folder import RunFolder

_LOST = (
    "by peer|remote process exited|Connection reset|Connection refused|Broken pipe|Failed to recv|remote server"
    "|timed out (waiting|after)|wait timeout"
)


def lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone or does not answer."""
    return isinstance(error, RuntimeError) and re.search(_LOST, str(error), re.IGNORECASE) is not None


def explanation(error: Exception, folder: RunFolder | None) -> str | None:
    """One line about what a user can mend, ``None`` about anything else."""
    if isinstance(error, (InputError, MisconfigurationException)):
        if m := re.match(r"No supported (\w+) backend found", str(error)):
            return f"trainer.accelerator = {m[1]}: there is none that torch can use; take cpu, or leave it out"
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # A worker process of a loader adds its traceback, with the message at its end.
        return re.sub(r"^[\w.]+Error: ", "", lines[-1]) if "Original Traceback" in str(error) else " ".join(lines)
    place = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if isinstance(error, (TypeError, ValueError)) and place.is_relative_to(Path(L.__file__).parent):
        # Lightning refuses a combination of settings.
        return " ".join(str(error).split())
    if isinstance(error, RuntimeError) and str(error).startswith("Error(s) in loading state_dict"):
        return "ckpt_path: the checkpoint is of another network than the one configured"
    if lost_connection(error):
        return (
            "another process of this run ended, or did not answer in time (30 minutes; --trainer.strategy DDPStrategy "
            "--trainer.strategy.timeout HH:MM:SS): the launcher names it; the same command goes on from here"
        )
    if not isinstance(error, OSError):
        return None
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if folder is None or (error.filename is None and not full and error.errno != errno.EFBIG):
        return " ".join(str(error).split())
    # A write into an open file does not name it: it is one of the run's own.
    path, run = Path(error.filename or folder.path), folder.path.absolute()
    own = path.absolute().is_relative_to(run) or run.is_relative_to(path.absolute())
    reason = "no space left" if full else str(error.strerror).lower()
    return f"{path}: {reason}; {'choose another folder with --run' if own else 'check the path'}"


def check_configs(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Contents of the configurations. Names the file that is at fault; the parser's messages do not."""
    contents = []
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
        task = found["model"].get("class_path") if isinstance(found.get("model"), dict) else None
        if str(task).endswith(("RobustnessTask", "FrontierTask")):
            raise InputError(
                f"{path}: written for version 0.1: move what is under model.init_args to the top level, remove "
                "seed_everything, and name each point of a family FAMILY/POINT under defenses (CHANGELOG.md)"
            )
        contents.append(found)
    return contents


def check_checkpoint(path: Path) -> None:
    """Raises an ``InputError`` where a training cannot go on from a file."""
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; check ckpt_path")
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    # The unpickler fails in many ways on what is not a checkpoint.
    except Exception as error:
        raise InputError(f"{path}: refused, it is not a checkpoint that train.py saved (.ckpt)") from error


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


def essence(message: str, configs: Sequence[dict[str, Any]] = ()) -> str:
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
    if m := re.search(r"class_path '([\w.]+)':\s+(?:Option '|unrecognized arguments: --)([^\s.=']+)", message):
        options = _options(m[1])
        near = _nearest(m[2], [*options, "class_path", "init_args"])
        return f"{at}{_last(m[1])} has no option {m[2]}; {near or 'it has ' + ', '.join(options)}"
    if m := re.search(r"unrecognized arguments: ([^\s=]+)|does not accept option '(.+)'", message):
        if m[1] and not m[1].startswith("-"):
            return f"unexpected argument {m[1]}; {_nearest(m[1], COMMANDS) or _USAGE}"
        name = (m[1] or m[2]).removeprefix("--")
        if name.startswith("model.init_args."):
            # Flags of version 0.1 of eval.py; train.py has a model.
            short = name.removeprefix("model.").replace("init_args.", "")
            return f"there is no setting {name}; did you mean {short}?"
        first, dot, rest = name.partition(".")
        if name in _SETTINGS:
            return f"there is no setting {name} of this command; --help_all lists all"
        near = _nearest(name, _SETTINGS) or _nearest(first, _SETTINGS, dot + rest)
        return f"there is no setting {name}; {near or '--help_all lists all'}"
    if m := re.search(r"invalid choice: '(.+)' \(choose from (.+)\)", message):
        near = _nearest(m[1], m[2].replace("'", "").split(", "))
        return f"{m[0]}; {near}" if near else m[0]
    if m := re.search(r"(?:class_path '([\w.]+)':\s+)?the following arguments are required: (.+)", message):
        if m[1]:
            return f"{at}{_last(m[1])} needs {m[2]}"
        missing = re.sub(r"\b(fit|test|validate|export|gradcheck|audit|estimate|purify|predict)[.]", "", m[2])
        if missing in ("input", "output", "input, output"):
            return f"no {missing.replace(', ', ' and no ')} given: say --input FOLDER --output FOLDER"
        return f"no {missing} given: name a configuration with --config"
    if m := re.search(r"Expected a dot import path string: (.+)", message):
        if m[1] in _CLASSES:
            remedy = {"RobustnessTask": "; it is for eval.py without a command"}.get(m[1], "")
            return f"{at}{m[1]} is of another kind than is needed here{remedy}"
        return f"{at}there is no class {m[1]}; {_nearest(m[1], _CLASSES) or 'classes of others need their full path'}"
    if m := re.search(r"module '(.+)' has no attribute '(\w+)'|(No module named '.+')", message):
        near = _nearest(m[2], dir(pydoc.locate(m[1]))) if m[1] else ""
        return f"{at}{m[3] or f'there is no {m[2]} in {m[1]}'}; {near or 'check class_path'}"
    reasons = [line for text in message.splitlines() if not _NO_REASON.match(line := text.strip(" -"))]
    if reasons:
        return at + _tidy(reasons[0])
    if re.search(_NO_CLASS, message):
        return _misnamed(place, configs) or f"{at}a class is needed: give its class_path and init_args"
    # No type of a union fits: the innermost union is the last that lists its types, and the first that ends.
    types = re.findall(r"Subtypes: \[(.+)\]$", message, re.MULTILINE)
    values = re.findall(r"Given value: (.+)$", message, re.MULTILINE)
    return at + _tidy(f"Expected a {types[-1]}. Got value: {values[0]}" if types and values else message)


COMMANDS = ("test", "frontier", "gradcheck", "audit", "compare", "purify", "predict")
"""Of ``eval.py``."""
_USAGE = f"eval.py takes one of {', '.join(COMMANDS)} or none, and settings as --NAME VALUE"

_CLASSES = [
    name for module in (attacks, callbacks, data, defense, evaluation, models, training) for name in module.__all__
]

_SETTINGS = [
    "config",
    "run",
    "dry_run",
    "input",
    "output",
    "defense",
    "existing",
    "overlays",
    "seed_everything",
    "ckpt_path",
    "model",
    "data",
    "trainer",
]

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
    # A datamodule hands what it does not know to its base.
    makers: list[Any] = (
        [base.__dict__.get("__init__") for base in inspect.getmro(made)] if inspect.isclass(made) else [made]
    )
    parameters = [
        p for maker in makers if inspect.isfunction(maker) for p in inspect.signature(maker).parameters.values()
    ]
    names = dict.fromkeys(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self")
    # A task makes its purifiers for its networks.
    given = {"denoiser", "classifier"} if inspect.isclass(made) and issubclass(made, Purifier) else set()
    return [name for name in names if name not in given]


def _nearest(name: str, known: Sequence[str], rest: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}{rest}?" if near else ""


def _misnamed(place: str, configs: Sequence[Any]) -> str:
    """Of a dotted key the first part that no configuration has, if one of its neighbors is called nearly so."""
    parts = place.split(".")
    for k, part in enumerate(parts):
        configs = [config for config in configs if isinstance(config, dict)]
        names = [str(name) for config in configs for name in config]
        if part not in names:
            near = _nearest(part, names)
            return near and f"{'.'.join(parts[:k])} has no {part}; {near}"
        configs = [config[part] for config in configs if part in config]
    return ""
