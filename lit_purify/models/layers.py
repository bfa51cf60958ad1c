"""Layers of diffusion UNets, in the variants of the public networks."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import (
    avg_pool2d,
    conv2d,
    conv_transpose2d,
    interpolate,
    linear,
    pad,
    scaled_dot_product_attention,
    silu,
)

Resampling = Literal["conv", "conv_end", "residual", "residual_conv", "fir"]


@dataclass(frozen=True)
class Style:
    """Settings shared by the residual blocks and attention layers of a network; see ``UNet`` for their meaning."""

    embedding: int
    dropout: float
    scale_shift: bool
    groups: int | None
    group_width: int
    norm_eps: float
    rescale: bool
    resampling: Resampling
    heads: int | None
    head_width: int | None

    def norm(self, width: int) -> nn.GroupNorm:
        """Returns a group normalization of ``width`` channels."""
        if self.groups is None:
            return nn.GroupNorm(math.gcd(32, max(1, width // 4)), width, eps=self.norm_eps)
        return nn.GroupNorm(min(self.groups, width // self.group_width), width, eps=self.norm_eps)

    @property
    def factor(self) -> float:
        """Factor of a branch plus shortcut; with ``rescale`` the sum keeps the variance (Song et al., ICLR 2021)."""
        return math.sqrt(0.5) if self.rescale else 1.0

    def joined(self, x: Tensor, h: Tensor) -> Tensor:
        """Adds a branch and its shortcut."""
        return (x + h) * self.factor if self.rescale else x + h


class Conditioning:
    """Embedded levels and their weights over the pixels, pooled to each resolution on demand.

    A linear layer inserts the embedding into a block, and pooling commutes with it. The layer therefore runs on the L
    distinct levels of an image, and the pooled weights spread its outputs. With one level (constant map or scalar t)
    nothing is spread, and the network is an ordinary UNet.
    """

    def __init__(self, embedding: Tensor, weights: Tensor | None) -> None:
        self.embedding = embedding
        self._pooled = {} if weights is None else {weights.shape[-1]: weights.to(embedding.dtype)}

    def project(self, layer: nn.Linear, width: int) -> tuple[Tensor, Tensor | None]:
        """Returns ``layer`` of the embeddings, (B, L, N), and the weights at a resolution, (B, L, h, width).

        For one level the weights are ``None`` and L is 1.
        """
        projected = layer(self.embedding)
        if not self._pooled:
            return projected[:, :1], None
        if width not in self._pooled:
            full = max(self._pooled)
            self._pooled[width] = avg_pool2d(self._pooled[full], full // width)
        return projected, self._pooled[width]


def spread(projected: Tensor, weights: Tensor | None) -> Tensor:
    """Spreads the result of ``Conditioning.project``: (B, N, 1, 1) for one level, (B, N, h, w) for a map."""
    if weights is None:
        return rearrange(projected[:, 0], "b n -> b n 1 1")
    # A matrix product with pixels as rows gives channels last, the layout of the activations.
    flat = torch.bmm(rearrange(weights.to(projected.dtype), "b l h w -> b (h w) l"), projected)
    return rearrange(flat, "b (h w) n -> b n h w", w=weights.shape[-1])


_twice = False


@contextlib.contextmanager
def differentiable_twice() -> Iterator[None]:
    """Makes networks use twice differentiable operations only: no fused kernels, no recorded graphs."""
    global _twice
    before, _twice = _twice, True
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _twice = before


def first_order() -> bool:
    """Whether first derivatives suffice, see ``differentiable_twice``."""
    return not _twice


def kernels(x: Tensor) -> ModuleType | None:
    """Returns the channels-last kernels if a GPU can run them on this tensor and no compiler is active."""
    usable = first_order() and x.is_cuda and x.dtype != torch.float64 and not torch.compiler.is_compiling()
    return _kernels() if usable else None


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        from lit_purify.models import fused as found
    except ImportError:
        return None
    return found


def normalized(norm: nn.GroupNorm, x: Tensor, act: bool, **fused: Tensor | None) -> Tensor:
    """Applies group normalization, and SiLU if ``act``; ``fused`` are further arguments of the kernel."""
    found = kernels(x)
    if found is not None:
        out: Tensor = found.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, act, **fused)
        return out
    return silu(norm(x)) if act else norm(x)


def unbiased(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Applies a convolution without its bias."""
    return conv2d(x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def convolved(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Applies a convolution; a kernel adds the bias faster than cuDNN's separate pass."""
    found = kernels(x)
    if found is None:
        return layer(x)
    out: Tensor = found.add(None, unbiased(layer, x), layer.bias)
    return out


def pointwise(weight: Tensor, bias: Tensor | None, x: Tensor, second: Tensor | None = None) -> Tensor:
    """Applies a 1x1 convolution to channels-last input as a matrix product; ``second`` has the last channels."""
    flat, rows = weight.flatten(1), x.permute(0, 2, 3, 1)
    if second is None:
        return linear(rows, flat, bias).permute(0, 3, 1, 2)
    own = x.shape[1]
    out = linear(rows, flat[:, :own], bias)
    more = torch.addmm(out.flatten(0, 2), second.permute(0, 2, 3, 1).flatten(0, 2), flat[:, own:].t())
    return more.reshape(out.shape).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU and convolution, twice; the level embedding enters between the two.

    With ``scale_shift`` it scales and shifts the second normalization (Dhariwal & Nichol 2021), otherwise it is added
    to its input (Ho et al. 2020). A ``resample`` block halves or doubles the resolution of both branches (BigGAN).
    """

    def __init__(
        self, width_in: int, width_out: int, style: Style, resample: Literal["halve", "double"] | None = None
    ) -> None:
        super().__init__()
        self.style, self.resample = style, resample
        self.norm1 = style.norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.level = nn.Linear(style.embedding, 2 * width_out if style.scale_shift else width_out)
        self.norm2 = style.norm(width_out)
        self.dropout = nn.Dropout(style.dropout)
        self.conv2 = zeroed(nn.Conv2d(width_out, width_out, 3, padding=1))
        has_skip = width_in != width_out or (resample is not None and style.resampling != "residual")
        self.skip = nn.Conv2d(width_in, width_out, 1) if has_skip else nn.Identity()

    def forward(self, x: Tensor, conditioning: Conditioning, skip: Tensor | None = None) -> Tensor:
        """Maps (B, width_in, h, w) to (B, width_out, h, w), h and w halved or doubled; ``skip``: the last channels."""
        fused = kernels(x)
        if fused is not None:
            return self._fused(fused, x, conditioning, skip)
        if skip is not None:
            x = torch.cat((x, skip), dim=1)
        h = silu(self.norm1(x))
        if self.resample is not None:
            h, x = (self._resampled(branch) for branch in (h, x))
        h = self.conv1(h)
        level = spread(*conditioning.project(self.level, h.shape[-1]))
        if self.style.scale_shift:
            scale, shift = level.chunk(2, dim=1)
            h = self.norm2(h) * (1.0 + scale) + shift
        else:
            h = self.norm2(h + level)
        return self.style.joined(self.skip(x), self.conv2(self.dropout(silu(h))))

    def _resampled(self, x: Tensor) -> Tensor:
        return (halved if self.resample == "halve" else doubled)(x, self.style.resampling == "fir")

    def _fused(self, fused: ModuleType, x: Tensor, conditioning: Conditioning, skip: Tensor | None) -> Tensor:
        """Computes ``forward`` with biases, modulation and sums inside kernels, without concatenating ``skip``."""
        h = normalized(self.norm1, x, act=True, second=skip)
        if self.resample is not None:
            h, x = (self._resampled(branch) for branch in (h, x))
        h = unbiased(self.conv1, h)
        levels, weights = conditioning.project(self.level, h.shape[-1])
        norm2 = functools.partial(normalized, self.norm2, pre=self.conv1.bias)
        if not self.style.scale_shift:
            h = norm2(h + spread(levels, weights), act=True)
        elif levels.shape[1] <= fused.MOST_LEVELS:
            h = norm2(h, act=True, levels=levels, spread=weights)
        else:
            scale, shift = spread(levels, weights).chunk(2, dim=1)
            h = silu(norm2(h, act=False) * (1.0 + scale) + shift)
        h, bias = unbiased(self.conv2, self.dropout(h)), self.conv2.bias
        if isinstance(self.skip, nn.Conv2d):
            assert bias is not None
            assert self.skip.bias is not None
            x, bias = pointwise(self.skip.weight, None, x, skip), bias + self.skip.bias
        elif skip is not None:
            x = torch.cat((x, skip), dim=1)
        out: Tensor = fused.add(x, h, bias, self.style.factor)
        return out


class Attention(nn.Module):
    """Residual self-attention over the pixels; channels of ``qkv`` are ordered (q k v), (head), (channel)."""

    def __init__(self, width: int, style: Style) -> None:
        super().__init__()
        self.style = style
        self.heads = style.heads or (1 if style.head_width is None else max(1, width // style.head_width))
        self.norm = style.norm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = zeroed(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, width, h, w) to the same shape."""
        fused, normal = kernels(x), normalized(self.norm, x, act=False)
        if fused is None:
            split = "b (three n c) h w -> three b n (h w) c"
            q, k, v = rearrange(self.qkv(normal), split, three=3, n=self.heads)
            mixed = scaled_dot_product_attention(q, k, v)
            return self.style.joined(x, self.out(rearrange(mixed, "b n (h w) c -> b (n c) h w", h=x.shape[-2])))
        # Splitting in memory order lets one pass assemble the three gradients.
        qkv = pointwise(self.qkv.weight, self.qkv.bias, normal).permute(0, 2, 3, 1)
        parts = rearrange(qkv, "b h w (three n c) -> b (h w) three n c", three=3, n=self.heads).unbind(dim=2)
        q, k, v = (part.transpose(1, 2) for part in parts)
        mixed = scaled_dot_product_attention(q, k, v)
        mixed = rearrange(mixed, "b n (h w) c -> b (n c) h w", h=x.shape[-2])
        out: Tensor = fused.add(x, pointwise(self.out.weight, None, mixed), self.out.bias, self.style.factor)
        return out


class Downsample(nn.Conv2d):
    """A convolution with stride 2, padded on both sides or, as TensorFlow's "same", only at the end."""

    def __init__(self, width: int, at_end: bool) -> None:
        super().__init__(width, width, 3, stride=2, padding=0 if at_end else 1)
        self.at_end = at_end

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, width, 2 h, 2 w) to (B, width, h, w)."""
        return super().forward(pad(x, (0, 1, 0, 1)) if self.at_end else x)


class Upsample(nn.Module):
    """Nearest-neighbor upsampling by 2 and a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, width, h, w) to (B, width, 2 h, 2 w)."""
        return convolved(self.conv, doubled(x, smooth=False))


class SmoothedDownsample(nn.Conv2d):
    """Smoothing and a convolution with stride 2: the input pyramid of NCSN++."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, width_in, 2 h, 2 w) to (B, width_out, h, w)."""
        return super().forward(conv2d(x, _binomial(x), padding=2, groups=x.shape[1]))


