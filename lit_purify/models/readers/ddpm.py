"""Checkpoints of PyTorch ports of DDPM (Ho et al. 2020), as in the code of DDIM and of Lee & Kim (SVHN)."""

from __future__ import annotations

from lit_purify.models.layers import Attention, ResidualBlock
from lit_purify.models.readers.assembly import DDPM, Source, Tensors, assembled, cosines_first, renaming, sequence
from lit_purify.models.unet import UNet
from lit_purify.recorded import recorded

_NAMES = {
    ResidualBlock: renaming("norm1 conv1 temb_proj=level norm2 conv2 nin_shortcut=skip"),
    Attention: renaming("norm q k v proj_out=out"),
}
_ENDS = renaming("temb.dense.0=embed.0 temb.dense.1=embed.2 conv_in=stem norm_out=norm conv_out=head")


@recorded
def load_ddpm(path: Source, size: int = 32, steps: int = 1000, dropout: float = 0.0) -> UNet:
    """Loads a DDPM in the layout of its PyTorch ports; of a list (state_dict, optimizer, ...) the first entry.

    Args:
        path: A file, ``https://...#sha256=...`` or ``hf://organization/name/file``; or the state_dict.
        size: Height and width of the images.
        steps: T of the linear schedule, betas 1e-4 .. 2e-2.
        dropout: Dropout probability for fine-tuning.

    Raises:
        InputError: The file has another layout.
    """
    tensors = Tensors(path, "ddpm")
    count, blocks = tensors.count("down.{}."), tensors.count("down.0.block.{}.")
    widths = [int(tensors[f"down.{k}.block.0.conv1.weight"].shape[0]) for k in range(count)]
    attended = [size // 2**k for k in range(count) if f"down.{k}.attn.0.q.weight" in tensors]
    layers = sequence(tensors, [(f"down.{k}", blocks) for k in range(count)], "block", "attn", "downsample")
    layers += ["mid.block_1", "mid.attn_1", "mid.block_2"]
    up = [(f"up.{k}", blocks + 1) for k in reversed(range(count))]
    layers += sequence(tensors, up, "block", "attn", "upsample")
    ends = tensors.layer("", _ENDS)
    ends["embed.0.weight"] = cosines_first(ends["embed.0.weight"])
    config = DDPM | {"size": size, "blocks": blocks, "attention": attended, "dropout": dropout, "steps": steps}
    return assembled(tensors, ends, layers, _NAMES, widths, **config, level_shift=1.0, resampling="conv_end")
