"""Errors as one line that says what to mend."""

from __future__ import annotations

import difflib
import errno
import inspect
import pydoc
import re
import traceback
import types
import typing
from argparse import ArgumentError
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_purify.defense import Purifier
from lit_purify.errors import InputError
from lit_purify.evaluation.folder import RunFolder
from lit_purify.private import settings_of
from lit_purify.recorded import Recorded

_LOST = (
    "by peer|remote process exited|Connection reset|Connection refused|Broken pipe|Failed to recv|remote server"
    "|timed out (waiting|after)|wait timeout"
)

_MEANINGS = (
    (
        RuntimeError,
        r"^Error\(s\) in loading state_dict",
        "ckpt_path: the checkpoint is of another network than the one configured",
    ),
    (
        RuntimeError,
        r"DataLoader worker \(pid|shared memory|unable to (write to file|mmap)",
        "a process that reads images ended: memory or shared memory (/dev/shm) was used up; lower data.num_workers (0 "
        "reads in the main process), or give the machine more (of a container: docker run --shm-size=8g)",
    ),
    (
        ValueError,
        "^Expected more than 1 value per channel when training",
        "batch normalization needs more than one value a channel: raise data.batch_size, or the size of the images",
    ),
)
"""What errors of torch mean here: their type, a pattern, the line."""


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
    for kind, found, meaning in _MEANINGS:
        if isinstance(error, kind) and re.search(found, str(error)):
            return meaning
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
        _check_keys(found, str(path))
        contents.append(found)
    return contents


