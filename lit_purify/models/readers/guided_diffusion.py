"""Checkpoints of guided-diffusion (Dhariwal & Nichol 2021) and improved-diffusion (Nichol & Dhariwal 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from lit_purify.errors import InputError
from lit_purify.models.readers.assembly import Layer, Tensors, assembled, attention, multipliers, noise_half
from lit_purify.models.unet import UNet
from lit_purify.models.weights import read_state_dict

_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "level",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "skip",
}
_ATTENTION = {"norm": "norm", "qkv": "qkv", "proj_out": "out"}
_ENDS = {
    "time_embed.0": "embed.0",
    "time_embed.2": "embed.2",
    "input_blocks.0.0": "stem",
    "out.0": "norm",
    "out.2": "head",
}


def load_guided_diffusion(
    path: str,
    size: int = 256,
    head_width: int | None = 64,
    heads: int | None = None,
    schedule: Literal["linear", "cosine"] = "linear",
    steps: int = 1000,
    rescale_timesteps: bool = False,
    dropout: float = 0.0,
) -> UNet:
    """An unconditional network of guided-diffusion, such as ``256x256_diffusion_uncond.pt``; see the ``_unet`` form.

    Args:
        path: A file, ``https://...#sha256=...`` or ``hf://organization/name/file``.
        size: Height and width of its images.
        head_width: Channels of an attention head.
        heads: Number of attention heads, instead of ``head_width``.
        schedule: Noise schedule that it was trained with.
        steps: T of the schedule.
        rescale_timesteps: Whether levels were rescaled to 0 .. 1000 for the embedding.
        dropout: For fine-tuning.

    Raises:
        InputError: The file is not one of these.
    """
    state = read_state_dict(path)
    return guided_diffusion_unet(
        state, size, head_width, heads, schedule, steps, rescale_timesteps, dropout, origin=str(path)
    )


def load_improved_diffusion(
    path: str,
    size: int = 32,
    heads: int = 4,
    schedule: Literal["linear", "cosine"] = "cosine",
    steps: int = 4000,
    rescale_timesteps: bool = True,
    dropout: float = 0.0,
) -> UNet:
    """An unconditional network of improved-diffusion, such as ``cifar10_uncond_50M_500K.pt``.

    The defaults are those of that file.

    Args:
        path: See ``load_guided_diffusion``.
        size: See ``load_guided_diffusion``.
        heads: Number of attention heads.
        schedule: See ``load_guided_diffusion``.
        steps: See ``load_guided_diffusion``.
        rescale_timesteps: See ``load_guided_diffusion``.
        dropout: See ``load_guided_diffusion``.
    """
    state = read_state_dict(path)
    return improved_diffusion_unet(state, size, heads, schedule, steps, rescale_timesteps, dropout, origin=str(path))


def improved_diffusion_unet(
    state: Mapping[str, Tensor],
    size: int = 32,
    heads: int = 4,
    schedule: Literal["linear", "cosine"] = "cosine",
    steps: int = 4000,
    rescale_timesteps: bool = True,
    dropout: float = 0.0,
    origin: str = "state_dict",
) -> UNet:
    """``guided_diffusion_unet`` with the defaults of improved-diffusion: the layout is the same."""
    return guided_diffusion_unet(state, size, None, heads, schedule, steps, rescale_timesteps, dropout, origin)


def guided_diffusion_unet(
    state: Mapping[str, Tensor],
    size: int = 256,
    head_width: int | None = 64,
    heads: int | None = None,
    schedule: Literal["linear", "cosine"] = "linear",
    steps: int = 1000,
    rescale_timesteps: bool = False,
    dropout: float = 0.0,
    origin: str = "state_dict",
) -> UNet:
    """A UNet from a state_dict of guided-diffusion; what the names and shapes show need not be given.

    Of a learned variance nothing is kept: samplers here use fixed ones.

    Raises:
        InputError: A tensor is missing or left over, or the network is conditional.
    """
    tensors = Tensors(state, "guided_diffusion", origin)
    if "label_emb.weight" in tensors:
        raise InputError(f"{origin}: is class-conditional, but a purifier knows no label: take an unconditional one")
    width, channels = tensors.shape("input_blocks.0.0.weight")[:2]
    depth, up = tensors.count("input_blocks.{}."), tensors.count("output_blocks.{}.")
    # The last block of a resolution also changes it: the first that does tells how many there are.
    changes = [
        (k, name)
        for k in range(up)
        for j in (1, 2)
        for name in ("conv", "in_layers.0")
        if f"output_blocks.{k}.{j}.{name}.weight" in tensors
    ]
    inside = bool(changes) and changes[0][1] != "conv"
    blocks = changes[0][0] if changes else up - 1
    first = range(1, depth, blocks + 1)
    widths = [int(tensors.shape(f"input_blocks.{k}.0.out_layers.3.weight")[0]) for k in first]
    config = {
        "channels": channels,
        "size": size,
        "width": width,
        "multipliers": multipliers(widths, width, origin),
        "blocks": blocks,
        "attention": [size // 2**n for n, k in enumerate(first) if f"input_blocks.{k}.1.qkv.weight" in tensors],
        "head_width": head_width,
        "heads": heads,
        "dropout": dropout,
        "schedule": schedule,
        "steps": steps,
        "beta_start": 0.1 / steps,
        "beta_end": 20.0 / steps,
        "embedding": 4 * width,
        "level_scale": 1000.0 / steps if rescale_timesteps else 1.0,
        "level_shift": 1.0,
        "scale_shift": tensors.shape("input_blocks.1.0.emb_layers.1.weight")[0] == 2 * widths[0],
        "groups": 32,
        "resampling": "residual" if inside else "conv",
        "middle_attention": "middle_block.1.qkv.weight" in tensors,
    }

    def layer(prefix: str) -> Layer:
        if f"{prefix}.qkv.weight" in tensors:
            taken = tensors.layer(prefix, _ATTENTION)
            channels_here = len(taken["norm.weight"])
            if head_width is not None and heads is None and channels_here % head_width:
                raise InputError(f"{origin}: {channels_here} channels do not divide into heads of {head_width}")
            count = heads or (1 if head_width is None else channels_here // head_width)
            return attention(taken, count)
        for resample, own in (("op", ""), ("conv", "conv")):
            if f"{prefix}.{resample}.weight" in tensors:
                return tensors.layer(prefix, {resample: own})
        return tensors.layer(prefix, _RESIDUAL)

    ends = tensors.layer("", _ENDS)
    prefixes = [
        f"input_blocks.{k}.{j}" for k in range(1, depth) for j in range(tensors.count(f"input_blocks.{k}.{{}}."))
    ]
    prefixes += [f"middle_block.{j}" for j in range(tensors.count("middle_block.{}."))]
    prefixes += [f"output_blocks.{k}.{j}" for k in range(up) for j in range(tensors.count(f"output_blocks.{k}.{{}}."))]
    layers = [layer(prefix) for prefix in prefixes]
    tensors.finish()
    return assembled(config, noise_half(ends, channels, origin), layers, origin)
