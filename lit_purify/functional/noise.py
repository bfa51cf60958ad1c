"""Keyed noise: a function of (seed, sample, run, step) and of nothing else.

Random numbers come from a counter-based generator, Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011), written on integer tensors. So a recomputed forward pass replays its noise exactly, and a result
does not depend on batch size, order, process count or interruption. The integers are the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

EVALUATION, ATTACK, TRAINING = range(3)
"""Streams: noise drawn for different ends never shares a key; epoch e of a training has the stream TRAINING + e."""

MASK_STEP, START_STEP = _LOW, _LOW - 1
"""Steps that no sampler reaches: the draws of a random mask and of an attack's random start."""


class Noise(Protocol):
    """What a purifier or an attack asks randomness of; rows are the rows of the batch it belongs to."""

    def normal(self, step: int, like: Tensor) -> Tensor:
        """Standard normal noise of the shape of ``like`` (B, ...), the same whenever ``step`` is the same."""
        ...

    def uniform(self, step: int, like: Tensor) -> Tensor:
        """Uniform noise in [0, 1) of the shape of ``like`` (B, ...), the same whenever ``step`` is the same."""
        ...

    def rows(self, rows: Tensor) -> Noise:
        """The noise of some rows, (b,) int64; a row may be named several times."""
        ...

    def runs(self, runs: list[int]) -> Noise:
        """The noise of every row in each of several runs, (B len(runs)) rows, a sample's runs side by side."""
        ...


@dataclass(frozen=True)
class KeyedNoise:
    """Noise for a batch of rows, each with its own sample index and run.

    Args:
        seed: Seed of the experiment, 0 .. 2**32 - 1.
        index: Position of each row's sample in the evaluated set, (B,) int64.
        run: Run of each row, (B,) int64: rows of one sample that differ in run get independent noise.
        stream: What the noise is for: ``EVALUATION``, ``ATTACK`` or ``TRAINING`` plus the epoch.
    """

    seed: int
    index: Tensor
    run: Tensor
    stream: int = EVALUATION

    def rows(self, rows: Tensor) -> KeyedNoise:
        """The noise of some rows, (b,) int64; a row may be named several times."""
        return replace(self, index=self.index[rows], run=self.run[rows])

    def runs(self, runs: list[int]) -> KeyedNoise:
        """The noise of every row in each of several runs, (B len(runs)) rows, a sample's runs side by side."""
        run = torch.tensor(runs, device=self.index.device).repeat(len(self.index))
        return replace(self, index=self.index.repeat_interleave(len(runs)), run=run)

    def normal(self, step: int, like: Tensor) -> Tensor:
        """Standard normal noise of the shape and type of ``like`` (B, ...)."""
        return self._draw(step, like, _to_normal)

    def uniform(self, step: int, like: Tensor) -> Tensor:
        """Uniform noise in [0, 1) of the shape and type of ``like`` (B, ...)."""
        return self._draw(step, like, _to_uniform)

    def _draw(self, step: int, like: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
        size = math.prod(like.shape[1:])
        index, run = self.index.to(like.device)[:, None], self.run.to(like.device)[:, None]
        block = torch.arange(-(-size // 4), device=like.device)[None, :]
        words = philox4x32((block, torch.full_like(block, step), run, index), (self.seed, self.stream))
        values = transform(torch.stack(words, dim=-1))
        return values.flatten(1)[:, :size].reshape(like.shape).to(like.dtype)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit words (as int64) for each 128-bit counter under a 64-bit key.

    Args:
        counter: Four broadcastable int64 tensors with values in 0 .. 2**32 - 1.
        key: Two integers in 0 .. 2**32 - 1.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)  # type: ignore[no-untyped-call]
    k0, k1 = key
    for _ in range(10):
        # The 64-bit product wraps in two's complement; masking after the shift recovers its unsigned high word.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def _to_uniform(words: Tensor) -> Tensor:
    # 24 bits are what float32 holds, so 1.0 is never rounded to.
    return (words >> 8).to(torch.float64) * 2.0**-24


def _to_normal(words: Tensor) -> Tensor:
    """Box-Muller on pairs of words; in float64, so that float32 results do not depend on how a kernel is vectorized."""
    uniform = (words.to(torch.float64) + 0.5) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(uniform[..., 0::2]))
    angle = (2.0 * math.pi) * uniform[..., 1::2]
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(-2)
