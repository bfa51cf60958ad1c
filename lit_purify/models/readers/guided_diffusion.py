"""Checkpoints of guided-diffusion (Dhariwal & Nichol 2021) and improved-diffusion (Nichol & Dhariwal 2021)."""

from __future__ import annotations

from typing import Literal

from lit_purify.errors import InputError, notice
from lit_purify.models.layers import Attention, Downsample, ResidualBlock
from lit_purify.models.readers.assembly import Source, Tensors, assembled, renaming
from lit_purify.models.unet import UNet
from lit_purify.recorded import recorded

_NAMES = {
    ResidualBlock: renaming(
        "in_layers.0=norm1 in_layers.2=conv1 emb_layers.1=level out_layers.0=norm2 out_layers.3=conv2 "
        "skip_connection=skip"
    ),
    Attention: renaming("norm qkv proj_out=out"),
    Downsample: {"op": ""},
}
_ENDS = renaming("time_embed.0=embed.0 time_embed.2=embed.2 input_blocks.0.0=stem out.0=norm out.2=head")


@recorded
def load_guided_diffusion(
    path: Source,
    size: int = 256,
    head_width: int | None = 64,
    heads: int | None = None,
    schedule: Literal["linear", "cosine"] = "linear",
    steps: int = 1000,
    rescale_timesteps: bool = False,
    dropout: float = 0.0,
    heads_upsample: int | None = None,
    new_attention_order: bool = False,
) -> UNet:
    """Loads an unconditional network of guided-diffusion (``256x256_diffusion_uncond.pt``) or improved-diffusion.

    The defaults are those of guided-diffusion. ``cifar10_uncond_50M_500K.pt`` of improved-diffusion needs size 32,
    head_width None, heads 4, the cosine schedule, steps 4000 and rescale_timesteps.

    Names and shapes determine the rest; the assumed attention settings are printed on stderr. A learned variance is
    ignored: samplers here use fixed ones.

    Args:
        path: A file, ``https://...#sha256=...`` or ``hf://organization/name/file``; or the state_dict.
        size: Height and width of the images.
        head_width: Channels of an attention head (``num_head_channels``).
        heads: Number of attention heads, instead of ``head_width`` (``num_heads``).
        schedule: Noise schedule of the training.
        steps: T of the schedule.
        rescale_timesteps: Whether levels were rescaled to 0 .. 1000 for the embedding.
        dropout: Dropout probability for fine-tuning.
        heads_upsample: Number of attention heads on the way up, if it differs (``num_heads_upsample``).
        new_attention_order: Whether queries, keys and values were split before the heads
            (``use_new_attention_order``).

    Raises:
        InputError: The file has another layout, or the network is conditional.
    """
    tensors = Tensors(path, "guided_diffusion")
    origin = tensors.origin
    if "label_emb.weight" in tensors:
        raise InputError(f"{origin}: is class-conditional, but a purifier knows no label: use an unconditional network")
    depth, up = tensors.count("input_blocks.{}."), tensors.count("output_blocks.{}.")
    # The last block of a resolution also changes it; the first such block shows how many there are.
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
    widths = [int(tensors[f"input_blocks.{k}.0.out_layers.3.weight"].shape[0]) for k in first]
    attended = [size // 2**n for n, k in enumerate(first) if f"input_blocks.{k}.1.qkv.weight" in tensors]
    scale_shift = tensors["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * widths[0]
    middle = "middle_block.1.qkv.weight" in tensors
    if any(name.endswith(".qkv.weight") for name in tensors):
        order = "new" if new_attention_order else "legacy"
        many = f"heads of {head_width} channels" if heads is None and head_width else f"{heads or 1} heads"
        many += f", {heads_upsample} on the way up" if heads_upsample else ""
        notice(f"{origin}: read as: {order} attention order, {many}; heads and new_attention_order change it")

    ends = tensors.layer("", _ENDS)
    parts = (
        [f"input_blocks.{k}" for k in range(1, depth)] + ["middle_block"] + [f"output_blocks.{k}" for k in range(up)]
    )
    layers = [f"{part}.{j}" for part in parts for j in range(tensors.count(part + ".{}."))]
    return assembled(
        tensors,
        ends,
        layers,
        _NAMES,
        widths,
        new_attention_order,
        size=size,
        blocks=blocks,
        attention=attended,
        head_width=head_width,
        heads=heads,
        heads_up=heads_upsample,
        dropout=dropout,
        schedule=schedule,
        steps=steps,
        beta_start=0.1 / steps,
        beta_end=20.0 / steps,
        level_scale=1000.0 / steps if rescale_timesteps else 1.0,
        level_shift=1.0,
        scale_shift=scale_shift,
        groups=32,
        resampling="residual" if inside else "conv",
        middle_attention=middle,
    )
