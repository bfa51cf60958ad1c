"""The identity of a run: objects record their constructor arguments, and files and weights are hashed."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from lit_purify.errors import InputError

P = ParamSpec("P")
T = TypeVar("T")
SHA256 = " (sha256)"
"""Ending of the key of a hash in an identity."""


class Recorded:
    """Records the arguments of its constructor (of the most derived class), and checks those of ``Literal`` types.

    Attributes:
        arguments: Arguments by name, with defaults.
        irrelevant: Names of arguments that change no result; an identity leaves them out.
    """

    arguments: dict[str, Any]
    irrelevant: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:  # noqa: ANN401
        """Wraps the constructor and keeps its signature."""
        super().__init_subclass__(**kwargs)
        if "__init__" not in vars(cls):
            return
        init = vars(cls)["__init__"]

        @functools.wraps(init)
        def recording(self: Recorded, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
            bound = _bound(init, (self, *args), kwargs, skip=1)
            _check_choices(init, bound)
            if "arguments" not in vars(self):
                object.__setattr__(self, "arguments", bound)
            init(self, *args, **kwargs)

        cls.__init__ = recording  # type: ignore


def recorded(make: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function that builds a network: the network records the arguments of the function."""

    @functools.wraps(make)
    def recording(*args: P.args, **kwargs: P.kwargs) -> T:
        made = make(*args, **kwargs)
        object.__setattr__(made, "made_by", (f"{make.__module__}.{make.__qualname__}", _bound(make, args, kwargs)))
        return made

    return recording


def _bound(make: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], skip: int = 0) -> dict[str, Any]:
    signature = inspect.signature(make)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        # The constructor itself raises the better message.
        return {}
    bound.apply_defaults()
    found: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[skip:]:
        found |= value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    hints = _hints(make)
    # The type of an argument decides whether a string names a file.
    return {name: _as_paths(value) if Path in _types(hints.get(name)) else value for name, value in found.items()}


def _as_paths(value: Any) -> Any:  # noqa: ANN401
    """The paths in an argument that holds files; they may be given as strings."""
    if isinstance(value, Mapping):
        return {name: _as_paths(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_paths(inner) for inner in value]
    return Path(value) if isinstance(value, str) else value


def _hints(make: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(make)
    except (NameError, TypeError):
        # Some name exists for type checkers only: the text of an annotation shows whether it is a file.
        parameters = inspect.signature(make).parameters
        return {name: Path for name, p in parameters.items() if re.search(r"\bPath\b", str(p.annotation))}


def _types(hint: Any) -> list[Any]:  # noqa: ANN401
    return [hint, *(inner for part in typing.get_args(hint) for inner in _types(part))]


def _check_choices(make: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Raises an ``InputError`` if an argument is none of the values of its ``Literal`` type."""
    for name, hint in _hints(make).items():
        *others, last = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else [None]
        if others and name in arguments and arguments[name] not in (*others, last):
            raise InputError(f"{name} = {arguments[name]!r}: use {', '.join(map(str, others))} or {last}")


def identity(**values: Any) -> dict[str, Any]:  # noqa: ANN401
    """The settings that results depend on, as a flat mapping to JSON values.

    An object of this library becomes its class and constructor arguments. A file (an argument of type ``Path``) becomes
    the sha256 of its content, a network the sha256 of its weights, any other object its class. An object that appears
    twice refers to its first place.

    Args:
        values: Objects and values to identify, by name.

    Returns:
        For example ``{"defenses.uniform": "lit_purify.defense.purifiers.UniformPurifier", ...}``.
    """
    found: dict[str, Any] = {}
    places: dict[int, str] = {}
    for name, value in values.items():
        _identify(value, name, found, places)
    return found


def _identify(value: Any, key: str, found: dict[str, Any], places: dict[int, str]) -> None:  # noqa: ANN401
    if value is None or isinstance(value, (bool, int, float, str)):
        found[key] = value
    elif isinstance(value, Path):
        found[key] = str(value)
        # A web address includes its hash; a network from a hub is identified by its weights.
        if value.exists():
            found[key + SHA256] = path_sha256(value)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            _identify(inner, f"{key}.{name}", found, places)
    elif isinstance(value, Tensor):
        found[key + SHA256] = tensors_sha256({"": value})
    elif isinstance(value, (list, tuple)) and all(v is None or isinstance(v, (bool, int, float, str)) for v in value):
        found[key] = list(value)
    elif isinstance(value, (list, tuple)):
        for k, inner in enumerate(value):
            _identify(inner, f"{key}.{k}", found, places)
    elif id(value) in places:
        found[key] = f"the {places[id(value)]}"
    else:
        places[id(value)] = key
        _identify_object(value, key, found, places)


def _identify_object(value: Any, key: str, found: dict[str, Any], places: dict[int, str]) -> None:  # noqa: ANN401
    made_by, arguments = getattr(value, "made_by", None) or (_name(value), getattr(value, "arguments", {}))
    found[key] = made_by
    for name, inner in arguments.items():
        if name not in getattr(value, "irrelevant", ()):
            _identify(inner, f"{key}.{name}", found, places)
    inside = (inner for inner in arguments.values() if isinstance(inner, nn.Module))
    held = {id(tensor) for inner in inside for tensor in inner.state_dict(keep_vars=True).values()}
    if isinstance(value, nn.Module):
        # Weights of networks among the arguments are hashed there.
        own = {name: t for name, t in value.state_dict(keep_vars=True).items() if id(t) not in held}
        if own:
            found[f"{key}.weights{SHA256}"] = tensors_sha256(own)


def _name(value: Any) -> str:  # noqa: ANN401
    of = value if inspect.isroutine(value) or inspect.isclass(value) else type(value)
    return f"{of.__module__}.{of.__qualname__}"


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of tensors: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        digest.update(data.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def path_sha256(path: Path) -> str:
    """sha256 of a file, or of the names and hashes of all files in a folder.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            listing = "".join(f"{path_sha256(file)} {file.relative_to(path)}\n" for file in files)
            return hashlib.sha256(listing.encode()).hexdigest()
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check the path and its permissions") from error
