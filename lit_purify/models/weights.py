"""Reading weights: one state_dict out of whatever people keep them in."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_purify.errors import InputError
from lit_purify.models.sources import locate

_CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "params")
_PREFIXES = ("module.", "model.", "network.")


def check_file(path: Path) -> None:
    """Raises an ``InputError`` when ``path`` cannot hold weights."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; load_diffusers reads those of diffusers, for others name a file in it")
    if not path.is_file():
        ours = path.name == "model.safetensors"
        remedy = (
            "train it first (train.py fit --config configs/train/...), or check the path" if ours else "check the path"
        )
        raise InputError(f"{path}: no such file; {remedy}")
    with path.open("rb") as stream:
        head = stream.read(512)
    if not head:
        raise InputError(f"{path}: the file is empty; fetch it again")
    # Not every file that begins with '<': the length that opens a safetensors file may read so.
    if re.match(rb"\s*<(!doctype|!--|html|head|\?xml)", head, re.IGNORECASE):
        raise InputError(f"{path}: this is an HTML page, not weights; download the file itself")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: this is a git-lfs pointer, not weights; run 'git lfs pull'")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The state_dict in a ``.safetensors`` file or a file of ``torch.save``, float32, common prefixes removed.

    Args:
        path: The file; ``https://...#sha256=...`` or ``hf://organization/name/file`` is fetched first (``locate``).

    Raises:
        InputError: The file is missing, is not weights, or holds more than tensors and plain containers.
    """
    return state_dict_in(read_container(path), path)


def read_container(path: str | Path) -> Any:  # noqa: ANN401
    """Whatever a ``.safetensors`` file or a file of ``torch.save`` holds: tensors in plain containers.

    Raises:
        InputError: The file is missing, is not weights, or holds more.
    """
    path = locate(path)
    check_file(path)
    found: Any
    if path.suffix == ".safetensors":
        try:
            found = load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path}: not a safetensors file ({error}); is it complete?") from error
    else:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise InputError(f"{path}: refused, not a file of plain tensors; save the state_dict alone") from error
        except Exception as error:  # a damaged file makes the reader raise nearly anything
            raise InputError(f"{path}: cannot be read as weights; is the download complete?") from error
    return found


def state_dict_in(found: Any, path: str | Path) -> dict[str, Tensor]:  # noqa: ANN401
    """The state_dict in a container, float32, common prefixes removed.

    Raises:
        InputError: There is none.
    """
    if isinstance(found, (list, tuple)) and found and isinstance(found[0], Mapping):
        found = found[0]  # (state_dict, optimizer, step, ...)
    for key in _CONTAINERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"{path}: holds no state_dict (a mapping from names to tensors)")
    prefix = _common_prefix(found)
    return {
        str(name).removeprefix(prefix): value.float() if value.is_floating_point() else value
        for name, value in found.items()
    }


def load_into(network: nn.Module, state: Mapping[str, Tensor], origin: str, assign: bool = False) -> None:
    """Loads every tensor or none.

    Args:
        network: What is loaded.
        state: Names and tensors.
        origin: What error messages call them.
        assign: Make the tensors the parameters, instead of copying them; for networks on the meta device.

    Raises:
        InputError: A name or a shape of ``state`` does not match the network.
    """
    own = network.state_dict()
    # A network whose own names share a prefix gets it back.
    prefix = _common_prefix(own)
    state = {prefix + name.removeprefix(prefix): value for name, value in state.items()}
    # Counters of batch normalization do not enter a forward pass in evaluation, and older files lack them.
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    if missing or unexpected:
        raise InputError(
            f"{origin}: these weights are of another network: {len(state) - len(unexpected)} names match, "
            f"{len(missing)} missing ({', '.join(missing[:2]) or 'none'}), "
            f"{len(unexpected)} unexpected ({', '.join(unexpected[:2]) or 'none'})"
        )
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise InputError(
                f"{origin}: {name} has shape {tuple(value.shape)}, the network needs {tuple(own[name].shape)}; "
                "do classes, channels, width and depth agree?"
            )
        if value.device.type != "meta" and not bool(torch.isfinite(value).all()):
            raise InputError(f"{origin}: {name} holds values that are not finite: the weights are damaged")
    network.load_state_dict(state, strict=False, assign=assign)


def _common_prefix(names: Iterable[object]) -> str:
    """What wrappers such as ``DataParallel`` put before every name, several of them in turn."""
    rest, common = [str(name) for name in names], ""
    while prefix := next((p for p in _PREFIXES if rest and all(name.startswith(p) for name in rest)), ""):
        rest, common = [name.removeprefix(prefix) for name in rest], common + prefix
    return common
