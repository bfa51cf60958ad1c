"""Checkpoints of score_sde: DDPM++ and NCSN++ trained with the VP SDE (Song et al., ICLR 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lit_purify.errors import InputError
from lit_purify.models.layers import Attention, ResidualBlock
from lit_purify.models.readers.assembly import DDPM, Source, Tensors, assembled, cosines_first, renaming
from lit_purify.models.unet import UNet
from lit_purify.models.weights import read_container, state_dict_in
from lit_purify.recorded import recorded

_NAMES = {
    ResidualBlock: renaming("GroupNorm_0=norm1 Conv_0=conv1 Dense_0=level GroupNorm_1=norm2 Conv_1=conv2 Conv_2=skip"),
    Attention: renaming("GroupNorm_0=norm q k v out"),
}


@recorded
def load_score_sde(path: Source, size: int = 32, continuous: bool = True, dropout: float = 0.0) -> UNet:
    """Loads a VP network of score_sde with BigGAN blocks, such as ``checkpoint_8.pth``: DDPM++, or NCSN++ (pyramid).

    The averaged weights of a training checkpoint are read.

    Args:
        path: A file, ``https://...#sha256=...`` or ``hf://organization/name/file``; or the state_dict.
        size: Height and width of the images.
        continuous: Whether it was trained in continuous time; otherwise with 1000 linear steps.
        dropout: Dropout probability for fine-tuning.

    Raises:
        InputError: The file has another layout.
    """
    state, origin = path, "state_dict"
    if not isinstance(path, Mapping):
        found, origin = read_container(path), str(path)
        state = state_dict_in(found, path)
        if isinstance(found, Mapping) and "ema" in found:
            state |= _averaged(found["ema"], state, origin)
    tensors = Tensors(state, "score_sde", origin)
    tensors.pop("sigmas", None)
    if tensors["all_modules.0.weight"].shape[:1] == tensors["all_modules.2.weight"].shape[:1]:
        raise InputError(f"{origin}: its levels are embedded by Fourier features: use a VP network")
    count = tensors.count("all_modules.{}.")
    names = [f"all_modules.{k}" for k in range(3, count - 2)]
    pyramid = [name for name in names if f"{name}.Conv2d_0.weight" in tensors or f"{name}.Conv2d_0.bias" in tensors]
    # Input and output channels; layers without them are attention.
    residual = {name: _channels(tensors, name) for name in names if f"{name}.Conv_0.weight" in tensors}
    order = [name for name in names if name not in pyramid]
    changing = [name for name, (a, b) in residual.items() if a == b and f"{name}.Conv_2.weight" in tensors]
    if len(changing) < 2:
        raise InputError(f"{origin}: has no BigGAN blocks that change the resolution: use a network with them")
    halving = [order.index(name) for name in changing[: len(changing) // 2]]
    first = [0, *(k + 1 for k in halving)]
    widths = [_channels(tensors, order[k])[1] for k in first]
    ends = {
        **tensors.layer("all_modules.0", {"": "embed.0"}),
        **tensors.layer("all_modules.1", {"": "embed.2"}),
        **tensors.layer("all_modules.2", {"": "stem"}),
        **tensors.layer(f"all_modules.{count - 2}", {"": "norm"}),
        **tensors.layer(f"all_modules.{count - 1}", {"": "head"}),
    }
    ends["embed.0.weight"] = cosines_first(ends["embed.0.weight"])
    for k, name in enumerate(pyramid):
        ends |= tensors.layer(name, {"Conv2d_0": f"pyramid.{k}"})
    for name in order:
        for k, part in enumerate(("q", "k", "v", "out") if name not in residual else ()):
            tensors[f"{name}.{part}.weight"] = tensors.take(f"{name}.NIN_{k}.W").T
            tensors[f"{name}.{part}.bias"] = tensors.take(f"{name}.NIN_{k}.b")
    return assembled(
        tensors,
        ends,
        order,
        _NAMES,
        widths,
        size=size,
        blocks=sum(name in residual for name in order[: halving[0]]),
        attention=[size // 2**n for n, k in enumerate(first) if order[k + 1] not in residual],
        dropout=dropout,
        schedule="continuous" if continuous else "linear",
        # score_sde embeds 999 times the time.
        level_scale=0.999 if continuous else 1.0,
        level_shift=0.0 if continuous else 1.0,
        group_width=4,
        rescale=True,
        resampling="fir" if pyramid else "residual_conv",
        up_attention="last",
        input_pyramid=bool(pyramid),
        **DDPM,
    )


def _channels(tensors: Tensors, name: str) -> tuple[int, int]:
    out, into = tensors[f"{name}.Conv_0.weight"].shape[:2]
    return into, out


def _averaged(ema: Any, state: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:  # noqa: ANN401
    """Returns the averaged parameters, which the file lists without names in the network's order."""
    names = [name for name in state if not name.endswith("sigmas")]
    values = ema.get("shadow_params", []) if isinstance(ema, Mapping) else []
    fits = len(values) == len(names) and all(
        isinstance(value, Tensor) and value.shape == state[name].shape
        for name, value in zip(names, values, strict=True)
    )
    if not fits:
        raise InputError(
            f"{origin}: its {len(values)} averaged parameters (ema) do not fit the {len(names)} of its model: save the "
            "averaged state_dict alone"
        )
    return {name: value.float() for name, value in zip(names, values, strict=True)}
