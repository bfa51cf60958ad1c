"""Turns errors into one line that names the remedy."""

from __future__ import annotations

import difflib
import errno
import inspect
import pydoc
import re
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
        "ckpt_path: the checkpoint belongs to another network than the configured one: use its own configuration",
    ),
    (
        RuntimeError,
        r"DataLoader worker \(pid|shared memory|unable to (write to file|mmap)",
        "a dataloader worker died: memory or shared memory (/dev/shm) is full; lower data.num_workers (0 reads in the "
        "main process), or add memory (for a container: docker run --shm-size=8g)",
    ),
    (
        ValueError,
        "^Expected more than 1 value per channel when training",
        "batch normalization needs more than one value per channel: raise data.batch_size or data.size",
    ),
)
"""Errors of torch as type, pattern and message."""


def lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another process died or does not answer."""
    return isinstance(error, RuntimeError) and re.search(_LOST, str(error), re.IGNORECASE) is not None


def explanation(error: Exception, folder: RunFolder | None) -> str | None:
    """One line about an error that a user can fix; ``None`` for any other error."""
    if isinstance(error, (InputError, MisconfigurationException)):
        if m := re.match(r"No supported (\w+) backend found", str(error)):
            return f"trainer.accelerator = {m[1]}: torch finds no such device; use cpu, or leave it out"
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # An error of a dataloader worker ends with its message, after a traceback.
        return re.sub(r"^[\w.]+Error: ", "", lines[-1]) if "Original Traceback" in str(error) else " ".join(lines)
    place = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if isinstance(error, (TypeError, ValueError)) and place.is_relative_to(Path(L.__file__).parent):
        # Lightning rejects a combination of settings.
        return " ".join(str(error).split())
    for kind, found, meaning in _MEANINGS:
        if isinstance(error, kind) and re.search(found, str(error)):
            return meaning
    if lost_connection(error):
        return (
            "another process of this run ended, or did not answer in time (30 minutes; --trainer.strategy DDPStrategy "
            "--trainer.strategy.timeout HH:MM:SS): see the launcher's output; the same command resumes from here"
        )
    if not isinstance(error, OSError):
        return None
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if folder is None or (error.filename is None and not full and error.errno != errno.EFBIG):
        return " ".join(str(error).split())
    # An error while writing an open file has no file name; the file is in the run folder.
    path, run = Path(error.filename or folder.path), folder.path.absolute()
    own = path.absolute().is_relative_to(run) or run.is_relative_to(path.absolute())
    reason = "no space left" if full else str(error.strerror).lower()
    return f"{path}: {reason}; {'choose another folder with --run' if own else 'check the path'}"


def check_checkpoint(path: Path) -> None:
    """Raises an ``InputError`` if a training cannot resume from this file."""
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; check ckpt_path")
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    # The unpickler raises many kinds of errors for other files.
    except Exception as error:
        raise InputError(f"{path}: not a checkpoint that train.py saved; use a .ckpt file from a run folder") from error


def read_config(path: Path) -> dict[str, Any]:
    """Reads a configuration, or raises an ``InputError`` that names the file; the parser's errors do not."""
    if not path.is_file():
        raise InputError(f"{path}: no such configuration; name another with --config")
    try:
        found = yaml.safe_load(path.read_text())
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise InputError(f"{path}: not valid YAML, correct it: {where}{error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML text file: name a configuration") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no settings (key: value lines): name a configuration")
    check_names(found, str(path))
    return found


