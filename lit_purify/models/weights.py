"""Readers of weights: they extract the state_dict of one network from common checkpoint layouts."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from lit_purify.errors import InputError, notice
from lit_purify.models.sources import locate

Which = Literal["average", "last"]
"""Weights to read from a checkpoint that holds a network and the average of its weights."""

_PLAIN = ("state_dict", "model_state_dict", "model", "net", "network", "params", "weights", "model_weights")
_AVERAGE = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "ema", *_PLAIN)
# Lightning and RobustBench store the average under the plain name and the last weights under these.
_LAST = ("current_model_state", "unaveraged_model_state_dict", *_PLAIN)
TWO_NETWORKS = "holds a network and its average: the {} weights are read (which: average or last)"


class _Inert:
    """Replaces every object in a file that is neither a tensor nor a plain container."""

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def check_file(path: Path) -> bytes:
    """Returns the first bytes of a file; raises an ``InputError`` if it cannot hold weights."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; load_diffusers reads folders of diffusers, otherwise name a file in it")
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; check the path, train it (configs/train), or fetch it (docs/protocols.md lists "
            "where public weights come from)"
        )
    with path.open("rb") as stream:
        head = stream.read(512)
    if not head:
        raise InputError(f"{path}: the file is empty; fetch it again")
    # The header length of a safetensors file can also start with '<'.
    if re.match(rb"\s*<(!doctype|!--|html|head|\?xml)", head, re.IGNORECASE):
        raise InputError(f"{path}: this is an HTML page, not weights; download the file itself")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: this is a git-lfs pointer, not weights; run 'git lfs pull'")
    return head


def read_state_dict(path: str | Path, which: Which = "average") -> dict[str, Tensor]:
    """Reads the state_dict in a ``.safetensors`` file or a file of ``torch.save``, as float32.

    Args:
        path: The file; ``https://...#sha256=...`` or ``hf://organization/name/file`` is fetched first (``locate``).
        which: Weights to read from a file with a network and the average of its weights.

    Raises:
        InputError: The file is missing or holds no weights.
    """
    return state_dict_in(read_container(path), path, which)


def read_container(path: str | Path) -> Any:  # noqa: ANN401
    """Reads the content of a ``.safetensors`` file or a file of ``torch.save``; nothing in it is executed.

    Raises:
        InputError: The file is missing or holds no weights.
    """
    path = locate(path)
    head = check_file(path)
    # A safetensors file may have any name: it starts with the length of its JSON header.
    if path.suffix == ".safetensors" or head[4:9] == b"\0\0\0\0{":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path}: not a safetensors file ({error}): check that it is complete") from error
    try:
        strange = [(_Inert, name) for name in get_unsafe_globals_in_checkpoint(path)] if head[:2] == b"PK" else []
        with safe_globals(strange):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path}: refused, not a file of plain tensors; save the state_dict alone") from error
    except Exception as error:  # a damaged file can raise nearly any exception
        raise InputError(f"{path}: cannot be read as weights: check that it is complete") from error


def state_dict_in(found: Any, path: str | Path, which: Which = "average") -> dict[str, Tensor]:  # noqa: ANN401
    """Finds the state_dict in a container, as float32, with unchanged names.

    Raises:
        InputError: There is none, or more than one.
    """
    if isinstance(found, (list, tuple)) and found:
        found = found[0]  # (state_dict, optimizer, step, ...)
    while isinstance(found, Mapping) and (key := _entry(found, path, which)) is not None:
        found = found[key]
    state = {str(k): v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
    if not state:
        raise InputError(f"{path}: holds no state_dict (a mapping from names to tensors); save the state_dict alone")
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def _entry(found: Mapping[Any, Any], path: str | Path, which: Which) -> Any:  # noqa: ANN401
    """The key under which a checkpoint holds the weights; ``None`` if it is the state_dict itself."""
    last, average = (next((k for k in keys if _has_tensors(found.get(k))), None) for keys in (_LAST, _AVERAGE))
    if last is not None and average is not None and last != average:
        notice(f"{path}: {TWO_NETWORKS.format(which)}")
        return average if which == "average" else last
    if last is not None or average is not None or any(isinstance(value, Tensor) for value in found.values()):
        return average if last is None else last
    others = [k for k, v in found.items() if isinstance(v, Mapping) and any(isinstance(t, Tensor) for t in v.values())]
    if len(others) > 1:
        raise InputError(f"{path}: holds several state_dicts ({', '.join(map(str, others))}); save one alone")
    return others[0] if others else None


def _has_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) or _has_tensors(v) for v in value.values())


