"""Triton kernels for channels-last activations; ``fused.py`` calls them."""

# ruff: noqa: ANN001, ANN201, ANN202, N803, N806
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"
# No deferred annotations: Triton reads the annotations of its kernels.

import triton
import triton.language as tl


@triton.jit
def _grouped(values, BG: tl.constexpr, GP: tl.constexpr):
    """Sums over the channels of each group: (BG * GP,) to (BG,)."""
    return tl.sum(tl.reshape(values, (BG, GP)), axis=1)


@triton.jit
def _spread(values, BG: tl.constexpr, GP: tl.constexpr):
    """Copies the value of each group to its channels: (BG,) to (BG * GP,)."""
    return tl.reshape(tl.broadcast_to(values[:, None], (BG, GP)), (BG * GP,))


@triton.jit
def _load(x, second, pixel, channel, there, C: tl.constexpr, C2: tl.constexpr):
    """Loads a tile of an input whose last C2 channels are a separate tensor."""
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
def _gathered(partial, S, groups, BG: tl.constexpr):
    """Sums two quantities over the S programs of an image."""
    one = tl.zeros((BG,), tl.float32)
    other = tl.zeros((BG,), tl.float32)
    for at in range(0, S, 16):
        part = (at + tl.arange(0, 16))[:, None]
        place = partial + part * 2 * BG + groups[None, :]
        one += tl.sum(tl.load(place, mask=part < S, other=0.0), axis=0)
        other += tl.sum(tl.load(place + BG, mask=part < S, other=0.0), axis=0)
    return one, other


# fmt: off
@triton.jit
def _modulation(
    levels, spread, level_stride, row, pixel, inside, channel, valid, P, C: tl.constexpr, L: tl.constexpr,
    MAPPED: tl.constexpr,
):
# fmt: on
    """Returns 1 + scale and shift of a tile: (1, channels) without a map, (pixels, channels) with one."""
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


# fmt: off
@triton.jit
def forward(
    x, second, y, pre, weight, bias, levels, spread, partial, statistics, level_stride, P, chunk, S, eps,
    C: tl.constexpr, C2: tl.constexpr, G: tl.constexpr, BG: tl.constexpr, GP: tl.constexpr,
    BP: tl.constexpr, L: tl.constexpr, MAPPED: tl.constexpr, PRE: tl.constexpr, SILU: tl.constexpr,
    STAGE: tl.constexpr,
):
# fmt: on
    """Normalizes an image; program (row, chunk). Stage 0 sums a chunk of pixels, 1 normalizes one, 2 does both."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    W: tl.constexpr = C // G
    lane = tl.arange(0, BG * GP)
    group, within = lane // GP, lane % GP
    channel, valid = group * W + within, (within < W) & (group < G)
    x += row * P * (C - C2)
    second += row * P * C2
    first, last = part * chunk, tl.minimum(part * chunk + chunk, P)
    added = tl.load(pre + channel, mask=valid, other=0.0).to(tl.float32)[None, :] if PRE else 0.0
    # Squares are summed relative to a value of the group, which avoids cancellation for large means.
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
        sums, squares = _gathered(partial + row * S * 2 * BG, S, groups, BG)
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


# fmt: off
@triton.jit
def _slopes(
    x, second, dy, pixel, channel, there, added, center, rstd, gain, offset, scale, shift, C: tl.constexpr,
    C2: tl.constexpr, SILU: tl.constexpr,
):
# fmt: on
    """Returns, for a tile, the normalized input, that after weight and bias, and the gradient after modulation."""
    hat = (_load(x, second, pixel, channel, there, C, C2) + added - center) * rstd
    normal = hat * gain + offset
    slope = tl.load(dy + pixel[:, None] * C + channel[None, :], mask=there, other=0.0).to(tl.float32)
    if SILU:
        value = normal * scale + shift
        sigmoid = tl.sigmoid(value)
        slope = slope * sigmoid * (1.0 + value * (1.0 - sigmoid))
    return hat, normal, slope


# fmt: off
@triton.jit
def backward(
    x, second, dy, dx, dsecond, pre, weight, bias, levels, spread, statistics, partial, sums, dspread, level_stride,
    P, chunk, S, C: tl.constexpr, C2: tl.constexpr, G: tl.constexpr, BG: tl.constexpr, GP: tl.constexpr,
    BP: tl.constexpr, L: tl.constexpr, MAPPED: tl.constexpr, PRE: tl.constexpr, SILU: tl.constexpr,
    PARAMETERS: tl.constexpr, STAGE: tl.constexpr,
):
# fmt: on
    """Runs stages as in ``forward``. With PARAMETERS also sums for bias, weight, shift, scale and the map."""
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
        one, other = _gathered(partial + row * S * 2 * BG, S, groups, BG)
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
def add(x, h, bias, y, count, factor, C: tl.constexpr, ALONE: tl.constexpr, BLOCK: tl.constexpr):
    """Computes (x + h + bias) * factor, or without x."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    value = tl.load(h + place, mask=there).to(tl.float32) + tl.load(bias + place % C, mask=there).to(tl.float32)
    if not ALONE:
        value += tl.load(x + place, mask=there).to(tl.float32)
    tl.store(y + place, (value * factor).to(y.dtype.element_ty), mask=there)


@triton.jit
def columns(x, out, count, chunk, C: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
    """Sums over the rows of a chunk, (count, C) to (programs, C)."""
    part, channel = tl.program_id(0).to(tl.int64), tl.arange(0, BC)
    total = tl.zeros((BP, BC), tl.float32)
    for at in range(0, chunk, BP):
        row = part * chunk + at + tl.arange(0, BP)
        there = (row < count)[:, None] & (channel < C)[None, :]
        total += tl.load(x + row[:, None] * C + channel[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(out + part * C + channel, tl.sum(total, axis=0), mask=channel < C)


@triton.jit
def resample(large, small, count, factor, width, C: tl.constexpr, HALVE: tl.constexpr, BLOCK: tl.constexpr):
    """Scaled sums of 2x2 pixels, or each scaled pixel four times; ``width`` is that of the small image."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    pixel = place // C
    # Rows are numbered across all images; the large images have twice as many.
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
