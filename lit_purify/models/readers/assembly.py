"""Shared parts of the readers: they take tensors from another library's state_dict and build a UNet from them.

The public networks all have the same sequence of residual blocks, attention and changes of resolution. A reader
therefore defines the configuration, the names of the layers in order, and the names within each kind of layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from lit_purify.errors import InputError
from lit_purify.models.layers import Attention, Downsample, Upsample
from lit_purify.models.unet import UNet
from lit_purify.models.weights import load_into, read_state_dict, without_prefix

DDPM: dict[str, Any] = {"head_width": None, "frequency_shift": 1, "scale_shift": False, "groups": 32, "norm_eps": 1e-6}
DDPM["middle_attention"] = True
"""Arguments of ``UNet`` shared by the networks of DDPM and score_sde."""

_RESAMPLING: dict[type, dict[str, str]] = {Downsample: {"conv": ""}, Upsample: {"conv": "conv"}}
_MATRICES = ("q.weight", "k.weight", "v.weight", "qkv.weight", "out.weight")

Source = str | Path | Mapping[str, Tensor]
"""A file (URLs ``https://...#sha256=...`` and ``hf://organization/name/file`` are downloaded), or a state_dict."""

Layer = dict[str, Tensor]
"""Tensors of one layer, by the UNet's names within the layer."""

_SIGNS = {
    "score_sde": "all_modules.0.weight",
    "guided_diffusion": "input_blocks.0.0.weight",
    "diffusers": "down_blocks.0.resnets.0.conv1.weight",
    "ddpm": "down.0.block.0.conv1.weight",
    "denoiser": "down.0.0.conv1.weight",
}


class Tensors(dict[str, Tensor]):
    """A state_dict whose entries are removed one by one, so that unused entries are found.

    Args:
        source: A file, or names and tensors.
        dialect: The expected layout, read by ``load_<dialect>``.
        origin: Name of the file in error messages.
    """

    def __init__(self, source: Source, dialect: str, origin: str | None = None) -> None:
        state = source if isinstance(source, Mapping) else read_state_dict(source)
        self.origin = origin or ("state_dict" if isinstance(source, Mapping) else str(source))
        super().__init__(without_prefix(state, [_SIGNS[dialect]], self.origin)[1])
        self._dialect, self._count = dialect, len(self)
        self[_SIGNS[dialect]]  # raises if the file has another layout

    def __missing__(self, name: str) -> Tensor:
        for dialect, sign in _SIGNS.items():
            if dialect != self._dialect and any(f".{known}".endswith(f".{sign}") for known in self):
                raise InputError(f"{self.origin}: not of load_{self._dialect}: read it with load_{dialect}")
        need = f"{name} is missing, which load_{self._dialect} needs"
        raise InputError(f"{self.origin}: {need}: check that the network is right and the file complete")

    def take(self, name: str) -> Tensor:
        """Removes and returns one tensor."""
        found = self[name]
        del self[name]
        return found

    def layer(self, prefix: str, names: Mapping[str, str]) -> Layer:
        """Removes and returns weights and biases of a layer.

        Args:
            prefix: Name of the layer in the file.
            names: Maps names within the layer from the file to the UNet (both may be empty); ``skip`` is optional.
        """
        return {
            _joined(own, leaf): self.take(_joined(prefix, foreign, leaf))
            for foreign, own in names.items()
            for leaf in ("weight", "bias")
            if own != "skip" or _joined(prefix, foreign, leaf) in self
        }

    def count(self, pattern: str) -> int:
        """Returns for how many k = 0, 1, ... without a gap ``pattern.format(k)`` begins the name of a tensor."""
        return next(k for k in itertools.count() if not any(name.startswith(pattern.format(k)) for name in self))

    def finish(self) -> None:
        """Raises an ``InputError`` if tensors are left."""
        if self:
            some = ", ".join(itertools.islice(self, 2)) + (" ..." if len(self) > 2 else "")
            raise InputError(
                f"{self.origin}: {self._count - len(self)} tensors match load_{self._dialect}, {len(self)} are "
                f"unexpected ({some}): it is another network, use the reader of its code"
            )


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def sequence(
    tensors: Tensors, levels: Iterable[tuple[str, int]], block: str, attention: str, *changes: str
) -> list[str]:
    """Returns the names of existing layers on the way down or up, in order.

    Args:
        tensors: The file.
        levels: Name and number of blocks of each resolution.
        block: Name of the blocks.
        attention: Name of the attention after each block.
        changes: Names of the layers that change the resolution.
    """
    parts = (
        f"{level}.{part}"
        for level, count in levels
        for part in (*(f"{name}.{k}" for k in range(count) for name in (block, attention)), *changes)
    )
    return [part for part in parts if any(name.startswith(f"{part}.") for name in tensors)]


def assembled(
    tensors: Tensors,
    ends: Layer,
    layers: Sequence[str],
    names: Mapping[type, Mapping[str, str]],
    widths: Iterable[int],
    ordered: bool = True,
    **config: Any,  # noqa: ANN401
) -> UNet:
    """Builds a UNet with weights; the shapes of the first layers and ``widths`` determine some of its arguments.

    Args:
        tensors: The file; all tensors must be used.
        ends: Tensors of ``embed``, ``stem``, ``norm`` and ``head`` and others that keep their place, by full name.
        layers: Names of all other layers, in the order of ``UNet.layers``.
        names: Maps names within a layer from the file to the UNet, for each kind of layer.
        widths: Channels at each resolution.
        ordered: See ``attention``.
        config: Further arguments of ``UNet``.
    """
    (width, channels), (embedding, sinusoids) = (ends[f"{name}.weight"].shape[:2] for name in ("stem", "embed.0"))
    multipliers, origin = [w / width for w in widths], tensors.origin
    found = len(ends["head.bias"])
    if found not in (channels, 2 * channels) or found != len(ends["head.weight"]):
        raise InputError(
            f"{origin}: {found} output channels for {channels} input channels: use a network that predicts noise"
        )
    if any(m % 1 for m in multipliers):
        raise InputError(f"{origin}: channels {list(widths)} are not multiples of {width}: use another network")
    config |= {"channels": channels, "width": width, "multipliers": [int(m) for m in multipliers]}
    # Skips initialization: the tensors of the file become the parameters.
    with torch.device("meta"):
        network = UNet(**config, embedding=embedding, sinusoids=sinusoids)
    # The noise precedes the learned variance (Nichol & Dhariwal), which samplers here do not use.
    state = ends | {f"head.{leaf}": ends[f"head.{leaf}"][:channels] for leaf in ("weight", "bias")}
    own = list(network.layers())
    if len(own) != len(layers):
        raise InputError(
            f"{origin}: has {len(layers)} layers where its structure needs {len(own)}: check that it is complete"
        )
    for (name, module), prefix in zip(own, layers, strict=True):
        layer = tensors.layer(prefix, names.get(type(module), _RESAMPLING.get(type(module), {})))
        if isinstance(module, Attention):
            layer = attention(layer, module, ordered, origin)
        state |= {f"{name}.{leaf}": tensor for leaf, tensor in layer.items()}
    tensors.finish()
    load_into(network, state, origin, assign=True)
    network.origin = origin.partition("#")[0].rstrip("/").rpartition("/")[2]
    return network


def attention(layer: Layer, module: Attention, ordered: bool, origin: str) -> Layer:
    """Converts attention weights to 1x1 convolutions with queries, keys and values in one.

    Args:
        layer: ``norm``, ``out`` and ``q``, ``k``, ``v`` or ``qkv``.
        module: The target layer.
        ordered: Whether ``qkv`` is ordered (q k v), (head), (channel), as here, and not (head), (q k v), (channel).
        origin: Name of the file in error messages.

    Raises:
        InputError: The shapes do not match.
    """
    width, (heads, head_width) = len(layer["norm.weight"]), (module.style.heads, module.style.head_width)
    for name, value in layer.items():
        rows = 3 * width if name.startswith("qkv") else width
        if value.numel() != (rows * width if name in _MATRICES else rows) or len(value) != rows:
            shape = tuple(value.shape)
            raise InputError(
                f"{origin}: attention over {width} channels has a {name} of shape {shape}: use another file"
            )
    if width % (heads or head_width or 1):
        parts = f"{heads} heads" if heads else f"heads of {head_width}"
        raise InputError(f"{origin}: {width} channels do not divide into {parts}: set heads or head_width")
    for leaf in ("weight", "bias"):
        if f"q.{leaf}" in layer:
            layer[f"qkv.{leaf}"] = torch.cat([layer.pop(f"{part}.{leaf}") for part in "qkv"])
        elif not ordered:
            order = "(n three c) ... -> (three n c) ..."
            layer[f"qkv.{leaf}"] = rearrange(layer[f"qkv.{leaf}"], order, three=3, n=module.heads)
    for name in ("qkv.weight", "out.weight"):
        layer[name] = layer[name].reshape(*layer[name].shape[:2], 1, 1)
    return layer


def cosines_first(weight: Tensor) -> Tensor:
    """Reorders input columns of the first embedding layer of networks whose sinusoidal embedding has sines first."""
    sines, cosines = weight.chunk(2, dim=1)
    return torch.cat((cosines, sines), dim=1)


def renaming(text: str) -> dict[str, str]:
    """Parses names within a layer, from the file's to the UNet's: ``norm1 temb_proj=level`` is {norm1: norm1, ...}."""
    return {word.partition("=")[0]: word.rpartition("=")[2] for word in text.split()}
