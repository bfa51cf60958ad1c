"""Calling networks in chunks of one fixed shape.

Kernels round differently for different batch shapes, and sign steps amplify the difference. With one shape, padded at
the end, a row's result does not depend on the rows beside it nor on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lit_purify.errors import InputError
from lit_purify.functional.noise import Noise

T = TypeVar("T")

LogitsFunction = Callable[[Tensor, Noise], Tensor]
"""(image (B, C, H, W) in [0, 1], noise) -> logits (B, classes)."""
LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, classes), label (B, ...)) -> loss of each sample (B,), which the attacker raises."""


def chunks(count: int, size: int, device: torch.device) -> Iterator[tuple[Tensor, int]]:
    """Rows of each chunk, always ``size`` of them (the last row repeated as padding), and how many are real."""
    for start in range(0, count, size):
        rows = torch.arange(start, start + size, device=device).clamp(max=count - 1)
        yield rows, min(size, count - start)


def fitting(compute: Callable[[int], T], size: int) -> tuple[T, int]:
    """``compute(size)``, begun anew with half the size for as long as memory runs out; also the size that fitted.

    Raises:
        InputError: Memory runs out even with chunks of one row.
    """
    while True:
        try:
            return compute(size), size
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
        # Here what the error held is free.
        torch.cuda.empty_cache()
        if size == 1:
            raise InputError("out of memory with chunk = 1: lower data.init_args.batch_size, or take a larger device")
        size //= 2


def _out_of_memory(error: Exception) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def logits_in_chunks(model: LogitsFunction, image: Tensor, noise: Noise, runs: list[int], size: int) -> Tensor:
    """Logits of every image in every run, (B, len(runs), classes), without a gradient."""
    noise = noise.runs(runs)
    parts = []
    with torch.no_grad():
        for rows, real in chunks(len(image) * len(runs), size, image.device):
            parts.append(_finite("output", model(image[rows // len(runs)], noise.rows(rows))[:real]))
    return torch.cat(parts).reshape(len(image), len(runs), -1)


def _finite(what: str, values: Tensor) -> Tensor:
    """The values; an attack that follows NaN stands still, and a robust accuracy that rests on it is worthless.

    Raises:
        RuntimeError: Some value is NaN or infinite.
    """
    if not values.isfinite().all():
        raise RuntimeError(f"the {what} of the attacked network is NaN or infinite: its robust accuracy means nothing")
    return values


class Draws(NamedTuple):
    """What an attacker learns at one point, for each of n draws of noise; all detached.

    Attributes:
        logits: (B, n, classes).
        loss: (B, n).
        gradient: Of the loss in the image, (B, n, C, H, W).
    """

    logits: Tensor
    loss: Tensor
    gradient: Tensor


def average(values: Tensor) -> Tensor:
    """Mean over the draws of (B, n, ...), added one after the other: a kernel may round differently for another B."""
    first, *others = values.unbind(dim=1)
    return sum(others, first) / values.shape[1]


def draws_in_chunks(
    model: LogitsFunction, loss: LossFunction, image: Tensor, label: Tensor, noise: Noise, runs: list[int], size: int
) -> Draws:
    """Logits, loss and gradient for every image in every run.

    Args:
        model: What is attacked.
        loss: Loss of each sample.
        image: (B, C, H, W) in [0, 1].
        label: (B, ...), what the loss takes.
        noise: Noise of the B rows.
        runs: The draws; draws and samples are folded into one batch.
        size: Rows in a chunk.

    Raises:
        RuntimeError: An output or a gradient is NaN or infinite.
    """
    n, noise = len(runs), noise.runs(runs)
    parts = []
    for rows, real in chunks(len(image) * n, size, image.device):
        with torch.enable_grad():
            leaf = image[rows // n].detach().requires_grad_()
            logits = model(leaf, noise.rows(rows))
            values = loss(logits, label[rows // n])
            (gradient,) = torch.autograd.grad(values.sum(), leaf)
        logits, gradient = _finite("output", logits.detach()[:real]), _finite("gradient", gradient[:real])
        parts.append((logits, values.detach()[:real], gradient))
    return Draws(*(torch.cat(part).reshape(len(image), n, *part[0].shape[1:]) for part in zip(*parts, strict=True)))


def gradient_in_chunks(
    model: LogitsFunction, loss: LossFunction, image: Tensor, label: Tensor, noise: Noise, runs: list[int], size: int
) -> tuple[Tensor, Tensor]:
    """Loss (B,) and its gradient (B, C, H, W), averaged over runs: expectation over transformation (Athalye et al.).

    Arguments and errors are those of ``draws_in_chunks``.
    """
    draws = draws_in_chunks(model, loss, image, label, noise, runs, size)
    return average(draws.loss), average(draws.gradient)
