"""Checkpoints of this library: safetensors files with the class and configuration of the network."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lit_purify.atomic import write_whole
from lit_purify.errors import InputError
from lit_purify.models.classifier import Classifier
from lit_purify.models.denoiser import Denoiser
from lit_purify.models.sources import locate
from lit_purify.models.weights import check_file, load_into
from lit_purify.recorded import recorded

_KEY = "lit_purify"
Network = TypeVar("Network", Classifier, Denoiser)


def header(network: Classifier | Denoiser, info: dict[str, Any]) -> str:
    """Returns the class and arguments of a network as JSON.

    Raises:
        InputError: ``network`` is built from other objects, such as a ``Classifier`` around any module.
    """
    kind = type(network)
    # The weights of these files are in this one.
    arguments = {k: v for k, v in network.arguments.items() if not isinstance(v, Path) and k != "pretrained"}
    content = {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments, "info": info}
    try:
        return json.dumps(content)
    except TypeError as error:
        raise InputError(
            f"{kind.__name__} is built from other objects, so no file can rebuild it: keep its state_dict"
        ) from error


def save_network(
    network: Classifier | Denoiser, path: Path, info: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Writes a network with its class and arguments, atomically.

    Args:
        network: A denoiser or classifier that is built from plain values.
        path: A ``.safetensors`` file.
        info: Further JSON values to store (recipe, commit, figures). ``max_level`` of a denoiser is the strongest level
            of its training; stronger levels are refused.
        dtype: Storage type of floats; they are loaded as float32.

    Raises:
        InputError: ``network`` is built from other objects, such as a ``Classifier`` around any module, or its weights
            are NaN or infinite.
    """
    metadata = {_KEY: header(network, info or {})}
    inner = network.network if isinstance(network, Classifier) else network
    state = {
        name: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in inner.state_dict().items()
    }
    damaged = [name for name, value in state.items() if not bool(torch.isfinite(value).all())]
    if damaged:
        raise InputError(
            f"{path}: not written: {damaged[0]} is not finite as {str(dtype).removeprefix('torch.')}: lower the "
            "learning rate if the training diverged, or store 32 bits"
        )
    # Written by Python, so that a full disk raises an OSError.
    write_whole(path, save(state, metadata=metadata))


def saved_step(path: Path) -> int | None:
    """Returns the training step of a file of ``save_network``; ``None`` without such a file or without a step."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "{}"))
    except (OSError, SafetensorError):
        return None
    return header.get("info", {}).get("step")


@recorded
def load_denoiser(path: str | Path) -> Denoiser:
    """Loads a denoiser from a file of ``train.py``; see ``load_classifier``."""
    return _load(locate(path), Denoiser)  # type: ignore[type-abstract]


@recorded
def load_classifier(path: str | Path) -> Classifier:
    """Loads a classifier from a ``.safetensors`` file of ``train.py``.

    Args:
        path: The file, ``https://...#sha256=...`` or ``hf://organization/name/file``.

    Raises:
        InputError: The file is missing or damaged, not of ``save_network``, or not a classifier.
    """
    return _load(locate(path), Classifier)


def _load(path: Path, kind: type[Network]) -> Network:
    wanted = kind.__name__.lower()
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except SafetensorError as error:
        raise InputError(
            f"{path}: not a safetensors file ({error}): check that it is complete; public checkpoints have their "
            "own loaders, such as load_score_sde"
        ) from error
    if header is None:
        raise InputError(f"{path}: carries no configuration; name the network's class and give the file as checkpoint")
    module, _, name = header["class_path"].rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{path}: its class {header['class_path']} is not installed: install its package") from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise InputError(f"{path}: holds a {name}, but a {wanted} is needed: give another file")
    try:
        with torch.random.fork_rng(devices=[]):
            network = found(**header["init_args"])
    except TypeError as error:
        raise InputError(f"{path}: was written by another version of {name} ({error}): export it again") from error
    load_into(network.network if isinstance(network, Classifier) else network, state, str(path))
    if isinstance(network, Denoiser):
        info = header.get("info", {})
        network.schedule = network.schedule.trained_to(info.get("max_level"))
        network.validation = info.get("metrics", {}).get("val/loss")
    network.origin = path.name
    return network
