"""A UNet with a noise level per pixel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_purify.errors import InputError
from lit_purify.functional.levels import LevelMap, decompose
from lit_purify.functional.schedule import Schedule
from lit_purify.models.denoiser import Denoiser
from lit_purify.models.layers import (
    Attention,
    Conditioning,
    Downsample,
    Resampling,
    ResidualBlock,
    SmoothedDownsample,
    Style,
    Upsample,
    convolved,
    normalized,
    sinusoidal,
    zeroed,
)


class Stage(nn.ModuleList):
    """Consecutive layers at one resolution.

    Args:
        layers: The layers.
        role: ``plain``; ``halve`` or ``double`` the resolution; ``join`` a skip connection.
    """

    def __init__(self, layers: Sequence[nn.Module], role: Literal["plain", "halve", "double", "join"]) -> None:
        super().__init__(layers)
        self.role = role

    def forward(self, h: Tensor, conditioning: Conditioning, skip: Tensor | None = None) -> Tensor:
        """Runs the layers; the first one takes ``skip``."""
        for layer in self:
            h = layer(h, conditioning, skip) if isinstance(layer, ResidualBlock) else layer(h)
            skip = None
        return h


class UNet(Denoiser):
    """DDPM-style UNet (Ho et al. 2020; scale-shift normalization as in Dhariwal & Nichol 2021) with a level map.

    The arguments after ``beta_end`` select variants of the public networks, which ``lit_purify.models.readers`` load.
    Their defaults are for networks trained here.

    Args:
        channels: Channels of the images.
        size: Height and width of the images; divisible by 2 ** (len(multipliers) - 1).
        width: Channels at full resolution.
        multipliers: Channels at each resolution, as multiples of ``width``; each further entry halves the resolution.
        blocks: Residual blocks at each resolution.
        attention: Resolutions (in pixels) with self-attention.
        head_width: Channels of an attention head; ``None``: one head.
        dropout: Dropout probability inside residual blocks.
        steps: T of the schedule.
        beta_start: First beta of the linear schedule.
        beta_end: Last beta of the linear schedule.
        schedule: ``linear``, ``cosine`` or ``continuous``; see ``Schedule.named``.
        embedding: Channels of the level embedding; ``None``: twice ``width``.
        level_scale: The sinusoidal embedding takes ``level_scale * (t - level_shift)``.
        level_shift: 1 for networks that count noising steps from 0.
        frequency_shift: 1 if the slowest frequency of the embedding is exactly 1e-4 (DDPM).
        scale_shift: Scale and shift a normalization by the level, instead of adding the level to its input.
        groups: Groups of the normalizations; ``None``: at most 32, a divisor of a quarter of the channels.
        group_width: Least channels of a group.
        norm_eps: Added to variances.
        rescale: Divide the sum of each branch and its shortcut by sqrt(2) (score_sde).
        resampling: ``conv``: strided convolution down, nearest neighbor and convolution up; ``conv_end``: the same,
            padded at the right and bottom only (DDPM); ``residual``: inside residual blocks (guided-diffusion);
            ``residual_conv``: with a convolution in the shortcut as well (DDPM++); ``fir``: and smoothed (NCSN++).
        heads: Number of attention heads; takes precedence over ``head_width``.
        middle_attention: Whether the middle has attention; ``None``: when any resolution has.
        up_attention: On the way up, attention after ``each`` block or after the ``last`` of a resolution (score_sde).
        input_pyramid: Add the downsampled input at each resolution (NCSN++).
        heads_up: Number of attention heads on the way up; ``None``: ``heads``.
        sinusoids: Channels of the sinusoidal embedding of the level; ``None``: ``width``.
    """

    recordable = True

    def __init__(
        self,
        channels: int,
        size: int,
        width: int,
        multipliers: Sequence[int],
        blocks: int = 2,
        attention: Sequence[int] = (),
        head_width: int | None = 32,
        dropout: float = 0.0,
        steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 2e-2,
        schedule: Literal["linear", "cosine", "continuous"] = "linear",
        embedding: int | None = None,
        level_scale: float = 1.0,
        level_shift: float = 0.0,
        frequency_shift: int = 0,
        scale_shift: bool = True,
        groups: int | None = None,
        group_width: int = 1,
        norm_eps: float = 1e-5,
        rescale: bool = False,
        resampling: Resampling = "conv",
        heads: int | None = None,
        middle_attention: bool | None = None,
        up_attention: Literal["each", "last"] = "each",
        input_pyramid: bool = False,
        heads_up: int | None = None,
        sinusoids: int | None = None,
    ) -> None:
        super().__init__()
        if size % 2 ** (len(multipliers) - 1):
            raise InputError(f"size = {size} cannot be halved {len(multipliers) - 1} times: use fewer multipliers")
        self.channels, self.size = channels, size
        self.schedule = Schedule.named(schedule, steps, beta_start, beta_end)
        inner = embedding or 2 * width
        self.style = style = Style(
            inner, dropout, scale_shift, groups, group_width, norm_eps, rescale, resampling, heads, head_width
        )
        self.sinusoids, self.frequency_shift = sinusoids or width, frequency_shift
        self.level_scale, self.level_shift = level_scale, level_shift
        self.embed = nn.Sequential(nn.Linear(self.sinusoids, inner), nn.SiLU(), nn.Linear(inner, inner), nn.SiLU())
        self.stem = nn.Conv2d(channels, width, 3, padding=1)

        inside = resampling not in ("conv", "conv_end")
        widths = [width * m for m in multipliers]
        skips, current, resolution, brought = [width], width, size, channels
        self.down, self.pyramid = nn.ModuleList(), nn.ModuleList()
        for level, target in enumerate(widths):
            if level:
                down = (
                    ResidualBlock(current, current, style, "halve")
                    if inside
                    else Downsample(current, at_end=resampling == "conv_end")
                )
                self.down.append(Stage([down], "halve"))
                if input_pyramid:
                    self.pyramid.append(SmoothedDownsample(brought, current))
                    brought = current
                resolution //= 2
                skips.append(current)
            for _ in range(blocks):
                layers: list[nn.Module] = [ResidualBlock(current, target, style)]
                current = target
                if resolution in attention:
                    layers.append(Attention(current, style))
                self.down.append(Stage(layers, "plain"))
                skips.append(current)
        middle: list[nn.Module] = [ResidualBlock(current, current, style), ResidualBlock(current, current, style)]
        if bool(attention) if middle_attention is None else middle_attention:
            middle.insert(1, Attention(current, style))
        self.middle = Stage(middle, "plain")
        self.up, style = nn.ModuleList(), replace(style, heads=heads_up or heads)
        for level, target in reversed(list(enumerate(widths))):
            for block in range(blocks + 1):
                layers = [ResidualBlock(current + skips.pop(), target, style)]
                current = target
                if resolution in attention and (up_attention == "each" or block == blocks):
                    layers.append(Attention(current, style))
                self.up.append(Stage(layers, "join"))
            if level:
                up = ResidualBlock(current, current, style, "double") if inside else Upsample(current)
                self.up.append(Stage([up], "double"))
                resolution *= 2
        self.norm = style.norm(current)
        self.head = zeroed(nn.Conv2d(current, channels, 3, padding=1))
        self.eval()

    def forward(self, x: Tensor, t: Tensor | LevelMap) -> Tensor:
        """Predicts the noise, see ``Denoiser``; ``t`` may also be the level of each pixel, (B, 1, H, W)."""
        if isinstance(t, LevelMap):
            levels, weights = t
        elif t.ndim == 4:
            levels, weights = decompose(t)
        else:
            # Two rows, as in a map: kernels round differently for one row and for several.
            levels, weights = t[:, None].expand(-1, 2), None
        position = self.level_scale * (levels.double() - self.level_shift)
        dtype, low = x.dtype, self.stem.weight.dtype
        embedded = self.embed(sinusoidal(position, self.sinusoids, low, self.frequency_shift))
        conditioning = Conditioning(embedded, weights)
        # About a quarter faster on CPUs, more on GPUs; convolutions keep this layout.
        x = x.to(low, memory_format=torch.channels_last)
        h, brought, pyramid = convolved(self.stem, x), x, iter(self.pyramid)
        skips = [h]
        for _, stage in self._stages("down"):
            h = self._run(stage, h, conditioning)
            if stage.role == "halve" and self.pyramid:
                h = brought = self.style.joined(next(pyramid)(brought), h)
            skips.append(h)
        h = self._run(self.middle, h, conditioning)
        for _, stage in self._stages("up"):
            h = self._run(stage, h, conditioning, skips.pop() if stage.role == "join" else None)
        return convolved(self.head, normalized(self.norm, h, act=True)).to(dtype)

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Yields names and modules between stem and norm, in the order of the forward pass."""
        for part in ("down", "middle", "up"):
            stages = [(part, self.middle)] if part == "middle" else self._stages(part)
            for name, stage in stages:
                for k, layer in enumerate(stage):
                    yield f"{name}.{k}", layer

    def _stages(self, part: str) -> list[tuple[str, Stage]]:
        return [(f"{part}.{k}", stage) for k, stage in enumerate(getattr(self, part))]

    def _run(self, stage: Stage, h: Tensor, conditioning: Conditioning, skip: Tensor | None = None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, h, conditioning, skip, use_reentrant=False)
        return stage(h, conditioning, skip)
