"""Checkpoint folders of diffusers' ``UNet2DModel``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_purify.errors import InputError, notice
from lit_purify.models.layers import Attention, ResidualBlock
from lit_purify.models.readers.assembly import Tensors, assembled, cosines_first, renaming, sequence
from lit_purify.models.sources import locate
from lit_purify.models.unet import UNet
from lit_purify.models.weights import TWO_NETWORKS, Which, read_state_dict
from lit_purify.recorded import recorded

_RESIDUAL = renaming("norm1 conv1 time_emb_proj=level norm2 conv2 conv_shortcut=skip")
_ATTENTION = renaming("group_norm=norm to_q=q to_k=k to_v=v to_out.0=out")
_OLD_ATTENTION = renaming("group_norm=norm query=q key=k value=v proj_attn=out")
_ENDS = renaming(
    "time_embedding.linear_1=embed.0 time_embedding.linear_2=embed.2 conv_in=stem conv_norm_out=norm conv_out=head"
)
_BLOCKS = [f"{kind}Block2D" for kind in ("Down", "AttnDown", "ResnetDownsample", "Up", "AttnUp", "ResnetUpsample")]
# Other values are not implemented; the first is the default.
_ONLY: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "act_fn": ("silu", "swish"),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2D",),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
}
_SCHEDULERS = ("DDPM", "DDIM", "PNDM", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep")
_ONLY_SCHEDULER: dict[str, tuple[Any, ...]] = {
    # Schedulers that noise as DDPM does; others (score_sde, Karras et al.) number noise levels differently.
    "_class_name": tuple(f"{name}Scheduler" for name in _SCHEDULERS),
    "prediction_type": ("epsilon",),
    "beta_schedule": ("linear", "squaredcos_cap_v2"),
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False,),
}


@recorded
def load_diffusers(path: str | Path, dropout: float = 0.0, size: int | None = None, which: Which = "average") -> UNet:
    """Loads a ``UNet2DModel``, or the ``unet`` of an unconditional pipeline such as google/ddpm-cifar10-32.

    Args:
        path: The folder, or ``hf://organization/name``. The scheduler's configuration is taken from the folder, its
            ``scheduler`` folder or the one beside it; without one, the schedule is linear with 1000 steps.
        dropout: Dropout probability for fine-tuning.
        size: Height and width of the images, if the folder does not define it.
        which: Weights to read from a training checkpoint: ``average`` (``unet_ema``) or ``last`` (``unet``).

    Raises:
        InputError: The folder lacks a file, or the network is not supported.
    """
    folder = locate(path)
    parts = [folder / name for name in ("unet_ema", "unet") if (folder / name / "config.json").is_file()]
    if len(parts) == 2:
        notice(f"{folder}: {TWO_NETWORKS.format(which)}")
    inner = (parts or [folder])[-1 if which == "last" else 0]
    config = _json(inner / "config.json")
    if size is not None:
        config["sample_size"] = size
    schedulers = [
        place / "scheduler_config.json" for place in (folder / "scheduler", folder, inner, folder.parent / "scheduler")
    ]
    scheduler = next((_json(file) for file in schedulers if file.is_file()), None)
    return diffusers_unet(_weights(inner), config, scheduler, dropout, origin=str(path))


def _weights(folder: Path) -> dict[str, Tensor]:
    """Reads the weights of one file or of the shards in an index, also of a variant such as fp16."""
    name = "diffusion_pytorch_model"
    for kind in ("safetensors", "bin"):
        found = [file for file in sorted(folder.glob(f"{name}*.{kind}")) if "-of-" not in file.name]
        if found:
            return read_state_dict(min(found, key=lambda file: (len(file.name), file.name)))
        for index in sorted(folder.glob(f"{name}*.{kind}.index*.json")):
            shards = sorted(set(_json(index).get("weight_map", {}).values()))
            return {key: value for shard in shards for key, value in read_state_dict(folder / shard).items()}
    raise InputError(f"{folder}: holds no {name}.safetensors or {name}.bin: download the whole folder")


def diffusers_unet(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    scheduler: Mapping[str, Any] | None = None,
    dropout: float = 0.0,
    origin: str = "state_dict",
) -> UNet:
    """Builds a UNet from state_dict, ``config.json`` and ``scheduler_config.json`` of diffusers.

    Raises:
        InputError: A tensor is missing or left over, or a setting is not supported.
    """
    scheduler = scheduler or {}
    blocks = ("layers_per_block", "block_out_channels", "down_block_types", "up_block_types")
    missing = [name for name in ("sample_size", "in_channels", *blocks) if not config.get(name)]
    if missing or not isinstance(config["sample_size"], int):
        remedy = "use that of a UNet2DModel" if set(missing) - {"sample_size"} else "give size, the images' height"
        raise InputError(f"{origin}: config.json gives no {(missing or ['single sample_size'])[0]}: {remedy}")
    _check(config, _ONLY, origin)
    _check(scheduler, _ONLY_SCHEDULER, origin)
    groups, scale_shift = config.get("norm_num_groups", 32), config.get("resnet_time_scale_shift") == "scale_shift"
    middle, given = config.get("add_attention", True), config.get("attn_norm_num_groups")
    if given not in (None, groups) or (middle and scale_shift and given is None):
        raise InputError(f"{origin}: attn_norm_num_groups = {given} is not supported: use a network without it")
    down, up = config["down_block_types"], config["up_block_types"]
    if unknown := [name for name in (*down, *up) if name not in _BLOCKS]:
        raise InputError(
            f"{origin}: blocks of type {unknown[0]} are not supported: use a network of {', '.join(_BLOCKS)}"
        )
    size, count = config["sample_size"], config["layers_per_block"]
    conv = "conv" if config.get("downsample_padding", 1) else "conv_end"
    tensors = Tensors(state, "diffusers", origin)
    inside = "down_blocks.0.downsamplers.0.conv1.weight" in tensors
    old = any(name.endswith(".query.weight") for name in tensors)
    ends = tensors.layer("", _ENDS)
    if not config.get("flip_sin_to_cos", True):
        ends["embed.0.weight"] = cosines_first(ends["embed.0.weight"])
    parts = [(f"down_blocks.{k}", count) for k in range(len(down))] + [("mid_block", 2)]
    parts += [(f"up_blocks.{k}", count + 1) for k in range(len(up))]
    layers = sequence(tensors, parts, "resnets", "attentions", "downsamplers.0", "upsamplers.0")
    return assembled(
        tensors,
        ends,
        layers,
        {ResidualBlock: _RESIDUAL, Attention: _OLD_ATTENTION if old else _ATTENTION},
        config["block_out_channels"],
        size=size,
        blocks=count,
        attention=[size // 2**k for k, name in enumerate(down) if name.startswith("Attn")],
        head_width=config.get("attention_head_dim", 8),
        dropout=dropout,
        schedule="linear" if scheduler.get("beta_schedule", "linear") == "linear" else "cosine",
        steps=scheduler.get("num_train_timesteps", 1000),
        beta_start=scheduler.get("beta_start", 1e-4),
        beta_end=scheduler.get("beta_end", 2e-2),
        level_shift=1.0,
        frequency_shift=config.get("freq_shift", 0),
        scale_shift=scale_shift,
        groups=groups,
        norm_eps=config.get("norm_eps", 1e-5),
        resampling="residual" if inside else conv,
        middle_attention=middle,
    )


def _check(config: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]], origin: str) -> None:
    for name, allowed in only.items():
        if config.get(name, allowed[0]) not in allowed:
            raise InputError(f"{origin}: {name} = {config[name]} is not supported: use a network with {allowed[0]}")


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except OSError as error:
        raise InputError(f"{file}: cannot be read: give the folder of a diffusers UNet2DModel") from error
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON: check that it is complete") from error
    if not isinstance(found, dict):
        raise InputError(f"{file}: holds no settings: give the folder of a diffusers UNet2DModel")
    return found
