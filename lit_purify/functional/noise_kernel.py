"""Keyed noise as one Triton kernel with the same bits as ``noise.py``; imported only for tensors on an NVIDIA GPU."""

# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"
# No deferred annotations: Triton reads the annotations of its kernels.

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["step", "seed", "stream", "blocks", "size"])
def _draw(out, index, run, step, seed, stream, blocks, size, NORMAL: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    of_row = tl.zeros((BLOCK,), tl.int64)
    c1 = (of_row + step).to(tl.uint32)
    c2 = (of_row + tl.load(run + row)).to(tl.uint32)
    c3 = (of_row + tl.load(index + row)).to(tl.uint32)
    words = tl.philox_impl(block.to(tl.uint32), c1, c2, c3, seed.to(tl.uint32), stream.to(tl.uint32))
    out += row.to(tl.int64) * size + 4 * block
    for pair in tl.static_range(2):
        first, second = words[2 * pair], words[2 * pair + 1]
        if NORMAL:
            uniform = (first.to(tl.float64) + 0.5) * 2.3283064365386963e-10
            radius = tl.sqrt(-2.0 * tl.log(uniform))
            angle = (second.to(tl.float64) + 0.5) * 1.4629180792671596e-09
            one, other = radius * tl.cos(angle), radius * tl.sin(angle)
        else:
            one, other = (first >> 8).to(tl.float64) * 2.0**-24, (second >> 8).to(tl.float64) * 2.0**-24
        there = block < blocks
        tl.store(out + 2 * pair, one.to(out.dtype.element_ty), mask=there & (4 * block + 2 * pair < size))
        tl.store(out + 2 * pair + 1, other.to(out.dtype.element_ty), mask=there & (4 * block + 2 * pair + 1 < size))


def draw(like: Tensor, index: Tensor, run: Tensor, step: int, seed: int, stream: int, normal: bool) -> Tensor:
    """Draws normal or uniform noise of the shape and type of ``like`` (B, ...); ``index`` and ``run`` (B,) int64."""
    # PyTorch rounds to 16 bits through float32.
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    out = torch.empty(like.shape, dtype=dtype, device=like.device)
    size = out[0].numel() if len(out) else 0
    if size:
        blocks = -(-size // 4)
        grid = (len(out), triton.cdiv(blocks, 256))
        # Triton launches on the current device.
        with torch.cuda.device_of(out):
            _draw[grid](
                out,
                index.contiguous(),
                run.contiguous(),
                step,
                seed,
                stream,
                blocks,
                size,
                NORMAL=normal,
                BLOCK=256,
                num_warps=4,
            )
    return out.to(like.dtype)
