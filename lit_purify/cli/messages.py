"""Errors as one line that says what to mend."""

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


def check_checkpoint(path: Path) -> None:
    """Raises an ``InputError`` where a training cannot go on from a file."""
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; check ckpt_path")
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    # The unpickler fails in many ways on what is not a checkpoint.
    except Exception as error:
        raise InputError(f"{path}: refused, it is not a checkpoint that train.py saved (.ckpt)") from error


def read_config(path: Path) -> dict[str, Any]:
    """Content of a configuration, or an ``InputError`` that names the file, which the parser's messages do not."""
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
    check_names(found, str(path))
    return found


def check_names(node: Any, place: str) -> None:  # noqa: ANN401
    """Raises an ``InputError`` where YAML reads a name as a number or boolean."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if not isinstance(key, str):
            raise InputError(f"{place}: YAML reads a name there as {key!r} ({type(key).__name__}): write it in quotes")
        check_names(value, f"{place}: {key}")


_CERTAIN = "must include a class_path"
"""If this is said, it is the reason, whatever other types say."""
COMMANDS = ("test", "frontier", "gradcheck", "audit", "compare", "purify", "predict")
"""Of ``eval.py``."""


def essence(message: str, settings: Collection[str], flags: Sequence[str]) -> str:
    """A message of the parser in one line.

    It nests by indentation: keys, their classes, and for a place that takes several types what each of them says.

    Args:
        message: The message.
        settings: Names of all settings.
        flags: The words of the command line.
    """
    # Of a class that is made later, the message names the class behind the reason.
    later = r"expects a function or a callable class: (.*?)\. Got value: Namespace\(class_path=('[\w.]+')[^\n]*"
    lines = re.sub(later, r"class_path \2: \1", message, flags=re.DOTALL).splitlines()
    if m := re.search(r"unrecognized arguments: (--)?([^\s=]+)|Group '(\w+)' .*'(\w+)'|^Option '([\w.]+)'", message):
        name = f"{m[3]}.{m[4]}" if m[3] else m[5] or m[2]
        if m[2] and not m[1]:
            usage = f"eval.py takes one of {', '.join(COMMANDS)} or none, and settings as --NAME VALUE"
            return f"unexpected argument {name}; {_near(name, COMMANDS, usage)}"
        # Of attacks.pgd.steps, attacks is a setting.
        name = name if _near(name, settings) else name.partition(".")[0]
        moved = "its settings stand at the top level of the file now" if name == "model" else "--help_all lists all"
        return f"there is no setting {name}; {_near(name, settings, moved)}"
    # The deepest line: above it stand other types that the place would take.
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
    """The line of a parser's message that says most: where it stands, the class there, a word of it, what follows."""

    place: str
    made: str
    word: str
    below: Sequence[str]
    flags: Sequence[str]


def _missing(found: _Found) -> str:
    if found.place:
        return f"{found.place}: {found.word} is missing"
    flags = ", ".join(f"--{name}" for name in found.word.split(", "))
    return f"no {found.word} given: name a configuration with --config, or give {flags}"


def _classless(found: _Found) -> str:
    flags = [word.partition("=")[0] for word in found.flags if word.startswith(f"--{found.place}.")]
    if flags:
        return (
            f"{', '.join(flags)}: there is no class that takes it: check name and value, or give its class_path first "
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
        return f"{found.place}: {found.word} is of another kind than is needed here"
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
    return (
        f"{found.place}: expected {expected}; got {values[0]}{': write it in quotes if it is a text' if quotes else ''}"
    )


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