def check_names(node: Any, place: str) -> None:  # noqa: ANN401
    """Raises an ``InputError`` if YAML reads a name as a number or boolean."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if not isinstance(key, str):
            raise InputError(f"{place}: YAML reads a name here as {key!r} ({type(key).__name__}): put it in quotes")
        check_names(value, f"{place}: {key}")


_CERTAIN = "must include a class_path"
"""If a message holds this text, it is the reason, whatever the other types report."""
COMMANDS = ("test", "frontier", "gradcheck", "audit", "compare", "purify", "predict")
"""Commands of ``eval.py``."""


def essence(message: str, settings: Collection[str], flags: Sequence[str]) -> str:
    """Shortens an error message of jsonargparse to one line.

    The message is indented: keys, their classes, and the errors of all types that a place accepts.

    Args:
        message: The message.
        settings: Names of all settings.
        flags: Arguments of the command line.
    """
    # For classes that are built later, the message puts the class after the reason.
    later = r"expects a function or a callable class: (.*?)\. Got value: Namespace\(class_path=('[\w.]+')[^\n]*"
    lines = re.sub(later, r"class_path \2: \1", message, flags=re.DOTALL).splitlines()
    if m := re.search(r"unrecognized arguments: (--)?([^\s=]+)|Group '(\w+)' .*'(\w+)'|^Option '([\w.]+)'", message):
        name = f"{m[3]}.{m[4]}" if m[3] else m[5] or m[2]
        if m[2] and not m[1]:
            usage = f"eval.py takes one of {', '.join(COMMANDS)} or none, and settings as --NAME VALUE"
            return f"unexpected argument {name}; {_near(name, COMMANDS, usage)}"
        # For attacks.pgd.steps, only attacks is a setting.
        name = name if _near(name, settings) else name.partition(".")[0]
        moved = "move its settings to the top level of the file" if name == "model" else "--help_all lists all"
        return f"there is no setting {name}; {_near(name, settings, moved)}"
    # The deepest line; lines above it belong to other types that the place accepts.
    found = [
        (_CERTAIN in line, _depth(line), -rank, -k, m[1])
        for k, line in enumerate(lines)
        for rank, pattern in enumerate(_REASONS)
        if (m := re.search(pattern, line))
    ]
    if not found:
        return " ".join(message.split())
    _, _, rank, k, word = max(found)
    explain = [*_REASONS.values()][-rank]
    return explain(_Found(*_place(lines, -k), word, lines[-k:], flags))


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def _place(lines: Sequence[str], k: int) -> tuple[str, str]:
    """Keys and classes above a line, such as ``data: Digits.subset: First``, and the path of the last class."""
    above, place, made = [lines[k]], "", ""
    for line in reversed(lines[:k]):
        above = [line, *above] if _depth(line) < _depth(above[0]) else above
    for key, path in re.findall(r"Parser key \"([\w.]+)\"|class_path '([\w.]+)'", "\n".join(above)):
        made = path or made
        place += f": {path.rpartition('.')[2]}" if path else f".{key}" if place else key
    return place, made


class _Found(NamedTuple):
    """The decisive line of a parser's message: its place and class, its decisive word, the lines after it."""

    place: str
    made: str
    word: str
    below: Sequence[str]
    flags: Sequence[str]


def _missing(found: _Found) -> str:
    if found.place:
        return f"{found.place}: {found.word} is missing: add it"
    flags = ", ".join(f"--{name}" for name in found.word.split(", "))
    return f"no {found.word} given: name a configuration with --config, or give {flags}"


def _classless(found: _Found) -> str:
    flags = [word.partition("=")[0] for word in found.flags if word.startswith(f"--{found.place}.")]
    if flags:
        return (
            f"{', '.join(flags)}: no class accepts it: check name and value, or give its class_path first "
            f"(a later --config replaces all {found.place} of an earlier one)"
        )
    return f"{found.place}: a class is needed: give its class_path, and its arguments beside it"


def _option(found: _Found) -> str:
    made = pydoc.locate(found.made)
    probe = ArgumentParser(add_help=False)
    if inspect.isclass(made):
        probe.add_class_arguments(made, skip={"denoiser"} if issubclass(made, Purifier) else set(), fail_untyped=False)
    elif callable(made):
        probe.add_function_arguments(made, fail_untyped=False)
    known = list(settings_of(probe))
    return f"{found.place} has no option {found.word}; {_near(found.word, known, 'it has ' + ', '.join(known))}"


def _class(found: _Found) -> str:
    known = [made.__name__ for made in _below(Recorded)]
    if found.word in known:
        return f"{found.place}: {found.word} is of another kind than this place needs: use another class"
    near = _near(found.word, known, "classes of others need their full path")
    return f"{found.place}: there is no class {found.word}; {near}"


def _below(base: type) -> list[type]:
    below: list[type] = type.__subclasses__(base)
    return [base, *(made for each in below for made in _below(each))]


def _type(found: _Found) -> str:
    depth = _depth(found.below[0])
    own = "\n".join(line for line in found.below if _depth(line) == depth)
    kinds = re.findall(
        r"Expected an? (?:<class '(?:[\w.]*\.)?(\w+)'>|typing\.Literal\[(.*?)\](?:\.|$))", own, re.MULTILINE
    )
    values = re.findall(r"(?:Got|Given) value: (.+)", "\n".join(found.below))
    expected = " or ".join((kind or literal).replace("NoneType", "null") for kind, literal in kinds)
    quotes = "str" in expected and values[0].isalnum()
    return f"{found.place}: expected {expected}; got {values[0]}{': put it in quotes if it is text' if quotes else ''}"


_REASONS: Mapping[str, Callable[[_Found], str]] = {
    r"arguments are required: ([\w, -]+)": _missing,
    f"(is abstract|{_CERTAIN})": _classless,
    r"Option '([\w.]+)' is not accepted": _option,
    r"import path string: (.+)": _class,
    r"(No module named .*|module '[\w.]+' has no attribute '\w+')": lambda f: f"{f.place}: {f.word}; check class_path",
    r"(Not a valid subclass|Expected an import path)": _classless,
    r"(YAML reads a name .*)": lambda f: f"{f.place}: {f.word}",
    r"Expected an? (<class '[\w.]+'>|typing\.Literal\[.*?\])": _type,
}


def _near(name: str, known: Collection[str], otherwise: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else otherwise
