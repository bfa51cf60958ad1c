"""Group normalization, level modulation and SiLU in one channels-last kernel, and the sum that ends a branch.

For NVIDIA GPUs. PyTorch's own group normalization copies channels-last input to contiguous memory and back, and each of
bias, modulation, SiLU and cast is another pass over memory. Statistics and sums are float32. With TRITON_INTERPRET=1 in
the environment before this module is imported, the kernels run on CPU tensors, for tests.
"""

# ruff: noqa: ANN001, ANN202, ANN401, N803, N806
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"
# No deferred annotations here: Triton looks at those of its kernels.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

MOST_LEVELS = 2
"""More distinct levels an image are left to PyTorch."""


@triton.jit
def _grouped(values, BG: tl.constexpr, GP: tl.constexpr):
    """Sums over the channels of each group: (BG * GP,) to (BG,)."""
    return tl.sum(tl.reshape(values, (BG, GP)), axis=1)


@triton.jit
def _spread(values, BG: tl.constexpr, GP: tl.constexpr):
    """The value of its group for every channel: (BG,) to (BG * GP,)."""
    return tl.reshape(tl.broadcast_to(values[:, None], (BG, GP)), (BG * GP,))


@triton.jit
def _load(x, second, pixel, channel, there, C: tl.constexpr, C2: tl.constexpr):
    """A tile of an input whose last C2 channels are a tensor of their own."""
    own = there & (channel < C - C2)[None, :]
    value = tl.load(x + pixel[:, None] * (C - C2) + channel[None, :], mask=own, other=0.0).to(tl.float32)
    if C2 > 0:
        other = there & (channel >= C - C2)[None, :]
        place = pixel[:, None] * C2 + (channel - (C - C2))[None, :]
        value += tl.load(second + place, mask=other, other=0.0).to(tl.float32)
    return value


@triton.jit
def _store(x, second, pixel, channel, there, value, C: tl.constexpr, C2: tl.constexpr):
    own = there & (channel < C - C2)[None, :]
    tl.store(x + pixel[:, None] * (C - C2) + channel[None, :], value.to(x.dtype.element_ty), mask=own)
    if C2 > 0:
        other = there & (channel >= C - C2)[None, :]
        place = pixel[:, None] * C2 + (channel - (C - C2))[None, :]
        tl.store(second + place, value.to(second.dtype.element_ty), mask=other)


