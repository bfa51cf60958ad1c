"""A UNet that takes a noise level per pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, scaled_dot_product_attention, silu

from lit_purify.errors import InputError
from lit_purify.functional.levels import decompose
from lit_purify.functional.schedule import Schedule
from lit_purify.models.denoiser import Denoiser


class Conditioning:
    """Embedded levels and where they hold, pooled to each resolution on demand.

    The embedding enters a block by a linear layer, and pooling commutes with it: so the layer runs on the L distinct
    levels of an image, and its outputs are spread by the pooled weights. With one level (constant map or scalar t)
    nothing is spread, and the network is the ordinary one.
    """

    def __init__(self, embedding: Tensor, weights: Tensor | None) -> None:
        self.embedding = embedding
        self._pooled = {} if weights is None else {weights.shape[-1]: weights.to(embedding.dtype)}

    def project(self, layer: nn.Linear, width: int) -> Tensor:
        """``layer`` of the embedding at a resolution: (B, N, 1, 1) for one level, (B, N, h, width) for a map."""
        projected = layer(self.embedding)
        if not self._pooled:
            return rearrange(projected[:, 0], "b n -> b n 1 1")
        if width not in self._pooled:
            full = max(self._pooled)
            self._pooled[width] = avg_pool2d(self._pooled[full], full // width)
        return einsum(self._pooled[width], projected, "b l h w, b l n -> b n h w")


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, convolution twice; the level scales and shifts the second normalization."""

    def __init__(self, width_in: int, width_out: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = _group_norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.level = nn.Linear(embedding, 2 * width_out)
        self.norm2 = _group_norm(width_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zeroed(nn.Conv2d(width_out, width_out, 3, padding=1))
        self.skip = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        """(B, width_in, h, w) to (B, width_out, h, w)."""
        h = self.conv1(silu(self.norm1(x)))
        scale, shift = conditioning.project(self.level, h.shape[-1]).chunk(2, dim=1)
        h = self.norm2(h) * (1.0 + scale) + shift
        return self.skip(x) + self.conv2(self.dropout(silu(h)))


class Attention(nn.Module):
    """Self-attention over the pixels, with a residual."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.heads = max(1, width // head_width)
        self.norm = _group_norm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = _zeroed(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) to the same."""
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (three n c) h w -> three b n (h w) c", three=3, n=self.heads)
        mixed = scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(mixed, "b n (h w) c -> b (n c) h w", h=x.shape[-2]))


class UNet(Denoiser):
    """DDPM-style UNet (Ho et al. 2020; scale-shift normalization as in Dhariwal & Nichol 2021) with a level map.

    Args:
        channels: Channels of the images.
        size: Height and width of the images; divisible by 2 ** (len(multipliers) - 1).
        width: Channels at full resolution.
        multipliers: Channels at each resolution, as multiples of ``width``; each further one halves the resolution.
        blocks: Residual blocks at each resolution.
        attention: Resolutions (in pixels) with self-attention.
        head_width: Channels of an attention head.
        dropout: Dropout probability inside residual blocks.
        steps: T of the linear schedule.
        beta_start: First beta of the linear schedule.
        beta_end: Last beta of the linear schedule.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        width: int,
        multipliers: Sequence[int],
        blocks: int = 2,
        attention: Sequence[int] = (),
        head_width: int = 32,
        dropout: float = 0.0,
        steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 2e-2,
    ) -> None:
        super().__init__()
        if size % 2 ** (len(multipliers) - 1):
            raise InputError(f"size = {size} cannot be halved {len(multipliers) - 1} times: use fewer multipliers")
        self.channels, self.size = channels, size
        self.schedule = Schedule.linear(steps, beta_start, beta_end)
        self.config = {
            "channels": channels,
            "size": size,
            "width": width,
            "multipliers": list(multipliers),
            "blocks": blocks,
            "attention": list(attention),
            "head_width": head_width,
            "dropout": dropout,
            "steps": steps,
            "beta_start": beta_start,
            "beta_end": beta_end,
        }
        embedding = 2 * width
        self.width = width
        self.embed = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU())
        self.stem = nn.Conv2d(channels, width, 3, padding=1)

        def stage(width_in: int, width_out: int, resolution: int) -> nn.ModuleList:
            layers: list[nn.Module] = [ResidualBlock(width_in, width_out, embedding, dropout)]
            if resolution in attention:
                layers.append(Attention(width_out, head_width))
            return nn.ModuleList(layers)

        widths = [width * m for m in multipliers]
        skips, current, resolution = [width], width, size
        self.down = nn.ModuleList()
        for level, target in enumerate(widths):
            if level:
                self.down.append(nn.ModuleList([nn.Conv2d(current, current, 3, stride=2, padding=1)]))
                resolution //= 2
                skips.append(current)
            for _ in range(blocks):
                self.down.append(stage(current, target, resolution))
                current = target
                skips.append(current)
        self.middle = nn.ModuleList(
            [ResidualBlock(current, current, embedding, dropout), ResidualBlock(current, current, embedding, dropout)]
        )
        if attention:
            self.middle.insert(1, Attention(current, head_width))
        self.up = nn.ModuleList()
        for level, target in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(stage(current + skips.pop(), target, resolution))
                current = target
            if level:
                self.up.append(nn.ModuleList([Upsample(current)]))
                resolution *= 2
        self.norm = _group_norm(current)
        self.head = _zeroed(nn.Conv2d(current, channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predicted noise; see ``Denoiser``."""
        levels, weights = decompose(t)
        conditioning = Conditioning(self.embed(_sinusoidal(levels, self.width, x.dtype)), weights)
        # About a quarter faster on CPUs, more on GPUs; convolutions keep the layout from here on.
        h = self.stem(x.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for stage in self.down:
            h = _run(stage, h, conditioning)
            skips.append(h)
        h = _run(self.middle, h, conditioning)
        for stage in self.up:
            if not isinstance(stage[0], Upsample):  # type: ignore[index]
                h = torch.cat((h, skips.pop()), dim=1)
            h = _run(stage, h, conditioning)
        return self.head(silu(self.norm(h)))


class Upsample(nn.Module):
    """Nearest-neighbor doubling and a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) to (B, width, 2 h, 2 w)."""
        return self.conv(interpolate(x, scale_factor=2, mode="nearest"))


def _run(stage: nn.Module, h: Tensor, conditioning: Conditioning) -> Tensor:
    for layer in stage.children():
        h = layer(h, conditioning) if isinstance(layer, ResidualBlock) else layer(h)
    return h


def _sinusoidal(t: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Transformer position embedding of the level: (...) to (..., width)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, device=t.device, dtype=torch.float64))
    angles = t.double()[..., None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)


def _group_norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, max(1, width // 4)), width)


def _zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """A layer that starts as zero, so that its residual branch starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
