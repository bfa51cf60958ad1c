"""Turns errors into one line that names the remedy."""

from __future__ import annotations

import difflib
import errno
import inspect
import pydoc
import re
import traceback
from collections.abc import Collection, Sequence
from pathlib import Path

import lightning as L
import torch
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


COMMANDS = ("test", "frontier", "gradcheck", "audit", "compare", "purify", "predict")
"""Commands of ``eval.py``."""
_MOVED = {
    "model": "move its settings to the top level of the file",
    "seed_everything": "leave it out: seed is the seed of all noise",
}
"""Settings of evaluations in the first version."""
_CLASS_PATH = "must include a class_path"
_REASONS = {
    r"arguments are required: ([\w, -]+)": "missing",
    f"(is abstract|{_CLASS_PATH})": "no class",
    r"Option '([\w.]+)' is not accepted": "option",
    r"import path string: (.+)": "class",
    r"(No module named .*|module '[\w.]+' has no attribute '\w+')": "module",
    r"(Not a valid subclass|Expected an import path)": "no class",
    r"(YAML reads a name .*)": "name",
    r"Expected an? (<class '[\w.]+'>|typing\.Literal\[.*?\])": "type",
}
"""Patterns of the reasons in jsonargparse's messages, most telling first, and their kind."""


def shortened(message: str, settings: Collection[str], flags: Sequence[str]) -> str:
    """Shortens an error message of jsonargparse to one line.

    The message is indented: keys, their classes, and the errors of all types that a place accepts.

    Args:
        message: The message.
        settings: Names of all settings.
        flags: Arguments of the command line.
    """
    if m := re.search(r"unrecognized arguments: (--)?([^\s=]+)|Group '(\w+)' .*'(\w+)'|^Option '([\w.]+)'", message):
        name = f"{m[3]}.{m[4]}" if m[3] else m[5] or m[2]
        if m[2] and not m[1]:
            usage = f"eval.py takes one of {', '.join(COMMANDS)} or none, and settings as --NAME VALUE"
            return f"unexpected argument {name}; {_near(name, COMMANDS, usage)}"
        # For attacks.pgd.steps, only attacks is a setting.
        name = name if _near(name, settings) else name.partition(".")[0]
        return f"there is no setting {name}; {_MOVED.get(name) or _near(name, settings, '--help_all lists all')}"
    # For classes that are built later, the message puts the class after the reason.
    later = r"expects a function or a callable class: (.*?)\. Got value: Namespace\(class_path=('[\w.]+')[^\n]*"
    lines = re.sub(later, r"class_path \2: \1", message, flags=re.DOTALL).splitlines()
    # The deepest line: those above it belong to other types that the place accepts. A missing class explains them all.
    found = [
        (_CLASS_PATH in line, _depth(line), -rank, -k, kind, m[1])
        for k, line in enumerate(lines)
        for rank, (pattern, kind) in enumerate(_REASONS.items())
        if (m := re.search(pattern, line))
    ]
    if not found:
        return " ".join(message.split())
    *_, first, kind, word = max(found)
    place, made = _place(lines, -first)
    match kind:
        case "missing" if place:
            return f"{place}: {word} is missing: add it"
        case "missing":
            given = ", ".join(f"--{name}" for name in word.split(", "))
            return f"no {word} given: name a configuration with --config, or give {given}"
        case "no class":
            given = ", ".join(flag.partition("=")[0] for flag in flags if flag.startswith(f"--{place}."))
            if not given:
                return f"{place}: a class is needed: give its class_path, and its arguments beside it"
            return (
                f"{given}: no class accepts it: check name and value, or give its class_path first "
                f"(a later --config replaces all {place} of an earlier one)"
            )
        case "option":
            known = _options(made)
            if word in known:
                # It was taken for the denoiser, which a configuration gives to all purifiers.
                return f"{place}: the first argument of a purifier must be denoiser"
            return f"{place} has no option {word}; {_near(word, known, 'it has ' + ', '.join(known))}"
        case "class":
            names = [each.__name__ for each in _below(Recorded)]
            if word in names:
                return f"{place}: {word} is of another kind than this place needs: use another class"
            return f"{place}: there is no class {word}; {_near(word, names, 'classes of others need their full path')}"
        case "module":
            return f"{place}: {word}; check class_path"
        case "name":
            return f"{place}: {word}"
    return f"{place}: {_expected(lines[-first:])}"


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


def _options(path: str) -> list[str]:
    """Names of the arguments that a configuration gives a class or function."""
    made, probe = pydoc.locate(path), ArgumentParser(add_help=False)
    if inspect.isclass(made):
        probe.add_class_arguments(made, skip={"denoiser"} if issubclass(made, Purifier) else set(), fail_untyped=False)
    elif callable(made):
        probe.add_function_arguments(made, fail_untyped=False)
    return list(settings_of(probe))


def _below(base: type) -> list[type]:
    below: list[type] = type.__subclasses__(base)
    return [base, *(made for each in below for made in _below(each))]


def _expected(lines: Sequence[str]) -> str:
    """The types that a place accepts, and the value that it got; ``lines`` begin with the first type."""
    own = "\n".join(line for line in lines if _depth(line) == _depth(lines[0]))
    kinds = re.findall(
        r"Expected an? (?:<class '(?:[\w.]*\.)?(\w+)'>|typing\.Literal\[(.*?)\](?:\.|$))", own, re.MULTILINE
    )
    value = re.findall(r"(?:Got|Given) value: (.+)", "\n".join(lines))[0]
    expected = " or ".join((kind or literal).replace("NoneType", "null") for kind, literal in kinds)
    quotes = ": put it in quotes if it is text" if "str" in expected and value.isalnum() else ""
    return f"expected {expected}; got {value}{quotes}"


def _near(name: str, known: Collection[str], otherwise: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else otherwise