@triton.jit
def _modulation(
    levels,
    spread,
    level_stride,
    row,
    pixel,
    inside,
    channel,
    valid,
    P,
    C: tl.constexpr,
    L: tl.constexpr,
    MAPPED: tl.constexpr,
):
    """1 + scale and shift at a tile; without a map (1, channels), and with it (pixels, channels)."""
    scale = tl.full((1, channel.shape[0]), 1.0, tl.float32)
    shift = tl.zeros((1, channel.shape[0]), tl.float32)
    for k in tl.static_range(L):
        start = levels + row * level_stride + k * 2 * C
        one = tl.load(start + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
        other = tl.load(start + C + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
        if MAPPED:
            weight = tl.load(spread + (row * L + k) * P + pixel, mask=inside, other=0.0).to(tl.float32)[:, None]
            one, other = weight * one, weight * other
        scale, shift = scale + one, shift + other
    return scale, shift


@triton.jit
def _forward(
    x,
    second,
    y,
    pre,
    weight,
    bias,
    levels,
    spread,
    partial,
    statistics,
    level_stride,
    P,
    chunk,
    S,
    eps,
    C: tl.constexpr,
    C2: tl.constexpr,
    G: tl.constexpr,
    BG: tl.constexpr,
    GP: tl.constexpr,
    BS: tl.constexpr,
    BP: tl.constexpr,
    L: tl.constexpr,
    MAPPED: tl.constexpr,
    PRE: tl.constexpr,
    SILU: tl.constexpr,
    STAGE: tl.constexpr,
):
    """Stage 0 sums a chunk of pixels, stage 1 normalizes one, stage 2 does both; program (row, chunk)."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    W: tl.constexpr = C // G
    lane = tl.arange(0, BG * GP)
    group, within = lane // GP, lane % GP
    channel, valid = group * W + within, (within < W) & (group < G)
    x += row * P * (C - C2)
    second += row * P * C2
    first, last = part * chunk, tl.minimum(part * chunk + chunk, P)
    added = tl.load(pre + channel, mask=valid, other=0.0).to(tl.float32)[None, :] if PRE else 0.0
    # Squares are summed around a value of the group, so that no digits are lost where the mean is large.
    groups = tl.arange(0, BG)
    start = groups * W
    pivot = tl.load(x + start, mask=(groups < G) & (start < C - C2), other=0.0).to(tl.float32)
    if C2 > 0:
        far = (groups < G) & (start >= C - C2)
        pivot += tl.load(second + start - (C - C2), mask=far, other=0.0).to(tl.float32)
    if PRE:
        pivot += tl.load(pre + start, mask=groups < G, other=0.0).to(tl.float32)
    around = _spread(pivot, BG, GP)[None, :]
    if STAGE != 1:
        total = tl.zeros((BP, BG * GP), tl.float32)
        square = tl.zeros((BP, BG * GP), tl.float32)
        for at in range(first, last, BP):
            pixel = at + tl.arange(0, BP)
            there = (pixel < last)[:, None] & valid[None, :]
            value = _load(x, second, pixel, channel, there, C, C2)
            value = tl.where(there, value + added - around, 0.0)
            total += value
            square += value * value
        sums, squares = _grouped(tl.sum(total, axis=0), BG, GP), _grouped(tl.sum(square, axis=0), BG, GP)
        if STAGE == 0:
            slot = partial + ((row * S + part) * 2) * BG + groups
            tl.store(slot, sums)
            tl.store(slot + BG, squares)
    else:
        parts = tl.arange(0, BS)
        slot = partial + ((row * S + parts[:, None]) * 2) * BG + groups[None, :]
        sums = tl.sum(tl.load(slot, mask=parts[:, None] < S, other=0.0), axis=0)
        squares = tl.sum(tl.load(slot + BG, mask=parts[:, None] < S, other=0.0), axis=0)
    if STAGE != 0:
        count = P * W * 1.0
        off = sums / count
        rstd = 1.0 / tl.sqrt(tl.maximum(squares / count - off * off, 0.0) + eps)
        mean = pivot + off
        if part == 0:
            tl.store(statistics + row * 2 * G + groups, mean, mask=groups < G)
            tl.store(statistics + row * 2 * G + G + groups, rstd, mask=groups < G)
        y += row * P * C
        gain = tl.load(weight + channel, mask=valid, other=0.0).to(tl.float32) * _spread(rstd, BG, GP)
        gain, center = gain[None, :], _spread(mean, BG, GP)[None, :]
        offset = tl.load(bias + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
        for at in range(first, last, BP):
            pixel = at + tl.arange(0, BP)
            there = (pixel < last)[:, None] & valid[None, :]
            value = _load(x, second, pixel, channel, there, C, C2)
            value = (value + added - center) * gain + offset
            if L > 0:
                scale, shift = _modulation(
                    levels, spread, level_stride, row, pixel, pixel < last, channel, valid, P, C, L, MAPPED
                )
                value = value * scale + shift
            if SILU:
                value = value * tl.sigmoid(value)
            tl.store(y + pixel[:, None] * C + channel[None, :], value.to(y.dtype.element_ty), mask=there)


@triton.jit
def _slopes(
    x,
    second,
    dy,
    pixel,
    channel,
    there,
    added,
    center,
    rstd,
    gain,
    offset,
    scale,
    shift,
    C: tl.constexpr,
    C2: tl.constexpr,
    SILU: tl.constexpr,
):
    """At a tile: what is normalized, that after weight and bias, and the gradient after modulation."""
    hat = (_load(x, second, pixel, channel, there, C, C2) + added - center) * rstd
    normal = hat * gain + offset
    slope = tl.load(dy + pixel[:, None] * C + channel[None, :], mask=there, other=0.0).to(tl.float32)
    if SILU:
        value = normal * scale + shift
        sigmoid = tl.sigmoid(value)
        slope = slope * sigmoid * (1.0 + value * (1.0 - sigmoid))
    return hat, normal, slope


@triton.jit
def _backward(
    x,
    second,
    dy,
    dx,
    dsecond,
    pre,
    weight,
    bias,
    levels,
    spread,
    statistics,
    partial,
    sums,
    dspread,
    level_stride,
    P,
    chunk,
    S,
    C: tl.constexpr,
    C2: tl.constexpr,
    G: tl.constexpr,
    BG: tl.constexpr,
    GP: tl.constexpr,
    BS: tl.constexpr,
    BP: tl.constexpr,
    L: tl.constexpr,
    MAPPED: tl.constexpr,
    PRE: tl.constexpr,
    SILU: tl.constexpr,
    PARAMETERS: tl.constexpr,
    STAGE: tl.constexpr,
):
    """Stages as in ``_forward``. With PARAMETERS also sums for bias, weight, shift and scale, and those of the map."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    W: tl.constexpr = C // G
    BC: tl.constexpr = BG * GP
    lane = tl.arange(0, BC)
    group, within = lane // GP, lane % GP
    channel, valid = group * W + within, (within < W) & (group < G)
    x += row * P * (C - C2)
    second += row * P * C2
    dy += row * P * C
    first, last = part * chunk, tl.minimum(part * chunk + chunk, P)
    added = tl.load(pre + channel, mask=valid, other=0.0).to(tl.float32)[None, :] if PRE else 0.0
    groups = tl.arange(0, BG)
    center = tl.load(statistics + row * 2 * G + group, mask=group < G, other=0.0)[None, :]
    rstd = tl.load(statistics + row * 2 * G + G + group, mask=group < G, other=0.0)[None, :]
    gain = tl.load(weight + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
    offset = tl.load(bias + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
    if STAGE != 1:
        total = tl.zeros((BP, BC), tl.float32)
        product = tl.zeros((BP, BC), tl.float32)
        if PARAMETERS and L > 0:
            shift0 = tl.zeros((BP, BC), tl.float32)
            scale0 = tl.zeros((BP, BC), tl.float32)
            shift1 = tl.zeros((BP, BC), tl.float32)
            scale1 = tl.zeros((BP, BC), tl.float32)
        for at in range(first, last, BP):
            pixel = at + tl.arange(0, BP)
            inside = pixel < last
            there = inside[:, None] & valid[None, :]
            scale, shift = _modulation(
                levels, spread, level_stride, row, pixel, inside, channel, valid, P, C, L, MAPPED
            )
            hat, normal, slope = _slopes(
                x, second, dy, pixel, channel, there, added, center, rstd, gain, offset, scale, shift, C, C2, SILU
            )
            total += slope * scale
            product += slope * scale * hat
            if PARAMETERS and L > 0:
                of_scale = slope * normal
                if MAPPED:
                    weights = spread + row * L * P + pixel
                    w = tl.load(weights, mask=inside, other=0.0).to(tl.float32)[:, None]
                    shift0 += w * slope
                    scale0 += w * of_scale
                    if L > 1:
                        w = tl.load(weights + P, mask=inside, other=0.0).to(tl.float32)[:, None]
                        shift1 += w * slope
                        scale1 += w * of_scale
                else:
                    shift0 += slope
                    scale0 += of_scale
        totals, products = tl.sum(total, axis=0), tl.sum(product, axis=0)
        if PARAMETERS:
            to = sums + (row * S + part) * (3 + 2 * L) * C + channel
            tl.store(to, totals, mask=valid)
            tl.store(to + C, products, mask=valid)
            if L > 0:
                tl.store(to + 2 * C, tl.sum(scale0, axis=0), mask=valid)
                tl.store(to + 3 * C, tl.sum(shift0, axis=0), mask=valid)
            if L > 1:
                tl.store(to + 4 * C, tl.sum(scale1, axis=0), mask=valid)
                tl.store(to + 5 * C, tl.sum(shift1, axis=0), mask=valid)
        flat = tl.reshape(gain, (BC,))
        one, other = _grouped(totals * flat, BG, GP), _grouped(products * flat, BG, GP)
        if STAGE == 0:
            slot = partial + ((row * S + part) * 2) * BG + groups
            tl.store(slot, one)
            tl.store(slot + BG, other)
    else:
        parts = tl.arange(0, BS)
        slot = partial + ((row * S + parts[:, None]) * 2) * BG + groups[None, :]
        one = tl.sum(tl.load(slot, mask=parts[:, None] < S, other=0.0), axis=0)
        other = tl.sum(tl.load(slot + BG, mask=parts[:, None] < S, other=0.0), axis=0)
    if STAGE != 0:
        dx += row * P * (C - C2)
        dsecond += row * P * C2
        if PARAMETERS and PRE:
            of_pre = tl.zeros((BP, BC), tl.float32)
        count = P * W * 1.0
        one, other = _spread(one / count, BG, GP)[None, :], _spread(other / count, BG, GP)[None, :]
        for at in range(first, last, BP):
            pixel = at + tl.arange(0, BP)
            inside = pixel < last
            there = inside[:, None] & valid[None, :]
            scale, shift = _modulation(
                levels, spread, level_stride, row, pixel, inside, channel, valid, P, C, L, MAPPED
            )
            hat, normal, slope = _slopes(
                x, second, dy, pixel, channel, there, added, center, rstd, gain, offset, scale, shift, C, C2, SILU
            )
            value = (slope * scale * gain - one - hat * other) * rstd
            _store(dx, dsecond, pixel, channel, there, value, C, C2)
            if PARAMETERS and PRE:
                of_pre += tl.where(there, value, 0.0)
            if PARAMETERS and MAPPED:
                for k in tl.static_range(L):
                    start_k = levels + row * level_stride + k * 2 * C
                    of_scale = tl.load(start_k + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
                    of_shift = tl.load(start_k + C + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
                    moved = tl.sum(tl.where(there, slope * (normal * of_scale + of_shift), 0.0), axis=1)
                    tl.store(dspread + (row * L + k) * P + pixel, moved, mask=inside)
        if PARAMETERS and PRE:
            to = sums + ((row * S + part) * (3 + 2 * L) + 2 + 2 * L) * C + channel
            tl.store(to, tl.sum(of_pre, axis=0), mask=valid)


@triton.jit
def _add(x, h, bias, y, count, factor, C: tl.constexpr, ALONE: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    value = tl.load(h + place, mask=there).to(tl.float32) + tl.load(bias + place % C, mask=there).to(tl.float32)
    if not ALONE:
        value += tl.load(x + place, mask=there).to(tl.float32)
    tl.store(y + place, (value * factor).to(y.dtype.element_ty), mask=there)


@triton.jit
def _columns(x, out, count, chunk, C: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
    """Sums over the rows of a chunk, (count, C) to (programs, C)."""
    part, channel = tl.program_id(0).to(tl.int64), tl.arange(0, BC)
    total = tl.zeros((BP, BC), tl.float32)
    for at in range(0, chunk, BP):
        row = part * chunk + at + tl.arange(0, BP)
        there = (row < count)[:, None] & (channel < C)[None, :]
        total += tl.load(x + row[:, None] * C + channel[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(out + part * C + channel, tl.sum(total, axis=0), mask=channel < C)


@triton.jit
def _resample(large, small, count, factor, width, C: tl.constexpr, HALVE: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of 2x2 pixels times a factor, or each pixel times it four times; ``width`` is that of the small image."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    pixel = place // C
    # Rows of all images are counted on, so those of the large ones are twice as many.
    corner = (pixel // width * 4 * width + pixel % width * 2) * C + place % C
    if HALVE:
        value = tl.load(large + corner, mask=there).to(tl.float32)
        value += tl.load(large + corner + C, mask=there).to(tl.float32)
        value += tl.load(large + corner + 2 * width * C, mask=there).to(tl.float32)
        value += tl.load(large + corner + (2 * width + 1) * C, mask=there).to(tl.float32)
        tl.store(small + place, (value * factor).to(small.dtype.element_ty), mask=there)
    else:
        value = (tl.load(small + place, mask=there).to(tl.float32) * factor).to(large.dtype.element_ty)
        tl.store(large + corner, value, mask=there)
        tl.store(large + corner + C, value, mask=there)
        tl.store(large + corner + 2 * width * C, value, mask=there)
        tl.store(large + corner + (2 * width + 1) * C, value, mask=there)


_TILE = 8192
_SMALL_TILE = 2048
_PROGRAMS = 528
_FUSED_ROWS = 96
_FUSED_SIZE = 32768
_BLOCK = 4096
_WARPS = 8


def _split(x: Tensor, second: Tensor | None, groups: int, tile: int) -> dict[str, int]:
    """How an input is cut into programs."""
    rows, pixels = x.shape[0], x.shape[2] * x.shape[3]
    more = 0 if second is None else second.shape[1]
    channels = x.shape[1] + more
    blocks, width = triton.next_power_of_2(groups), triton.next_power_of_2(channels // groups)
    height = max(1, min(tile // (blocks * width), triton.next_power_of_2(pixels)))
    parts = 1
    if rows < _FUSED_ROWS and pixels * channels > _FUSED_SIZE:
        parts = max(1, min(-(-_PROGRAMS // rows), -(-pixels // height)))
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
        "BS": triton.next_power_of_2(parts),
        "BP": height,
        "num_warps": _WARPS,
    }


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
        # What a flag switches off is never read.
        given = [x if tensor is None else tensor for tensor in (second, y, pre, weight, bias, levels, spread)]
        for stage in (2,) if parts == 1 else (0, 1):
            _forward[(len(x), parts)](x, *given, partial, statistics, eps=eps, **sizes, **ctx.flags, STAGE=stage)
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
        given = [x if tensor is None else tensor for tensor in (second, _last(dy), dx, dsecond)]
        given += [x if tensor is None else tensor for tensor in (pre, weight, bias, levels, spread)]
        for stage in (2,) if parts == 1 else (0, 1):
            _backward[(rows, parts)](
                x, *given, statistics, partial, sums, x if dspread is None else dspread, **sizes, **ctx.flags,
                PARAMETERS=parameters, STAGE=stage,
            )  # fmt: skip
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
        _add[(triton.cdiv(count, _BLOCK),)](
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
            _columns[(len(sums),)](dy, sums, count, chunk, channels, width, height, num_warps=8)
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
    _resample[grid](large, small, count, factor, small.shape[3], x.shape[1], halve, _BLOCK // 4, num_warps=4)
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
    """act(GroupNorm(x + pre) * (1 + scale) + shift), channels last, of the type of ``x``.

    Args:
        x: (B, C, h, w), bfloat16, float16 or float32.
        groups: Number of groups.
        weight: (C,).
        bias: (C,).
        eps: Added to variances.
        act: Whether SiLU follows.
        pre: Bias (C,) of the convolution before.
        levels: Scale and shift side by side for each of L levels, (B, L, 2 C), L at most ``MOST_LEVELS``. Without
            ``spread`` L is 1.
        spread: Where each level holds, (B, L, h, w).
        second: The last channels of the input, where they are another tensor; ``C`` counts them.
    """
    out: Tensor = _Normalized.apply(x, weight, bias, pre, levels, spread, second, groups, eps, act)
    return out


def add(x: Tensor | None, h: Tensor, bias: Tensor, factor: float = 1.0) -> Tensor:
    """(x + h + bias) * factor, channels last, of the type of ``h``; ``x`` may be left out, ``bias`` is (C,)."""
    out: Tensor = _Sum.apply(x, h, bias, factor)
    return out


def halved(x: Tensor) -> Tensor:
    """The mean of 2x2 pixels, channels last."""
    out: Tensor = _Resampled.apply(x, 0.25, True)
    return out


def doubled(x: Tensor) -> Tensor:
    """Each pixel four times, channels last."""
    out: Tensor = _Resampled.apply(x, 1.0, False)
    return out
