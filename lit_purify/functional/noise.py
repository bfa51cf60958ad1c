"""Keyed noise: a function of seed, sample, run and step only.

Random numbers come from the counter-based generator Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011), implemented on integer tensors. A recomputed forward pass replays its noise exactly, and results do
not depend on batch size, order, process count or interruption. The integers are the same on every device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_CACHED = 32768

EVALUATION, ATTACK, TRAINING = range(3)
"""Streams: noise for different purposes never shares a key. Epoch e of a training uses the stream TRAINING + e."""

MASK_STEP, START_STEP, CHOICE_STEP = _LOW, _LOW - 1, _LOW - 2
"""Steps that no sampler reaches: for random masks, for starts of attacks, and for further random choices of attacks."""


class Noise(Protocol):
    """The source of randomness for purifiers and attacks, with one row per row of the batch."""

    def normal(self, step: int, like: Tensor) -> Tensor:
        """Standard normal noise of the shape of ``like`` (B, ...); equal steps give equal noise."""
        ...

    def uniform(self, step: int, like: Tensor) -> Tensor:
        """Uniform noise in [0, 1) of the shape of ``like`` (B, ...); equal steps give equal noise."""
        ...

    def rows(self, rows: Tensor) -> Noise:
        """The noise of selected rows, (b,) int64; a row may occur several times."""
        ...

    def runs(self, runs: list[int]) -> Noise:
        """The noise of every row in each run, (B len(runs)) rows; the runs of a sample are adjacent."""
        ...


@dataclass(frozen=True)
class KeyedNoise:
    """Noise for a batch of rows, keyed by sample index and run.

    Args:
        seed: Seed of the experiment, 0 .. 2**32 - 1.
        index: Position of each row's sample in the evaluated set, (B,) int64.
        run: Run of each row, (B,) int64; different runs of one sample get independent noise.
        stream: ``EVALUATION``, ``ATTACK``, or ``TRAINING`` plus the epoch.
    """

    seed: int
    index: Tensor
    run: Tensor
    stream: int = EVALUATION

    def rows(self, rows: Tensor) -> KeyedNoise:
        """The noise of selected rows, (b,) int64; a row may occur several times."""
        return replace(self, index=self.index[rows], run=self.run[rows])

    def runs(self, runs: list[int]) -> KeyedNoise:
        """The noise of every row in each run, (B len(runs)) rows; the runs of a sample are adjacent."""
        # Filling avoids a copy from the host, for which a GPU would synchronize.
        run = torch.cat([self.index.new_full((1,), run) for run in runs]).repeat(len(self.index))
        return replace(self, index=self.index.repeat_interleave(len(runs)), run=run)

    def normal(self, step: int, like: Tensor) -> Tensor:
        """Standard normal noise of the shape and type of ``like`` (B, ...)."""
        return self._draw(step, like, normal=True)

    def uniform(self, step: int, like: Tensor) -> Tensor:
        """Uniform noise in [0, 1) of the shape and type of ``like`` (B, ...)."""
        return self._draw(step, like, normal=False)

    def _draw(self, step: int, like: Tensor, normal: bool) -> Tensor:
        index, run = self.index.to(like.device), self.run.to(like.device)
        kernel = _kernel() if like.is_cuda else None
        if kernel is not None:
            return kernel(like, index, run, step, self.seed, self.stream, normal)
        size, transform = math.prod(like.shape[1:]), _to_normal if normal else _to_uniform
        blocks = -(-size // 4)
        block = torch.arange(blocks, device=like.device)[None, :]
        values = like.new_empty(len(like), blocks, 4)
        # On CPUs the words of one part stay in the cache, and no operation starts threads.
        part = max(1, _CACHED // max(1, blocks)) if like.device.type == "cpu" else max(1, len(like))
        for start in range(0, len(like), part):
            rows = slice(start, start + part)
            counter = (block, torch.full_like(block[:, :1], step), run[rows, None], index[rows, None])
            words = philox4x32(counter, (self.seed, self.stream))
            for k in (0, 2):
                transform(words[k], words[k + 1], values[rows, :, k : k + 2])
        return values.flatten(1)[:, :size].reshape(like.shape)


class FrozenNoise(KeyedNoise):
    """Noise of run 0 in every run. The choices of attacks (starts, proposals) still differ between runs."""

    def _draw(self, step: int, like: Tensor, normal: bool) -> Tensor:
        if step in (START_STEP, CHOICE_STEP):
            return super()._draw(step, like, normal)
        return KeyedNoise(self.seed, self.index, torch.zeros_like(self.run), self.stream)._draw(step, like, normal)


@functools.cache
def _kernel() -> Callable[..., Tensor] | None:
    try:
        from lit_purify.functional.noise_kernel import draw
    except ImportError:
        return None
    return draw


def fresh_noise(image: Tensor, stream: int) -> KeyedNoise:
    """Returns noise for a batch of images, with a key from torch's global generator."""
    seed, run = torch.randint(2**32, (2,)).tolist()
    index = torch.arange(len(image), device=image.device)
    return KeyedNoise(seed, index, torch.full_like(index, run), stream)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit words (as int64) for each 128-bit counter under a 64-bit key.

    Args:
        counter: Four broadcastable int64 tensors with values in 0 .. 2**32 - 1.
        key: Two integers in 0 .. 2**32 - 1.
    """
    # numpy's operations have less overhead than torch's: a small draw takes half the time.
    on_cpu = all(word.device.type == "cpu" for word in counter)
    words: list[Any] = [word.numpy().view(np.uint64) if on_cpu else word for word in counter]
    c0, c1, c2, c3 = words
    # A 64-bit product wraps; masking after the shift recovers its unsigned high word. c1 and c3 may keep whole products
    # because they only enter exclusive ors, which are masked.
    for k in range(10):
        k0, k1 = ((word + k * weyl) & _LOW for word, weyl in zip(key, _WEYL, strict=True))
        if k < 2:
            # The words still have the shapes of the counters and broadcast.
            p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
            c0, c2 = ((p1 >> 32) ^ c1 ^ k0) & _LOW, ((p0 >> 32) ^ c3 ^ k1) & _LOW
        else:
            p0, p1 = c0, c2
            p0 *= _MULTIPLIERS[0]
            p1 *= _MULTIPLIERS[1]
            c0, c2 = c1, c3
            for word, product, part in ((c0, p1, k0), (c2, p0, k1)):
                word ^= product >> 32
                word ^= part
                word &= _LOW
        c1, c3 = p1, p0
        if k == 1:
            none = (c0 ^ c2) & 0
            c0, c1, c2, c3 = (word ^ none for word in (c0, c1, c2, c3))
    c1 &= _LOW
    c3 &= _LOW
    return tuple(torch.from_numpy(word.view(np.int64)) if on_cpu else word for word in (c0, c1, c2, c3))


def _to_uniform(first: Tensor, second: Tensor, out: Tensor) -> None:
    # float32 holds 24 bits, so the result never rounds to 1.0.
    for k, words in enumerate((first, second)):
        out[..., k] = (words >> 8).to(torch.float64).mul_(2.0**-24)


def _to_normal(first: Tensor, second: Tensor, out: Tensor) -> None:
    """Applies Box-Muller to pairs of words, in float64 so that float32 results do not depend on vectorization."""
    radius = first.to(torch.float64).add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = second.to(torch.float64).add_(0.5).mul_(2.0 * math.pi * 2.0**-32)
    out[..., 0] = angle.cos().mul_(radius)
    out[..., 1] = angle.sin_().mul_(radius)