def without_prefix(
    state: Mapping[str, Tensor], names: Collection[str], origin: str, which: Which = "average"
) -> tuple[str, dict[str, Tensor]]:
    """Returns the tensors of one network without the prefix of wrappers, such as ``module.``.

    Args:
        state: Names and tensors.
        names: Names of the network, without the prefix.
        origin: Name of the file in error messages.
        which: Weights to take from a file with a network and the average of its weights.

    Returns:
        The prefix that most of ``names`` have in ``state``, and the tensors with this prefix.

    Raises:
        InputError: There are several such networks.
    """
    known, counts = set(names), Counter[str]()
    for name in state:
        parts = name.split(".")
        counts.update(".".join([*parts[:k], ""]) for k in range(len(parts)) if ".".join(parts[k:]) in known)
    whole = [prefix for prefix, count in counts.items() if count == len(known)]
    averaged = [prefix for prefix in whole if re.search("ema|averag|shadow", prefix, re.IGNORECASE)]
    if len(whole) == 2 and len(averaged) == 1:
        notice(f"{origin}: {TWO_NETWORKS.format(which)}")
        whole = averaged if which == "average" else [prefix for prefix in whole if prefix not in averaged]
    if len(whole) > 1:
        raise InputError(
            f"{origin}: holds {len(whole)} such networks, behind {', '.join(map(repr, whole))}; save one alone"
        )
    prefix = whole[0] if whole else max(counts, key=counts.__getitem__, default="")
    return prefix, {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def load_into(
    network: nn.Module, state: Mapping[str, Tensor], origin: str, which: Which = "average", assign: bool = False
) -> None:
    """Loads all tensors or none.

    Args:
        network: The network to load into.
        state: Names and tensors; names may have a prefix, and other tensors may be present.
        origin: Name of the file in error messages.
        which: Weights to load from a file with a network and the average of its weights.
        assign: Use the tensors as parameters instead of copying them, for networks on the meta device.

    Raises:
        InputError: A name or a shape of ``state`` does not match the network.
    """
    own = network.state_dict()
    # Counters of batch normalization are unused in evaluation, and older files lack them.
    needed = [name for name in own if not name.endswith("num_batches_tracked")]
    prefix, state = without_prefix(state, needed, origin, which)
    missing = [name for name in needed if name not in state]
    unexpected = [name for name in state if name not in own]
    if missing or unexpected:
        raise InputError(
            f"{origin}: these weights are of another network: {len(state) - len(unexpected)} names match"
            f"{f' behind {prefix!r}' if prefix else ''}, "
            f"{len(missing)} missing ({', '.join(missing[:2]) or 'none'}), "
            f"{len(unexpected)} unexpected ({', '.join(unexpected[:2]) or 'none'}): use its class and arguments"
        )
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise InputError(
                f"{origin}: {name} has shape {tuple(value.shape)}, the network needs {tuple(own[name].shape)}; "
                "give the network the classes, channels, width and depth of the file"
            )
        if value.device.type != "meta" and not bool(torch.isfinite(value).all()):
            raise InputError(f"{origin}: {name} is NaN or infinite: the weights are damaged, fetch them again")
    network.load_state_dict(state, strict=False, assign=assign)