def _check_keys(node: Any, place: str) -> None:  # noqa: ANN401
    """YAML reads some names as numbers or booleans."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if isinstance(node, dict) and not isinstance(key, str):
            raise InputError(f"{place}: YAML reads a name there as {key!r} ({type(key).__name__}): write it in quotes")
        _check_keys(value, f"{place}: {key}" if place.endswith((".yaml", ".yml", ".json")) else f"{place}.{key}")


def check_checkpoint(path: Path) -> None:
    """Raises an ``InputError`` where a training cannot go on from a file."""
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; check ckpt_path")
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    # The unpickler fails in many ways on what is not a checkpoint.
    except Exception as error:
        raise InputError(f"{path}: refused, it is not a checkpoint that train.py saved (.ckpt)") from error


def essence(message: str) -> str:
    """The one line of a parser error that says what to mend, where the settings themselves do not show it."""
    if m := re.search(r"unrecognized arguments: ([^\s=]+)", message):
        return f"unexpected argument {m[1]}; {_nearest(m[1], COMMANDS) or _USAGE}"
    if m := re.search(r"the following arguments are required: (.+)|Key \"([\w.]+)\" is required", message):
        missing = (m[1] or m[2]).replace("--", "")
        if missing in ("input", "output", "input, output"):
            return f"no {missing.replace(', ', ' and no ')} given: say --input FOLDER --output FOLDER"
        return f"no {missing} given: name a configuration with --config"
    if m := re.search(
        r'key "([\w.]+)":.*Expected a <class .str.>.*type: <class .(\w+).>\s+Given value: (.+)', message, re.S
    ):
        return f"{m[1]}: a text is needed, and YAML reads it as {m[3]} ({m[2]}): write it in quotes"
    lines = [line for text in message.splitlines() if not _NO_REASON.match(line := text.strip(" -"))]
    return re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", lines[0] if lines else " ".join(message.split()))


_NO_REASON = re.compile(r"Does not validate|Subtypes:|Errors:|Given value|Problem with given class_path|Parser key|$")
"""Lines of a parser error that say how it was reached."""
COMMANDS = ("test", "frontier", "gradcheck", "audit", "compare", "purify", "predict")
"""Of ``eval.py``."""
_USAGE = f"eval.py takes one of {', '.join(COMMANDS)} or none, and settings as --NAME VALUE"
_GONE = "its settings stand at the top level of the file now: classifier, attacks, runs ..."
_CLASS = "give its class_path, and its arguments beside it"
_BEFORE = ""
"""Key of the arguments of a class that a flag has replaced by another one."""


def given_settings(configs: Sequence[Mapping[str, Any]], argv: Sequence[str]) -> dict[str, Any]:
    """All that files and flags state, as one tree in which the arguments of a class stand beside its ``class_path``."""
    tree: dict[str, Any] = {}
    for config in configs:
        _merge(tree, _flat(config))
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if name.startswith("--") and name != "--config":
            try:
                found = yaml.safe_load(value if equals else following)
            except yaml.YAMLError:
                found = value or following
            parts = [part for part in name[2:].rstrip("+").split(".") if part != "init_args"]
            _check_keys(found, ".".join(parts))
            _merge(tree, _nested(parts, _flat(found)))
    return tree


def _flat(node: Any) -> Any:  # noqa: ANN401
    if isinstance(node, list):
        return [_flat(item) for item in node]
    if not isinstance(node, dict):
        return node
    inner = node.get("init_args")
    return {k: _flat(v) for k, v in {**node, **(inner if isinstance(inner, dict) else {})}.items() if k != "init_args"}


def _nested(path: Sequence[str], value: Any) -> Any:  # noqa: ANN401
    return {path[0]: _nested(path[1:], value)} if path else value


def _merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        old = tree.get(key)
        if isinstance(old, str) and isinstance(value, dict):
            old = tree[key] = {"class_path": old}
        if isinstance(old, dict) and "class_path" in old and isinstance(value, str):
            value = {"class_path": value}
        if isinstance(old, dict) and isinstance(value, dict):
            if value.get("class_path", old.get("class_path")) != old.get("class_path"):
                old = tree[key] = {_BEFORE: old}
            _merge(old, value)
        else:
            tree[key] = value


def diagnosis(parser: ArgumentParser, tree: Mapping[str, Any]) -> str | None:
    """What is wrong with settings that a parser has refused; ``None`` where this is not seen."""
    hints = settings_of(parser)
    try:
        for name, value in tree.items():
            if any(dest.startswith(f"{name}.") for dest in hints) and isinstance(value, dict):
                for key, inner in value.items():
                    # A flag may set an argument of a class that is there by default.
                    place = f"{name}.{key}"
                    usual = parser.get_default(place) if isinstance(inner, dict) and place in hints else None
                    given = {"class_path": usual["class_path"], **inner} if usual else inner
                    _diagnose_setting(place, given, hints)
            else:
                _diagnose_setting(name, value, hints)
    except InputError as error:
        return str(error)
    return None


def _diagnose_setting(name: str, value: Any, hints: Mapping[str, Any]) -> None:  # noqa: ANN401
    if name not in hints:
        near = _GONE if name == "model" else _nearest(name, [*hints]) or "--help_all lists all"
        raise InputError(f"there is no setting {name}; {near}")
    _diagnose(value, hints[name], name)


def _diagnose(value: Any, hint: Any, place: str) -> None:  # noqa: ANN401
    """Raises an ``InputError`` about the first thing in a tree that does not fit its type."""
    kinds = _members(hint)
    bases = [base for base in map(_base, kinds) if base is not None]
    inside = {typing.get_origin(kind): typing.get_args(kind) for kind in kinds}
    items = next((inside[kind] for kind in (list, Sequence, Iterable) if kind in inside), None)
    if items and isinstance(value, list):
        for each in value:
            _diagnose(each, items[0], place)
        return
    if dict in inside and isinstance(value, dict):
        for name, inner in value.items():
            others = value.keys() - {name}
            if isinstance(inner, dict) and "class_path" not in inner and (near := _nearest(name, others)):
                raise InputError(f"{place} has no {name}; {near}")
            _diagnose(inner, inside[dict][1], f"{place}.{name}")
        return
    given = value if isinstance(value, dict) else {"class_path": value}
    path = given.get("class_path")
    if not bases or not isinstance(path, str) or (given is not value and _accepts(hint, value)):
        if hint is not None and not _accepts(hint, value):
            expected = f"expected {' or '.join(map(_title, kinds))}; got {value}"
            raise InputError(f"{place}: {f'a class is needed: {_CLASS}' if bases else expected}")
        return
    made = _class(path, bases, place)
    options, before = _options(made), given.get(_BEFORE, {})
    for name, argument in given.items():
        if name in options:
            _diagnose(argument, options[name][0], f"{place}.{name}")
        elif name not in ("class_path", "dict_kwargs", _BEFORE):
            near = _nearest(name, [*options, "class_path"]) or "it has " + ", ".join(options)
            raise InputError(f"{place}: {_last(path)} has no option {name}; {near}")
    if missing := [name for name, (_, needed) in options.items() if needed and name not in {**given, **before}]:
        raise InputError(f"{place}: {_last(path)} needs {', '.join(missing)}")


def _members(hint: Any) -> list[Any]:  # noqa: ANN401
    """The types of a union; of one type this one."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [inner for part in typing.get_args(hint) for inner in _members(part)]
    return [hint]


