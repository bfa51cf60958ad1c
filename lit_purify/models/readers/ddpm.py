"""Checkpoints of the PyTorch ports of DDPM (Ho et al. 2020), as in the code of DDIM and of Lee & Kim (SVHN)."""

from __future__ import annotations

from lit_purify.models.readers.assembly import (
    DDPM,
    Layer,
    Source,
    Tensors,
    assembled,
    attention,
    cosines_first,
    renaming,
)
from lit_purify.models.unet import UNet
from lit_purify.recorded import recorded

_RESIDUAL = renaming("norm1 conv1 temb_proj=level norm2 conv2 nin_shortcut=skip")
_ATTENTION = renaming("norm q k v proj_out=out")
_ENDS = renaming("temb.dense.0=embed.0 temb.dense.1=embed.2 conv_in=stem norm_out=norm conv_out=head")


@recorded
def load_ddpm(path: Source, size: int = 32, steps: int = 1000, dropout: float = 0.0) -> UNet:
    """A DDPM in the layout of its PyTorch ports; of a list (state_dict, optimizer, ...) the first entry.

    Args:
        path: A file, ``https://...#sha256=...`` or ``hf://organization/name/file``; or the state_dict.
        size: Height and width of its images.
        steps: T of the linear schedule, betas 1e-4 .. 2e-2.
        dropout: For fine-tuning.

    Raises:
        InputError: The file is not one of these.
    """
    tensors = Tensors(path, "ddpm")
    levels, blocks = tensors.count("down.{}."), tensors.count("down.0.block.{}.")
    widths = [int(tensors[f"down.{k}.block.0.conv1.weight"].shape[0]) for k in range(levels)]
    attended = [size // 2**k for k in range(levels) if f"down.{k}.attn.0.q.weight" in tensors]
    ends = tensors.layer("", _ENDS)
    ends["embed.0.weight"] = cosines_first(ends["embed.0.weight"])
    layers: list[Layer] = []

    def level(prefix: str, count: int, change: str, own: str) -> None:
        for j in range(count):
            layers.append(tensors.layer(f"{prefix}.block.{j}", _RESIDUAL))
            if f"{prefix}.attn.{j}.q.weight" in tensors:
                layers.append(attention(tensors.layer(f"{prefix}.attn.{j}", _ATTENTION)))
        if f"{prefix}.{change}.conv.weight" in tensors:
            layers.append(tensors.layer(f"{prefix}.{change}", {"conv": own}))

    for k in range(levels):
        level(f"down.{k}", blocks, "downsample", "")
    layers.append(tensors.layer("mid.block_1", _RESIDUAL))
    layers.append(attention(tensors.layer("mid.attn_1", _ATTENTION)))
    layers.append(tensors.layer("mid.block_2", _RESIDUAL))
    for k in reversed(range(levels)):
        level(f"up.{k}", blocks + 1, "upsample", "conv")
    found = {"size": size, "blocks": blocks, "attention": attended, "dropout": dropout, "steps": steps}
    return assembled(tensors, ends, layers, widths, **found, **DDPM, level_shift=1.0, resampling="conv_end")