def halved(x: Tensor, smooth: bool) -> Tensor:
    """Halves the resolution by the mean of 2x2 pixels or by the binomial filter (1, 3, 3, 1)."""
    if smooth:
        return conv2d(x, _binomial(x), stride=2, padding=1, groups=x.shape[1])
    fused = kernels(x)
    return avg_pool2d(x, 2) if fused is None else fused.halved(x)


def doubled(x: Tensor, smooth: bool) -> Tensor:
    """Doubles the resolution by nearest neighbor or by the binomial filter (1, 3, 3, 1)."""
    if smooth:
        return conv_transpose2d(x, 4.0 * _binomial(x), stride=2, padding=1, groups=x.shape[1])
    fused = kernels(x)
    return interpolate(x, scale_factor=2, mode="nearest") if fused is None else fused.doubled(x)


def _binomial(x: Tensor) -> Tensor:
    # (0.125, 0.375, 0.375, 0.125), computed on the device: a copy from the host would synchronize a GPU.
    line = (2.0 - (torch.arange(4, dtype=x.dtype, device=x.device) - 1.5).abs()) / 4.0
    return torch.outer(line, line).expand(x.shape[1], 1, 4, 4)


def sinusoidal(t: Tensor, width: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
    """Transformer position embedding of the level: (...) to (..., width), cosines first.

    The frequencies decrease from 1 to 1e-4 over ``width / 2 - shift`` entries.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) / (half - shift) * torch.arange(half, device=t.device).double())
    angles = t.double()[..., None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """Initializes a layer with zeros, so that its residual block starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
