"""Calling networks in chunks of one fixed shape.

Kernels round differently for different batch shapes, and sign steps amplify the difference. With one shape, padded at
the end, a row's result does not depend on the rows beside it nor on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from lit_purify.errors import InputError
from lit_purify.functional.noise import Noise

T = TypeVar("T")

LogitsFunction = Callable[[Tensor, Noise], Tensor]
"""(image (B, C, H, W) in [0, 1], noise) -> logits (B, classes)."""
LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, classes), label (B, ...)) -> loss of each sample (B,), which the attacker raises."""


@runtime_checkable
class Defense(Protocol):
    """A model of which something does not depend on the noise.

    Attributes:
        deterministic: Whether it says that nothing does.
    """

    deterministic: bool

    def __call__(self, image: Tensor, noise: Noise) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1]."""
        ...

    def look(self, image: Tensor, noise: Noise) -> Tensor | None:
        """What depends on the images alone, (B, ...); ``None`` if nothing does."""
        ...

    def seen(self, image: Tensor, found: Tensor) -> LogitsFunction:
        """The same model, which need not ``look`` at these images again."""
        ...


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

    def call(called: LogitsFunction, which: Tensor, noise: Noise) -> tuple[Tensor]:
        with torch.no_grad():
            return (_finite("output", called(image[which], noise)),)

    return _in_chunks(call, model, image, noise, runs, size)[0]


def _in_chunks(
    call: Callable[[LogitsFunction, Tensor, Noise], tuple[Tensor, ...]],
    model: LogitsFunction,
    image: Tensor,
    noise: Noise,
    runs: list[int],
    size: int,
) -> list[Tensor]:
    """What ``call(model, rows of the images, noise)`` says of every image in every run, (B, len(runs), ...) each.

    What is the same in all runs is not computed for each: a defense that says it is deterministic, and answers alike in
    two runs, is not asked again; one that can look at images apart from the noise does so once.
    """
    n, keyed, parts = len(runs), noise.runs(runs), []
    if n > 2 and isinstance(model, Defense) and model.deterministic:
        pair = _in_chunks(call, model, image, noise, runs[:2], size)
        if all(part[:, 0].equal(part[:, 1]) for part in pair):
            return [part[:, :1].expand(-1, n, *part.shape[2:]) for part in pair]
    found = _looked(model, image, noise, size) if n > 1 and len(image) * n > size else None
    for rows, real in chunks(len(image) * n, size, image.device):
        which, called = rows // n, model
        if found is not None and isinstance(model, Defense):
            called = model.seen(image[which], found[which])
        parts.append([values[:real] for values in call(called, which, keyed.rows(rows))])
    return [torch.cat(part).reshape(len(image), n, *part[0].shape[1:]) for part in zip(*parts, strict=True)]


def _looked(model: LogitsFunction, image: Tensor, noise: Noise, size: int) -> Tensor | None:
    """What the model sees in the images apart from the noise, if it can tell."""
    if not isinstance(model, Defense):
        return None
    found = [model.look(image[rows], noise.rows(rows)) for rows, _ in chunks(len(image), size, image.device)]
    told = [part for part in found if part is not None]
    return torch.cat(told) if told else None


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

    def call(called: LogitsFunction, which: Tensor, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            leaf = image[which].detach().requires_grad_()
            logits = called(leaf, noise)
            values = loss(logits, label[which])
            (gradient,) = torch.autograd.grad(values.sum(), leaf)
        return _finite("output", logits.detach()), values.detach(), _finite("gradient", gradient)

    return Draws(*_in_chunks(call, model, image, noise, runs, size))


def gradient_in_chunks(
    model: LogitsFunction, loss: LossFunction, image: Tensor, label: Tensor, noise: Noise, runs: list[int], size: int
) -> tuple[Tensor, Tensor]:
    """Loss (B,) and its gradient (B, C, H, W), averaged over runs: expectation over transformation (Athalye et al.).

    Arguments and errors are those of ``draws_in_chunks``.
    """
    draws = draws_in_chunks(model, loss, image, label, noise, runs, size)
    return average(draws.loss), average(draws.gradient)