def _base(kind: Any) -> type | None:  # noqa: ANN401
    """The class of which an object is due; ``None`` for plain values."""
    if typing.get_origin(kind) is Callable:
        kind = typing.get_args(kind)[1]
    plain = (int, float, str, bool, type(None), dict, list)
    return None if not inspect.isclass(kind) or kind in plain or issubclass(kind, Path) else kind


def _title(kind: Any) -> str:  # noqa: ANN401
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    return "null" if kind is type(None) else str(getattr(kind, "__name__", kind))


def _accepts(hint: Any, value: Any) -> bool:  # noqa: ANN401
    probe = ArgumentParser(exit_on_error=False)
    probe.add_argument("--x", type=hint)
    # What YAML reads as a number may be meant as text.
    for tried in (value, str(value)) if isinstance(value, (int, float)) else (value,):
        try:
            probe.parse_object({"x": tried})
            return True
        except (ArgumentError, TypeError, ValueError):
            pass
    return False


def _class(path: str, bases: Sequence[type], place: str) -> Any:  # noqa: ANN401
    """The class or function that a path names."""
    known = {c.__name__: c for base in bases for c in _below(base)}
    if "." not in path:
        if path in known:
            return known[path]
        if path in {c.__name__ for c in _below(Recorded)}:
            raise InputError(f"{place}: {path} is of another kind than is needed here")
        near = _nearest(path, list(known)) or "classes of others need their full path"
        raise InputError(f"{place}: there is no class {path}; {near}")
    module, _, name = path.rpartition(".")
    try:
        made, within = pydoc.locate(path), pydoc.locate(module)
    except pydoc.ErrorDuringImport as error:
        raise InputError(f"{place}: {error}; check class_path") from error
    if within is None:
        raise InputError(f"{place}: No module named {module!r}; check class_path")
    if made is None:
        raise InputError(
            f"{place}: there is no {name} in {module}; {_nearest(name, dir(within)) or 'check class_path'}"
        )
    kind = made if inspect.isclass(made) else typing.get_type_hints(made).get("return")
    if inspect.isclass(kind) and not issubclass(kind, tuple(bases)):
        raise InputError(f"{place}: {name} is of another kind than is needed here")
    return made


def _below(base: type) -> list[type]:
    below: list[type] = type.__subclasses__(base)
    return [base, *(c for each in below for c in _below(each))]


def _options(made: Any) -> dict[str, tuple[Any, bool]]:  # noqa: ANN401
    """What a configuration can give to a class or function: the type of each, and whether it is required."""
    # A datamodule hands what it does not know to its base.
    makers = [base.__dict__.get("__init__") for base in inspect.getmro(made)] if inspect.isclass(made) else [made]
    given = {"self", "denoiser"} if inspect.isclass(made) and issubclass(made, Purifier) else {"self"}
    found: dict[str, tuple[Any, bool]] = {}
    for maker in filter(inspect.isroutine, makers):
        parameters = inspect.signature(maker).parameters.values()
        hints = typing.get_type_hints(maker) if inspect.isfunction(maker) else {}
        for p in parameters:
            if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in given and p.name not in found:
                found[p.name] = hints.get(p.name, Any), p.default is p.empty and maker is makers[0]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _nearest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else ""
