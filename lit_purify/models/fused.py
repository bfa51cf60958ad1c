"""Fused channels-last operations: group normalization with level modulation and SiLU, sums, and resampling.

They run on GPUs with Triton. PyTorch's group normalization copies channels-last input to contiguous memory and back,
and bias, modulation, SiLU and cast are further passes over memory. Statistics and sums are float32. Triton launches on
the current device, which is therefore set to that of the tensors (in backward passes PyTorch does this).
"""

# ruff: noqa: ANN401
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-call"
from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_purify.models import kernels

MOST_LEVELS = 2
"""Images with more distinct levels use PyTorch's operations."""

_TILE = 8192
_SMALL_TILE = 2048
_PROGRAMS, _MOST_PARTS = 528, 128
_FUSED_ROWS = 96
_FUSED_SIZE = 32768
_BLOCK = 4096
_WARPS = 8


def _split(x: Tensor, second: Tensor | None, groups: int, tile: int) -> dict[str, int]:
    """Returns the partition of an input into programs."""
    rows, pixels = x.shape[0], x.shape[2] * x.shape[3]
    more = 0 if second is None else second.shape[1]
    channels = x.shape[1] + more
    blocks, width = triton.next_power_of_2(groups), triton.next_power_of_2(channels // groups)
    height = max(1, min(tile // (blocks * width), triton.next_power_of_2(pixels)))
    parts = 1
    if rows < _FUSED_ROWS and pixels * channels > _FUSED_SIZE:
        parts = max(1, min(_MOST_PARTS, -(-_PROGRAMS // rows), -(-pixels // height)))
    chunk = -(-pixels // (parts * height)) * height
    parts = -(-pixels // chunk)
    return {
        "P": pixels,
        "chunk": chunk,
        "S": parts,
        "C": channels,
        "C2": more,
        "G": groups,
        "BG": blocks,
        "GP": width,
        "BP": height,
        "num_warps": _WARPS,
    }


def _launch(kernel: Any, x: Tensor, *given: Tensor | None, **flags: Any) -> None:
    """Launches a kernel: one stage if a program has a whole image, otherwise two."""
    # Kernels do not read tensors whose flag is off.
    tensors = [x if tensor is None else tensor for tensor in given]
    for stage in (2,) if flags["S"] == 1 else (0, 1):
        kernel[(len(x), flags["S"])](x, *tensors, **flags, STAGE=stage)


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        pre: Tensor | None,
        levels: Tensor | None,
        spread: Tensor | None,
        second: Tensor | None,
        groups: int,
        eps: float,
        act: bool,
    ) -> Tensor:
        x, second = _last(x), None if second is None else _last(second)
        sizes = _split(x, second, groups, _TILE)
        shape = (len(x), sizes["C"], *x.shape[2:])
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        statistics = x.new_empty(len(x), 2, groups, dtype=torch.float32)
        parts = sizes["S"]
        partial = x.new_empty(len(x), parts, 2, sizes["BG"], dtype=torch.float32) if parts > 1 else statistics
        if levels is not None and levels.stride()[1:] != (levels.shape[2], 1):
            levels = levels.contiguous()
        spread = None if spread is None else spread.contiguous()
        ctx.flags = {
            "level_stride": 0 if levels is None else levels.stride(0),
            "L": 0 if levels is None else levels.shape[1],
            "MAPPED": spread is not None,
            "PRE": pre is not None,
            "SILU": act,
        }
        given = (second, y, pre, weight, bias, levels, spread, partial, statistics)
        _launch(kernels.forward, x, *given, **sizes, **ctx.flags, eps=eps)
        ctx.save_for_backward(x, weight, bias, pre, levels, spread, second, statistics)
        ctx.groups = groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, pre, levels, spread, second, statistics = ctx.saved_tensors
        parameters = any(ctx.needs_input_grad[k] for k in (1, 2, 3, 4, 5))
        dx, dsecond = torch.empty_like(x), None if second is None else torch.empty_like(second)
        sizes = _split(x, second, ctx.groups, _SMALL_TILE if parameters else _TILE // 2)
        rows, parts, channels, count = len(x), sizes["S"], sizes["C"], ctx.flags["L"]
        partial = x.new_empty(rows, parts, 2, sizes["BG"], dtype=torch.float32) if parts > 1 else statistics
        sums = x.new_empty(rows, parts, 3 + 2 * count, channels, dtype=torch.float32) if parameters else statistics
        dspread = torch.empty_like(spread, dtype=torch.float32) if parameters and spread is not None else None
        given = (second, _last(dy), dx, dsecond, pre, weight, bias, levels, spread, statistics, partial, sums, dspread)
        _launch(kernels.backward, x, *given, **sizes, **ctx.flags, PARAMETERS=parameters)
        if not parameters:
            return dx, *[None] * 5, dsecond, None, None, None
        each = sums.sum(dim=1)
        whole = each.sum(dim=0)
        dlevels = each[:, 2:-1].reshape(rows, count, 2 * channels).to(levels.dtype) if count else None
        dpre = None if pre is None else whole[-1].to(pre.dtype)
        dspread = None if dspread is None else dspread.to(spread.dtype)
        return dx, whole[1].to(weight.dtype), whole[0].to(bias.dtype), dpre, dlevels, dspread, dsecond, None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor | None, h: Tensor, bias: Tensor, factor: float) -> Tensor:
        x, h = None if x is None else _last(x), _last(h)
        y, count = torch.empty_like(h), h.numel()
        alone = x is None
        kernels.add[(triton.cdiv(count, _BLOCK),)](
            h if alone else x, h, bias, y, count, factor, h.shape[1], alone, _BLOCK, num_warps=8
        )
        ctx.factor, ctx.dtype = factor, bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dy = _last(dy if ctx.factor == 1.0 else dy * ctx.factor)
        dbias = None
        if ctx.needs_input_grad[2]:
            channels = dy.shape[1]
            count, width = dy.numel() // channels, triton.next_power_of_2(channels)
            height = max(1, _TILE // width)
            chunk = -(-count // (_PROGRAMS * height)) * height
            sums = dy.new_empty(-(-count // chunk), channels, dtype=torch.float32)
            kernels.columns[(len(sums),)](dy, sums, count, chunk, channels, width, height, num_warps=8)
            dbias = sums.sum(dim=0).to(ctx.dtype)
        return dy if ctx.needs_input_grad[0] else None, dy, dbias, None


class _Resampled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, halve: bool) -> Tensor:
        ctx.factor, ctx.halve = factor, halve
        return _resampled(x, factor, halve)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _resampled(dy, ctx.factor, not ctx.halve), None, None


def _resampled(x: Tensor, factor: float, halve: bool) -> Tensor:
    x, (height, width) = _last(x), x.shape[2:]
    size = (height // 2, width // 2) if halve else (2 * height, 2 * width)
    y = torch.empty(*x.shape[:2], *size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    large, small = (x, y) if halve else (y, x)
    count = small.numel()
    grid = (triton.cdiv(count, _BLOCK // 4),)
    kernels.resample[grid](large, small, count, factor, small.shape[3], x.shape[1], halve, _BLOCK // 4, num_warps=4)
    return y


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    act: bool,
    pre: Tensor | None = None,
    levels: Tensor | None = None,
    spread: Tensor | None = None,
    second: Tensor | None = None,
) -> Tensor:
    """Computes act(GroupNorm(x + pre) * (1 + scale) + shift), channels last, in the type of ``x``.

    Args:
        x: (B, C, h, w), bfloat16, float16 or float32.
        groups: Number of groups.
        weight: (C,).
        bias: (C,).
        eps: Added to variances.
        act: Whether to apply SiLU.
        pre: Bias (C,) of the preceding convolution.
        levels: Scale and shift for each of L levels, (B, L, 2 C), L at most ``MOST_LEVELS``. Without ``spread`` L is 1.
        spread: Weights of the levels, (B, L, h, w).
        second: The last channels of the input as a separate tensor; ``C`` includes them.
    """
    with torch.cuda.device_of(x):
        out: Tensor = _Normalized.apply(x, weight, bias, pre, levels, spread, second, groups, eps, act)
    return out


def add(x: Tensor | None, h: Tensor, bias: Tensor, factor: float = 1.0) -> Tensor:
    """Computes (x + h + bias) * factor, channels last, in the type of ``h``; ``x`` is optional, ``bias`` is (C,)."""
    with torch.cuda.device_of(h):
        out: Tensor = _Sum.apply(x, h, bias, factor)
    return out


def halved(x: Tensor) -> Tensor:
    """Averages 2x2 pixels, channels last."""
    with torch.cuda.device_of(x):
        out: Tensor = _Resampled.apply(x, 0.25, True)
    return out


def doubled(x: Tensor) -> Tensor:
    """Repeats each pixel four times, channels last."""
    with torch.cuda.device_of(x):
        out: Tensor = _Resampled.apply(x, 1.0, False)
    return out
