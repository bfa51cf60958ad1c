"""Calls of networks in chunks of one fixed shape.

Kernels round differently for different batch shapes, and sign steps amplify the difference. With one fixed shape,
padded at the end, the result of a row depends neither on its neighbors nor on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lit_purify.functional.noise import Noise

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, classes), label (B, ...)) -> loss of each sample (B,), which the attacker maximizes."""


@dataclass(frozen=True)
class AttackedFunction:
    """The attacked function: it maps images and noise to logits, optionally through a separate purifier.

    Attributes:
        classified: (purified image, noise) -> logits (B, classes). Without ``purified``: (image, noise) -> logits.
        purified: (image (B, C, H, W) in [0, 1], noise, mask) -> purified image, which the classifier receives. The mask
            is ``None`` or the result of ``mask`` for these rows, which then need not be computed again. A gradient
            through the mask runs through this part. ``None``: there is no separate purifier.
        mask: (image, noise) -> (B, 1, H, W) if the mask depends on the image alone, so that one mask serves all noise
            draws; ``None`` otherwise.
        relaxed: (image, noise) -> (B, 1, H, W) in [0, 1], the differentiable mask for attacks on the mask. ``None`` if
            there is no mask or no image can move it.
        deterministic: Claims that noise changes nothing; two draws check the claim.
    """

    classified: Callable[[Tensor, Noise], Tensor]
    purified: Callable[[Tensor, Noise, Tensor | None], Tensor] | None = None
    mask: Callable[[Tensor, Noise], Tensor] | None = None
    relaxed: Callable[[Tensor, Noise], Tensor] | None = None
    deterministic: bool = False

    def logits(self, image: Tensor, noise: Noise, mask: Tensor | None = None) -> Tensor:
        """Returns logits (B, classes); arguments as for ``purified``."""
        return self.classified(image if self.purified is None else self.purified(image, noise, mask), noise)

    def __call__(self, image: Tensor, noise: Noise) -> Tensor:
        """Returns logits (B, classes)."""
        return self.logits(image, noise)


def chunks(count: int, size: int, device: torch.device) -> Iterator[tuple[Tensor, int]]:
    """Yields ``size`` row indices per chunk (the last row repeated as padding) and the number of real rows."""
    for start in range(0, count, size):
        rows = torch.arange(start, start + size, device=device).clamp(max=count - 1)
        yield rows, min(size, count - start)


def out_of_memory(error: Exception) -> bool:
    """Returns whether a computation ran out of memory."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def logits_in_chunks(model: AttackedFunction, image: Tensor, noise: Noise, runs: list[int], size: int) -> Tensor:
    """Returns logits of every image in every run, (B, len(runs), classes), without a gradient.

    Raises:
        RuntimeError: A logit is NaN or infinite.
    """

    def call(which: Tensor, noise: Noise, mask: Tensor | None) -> tuple[Tensor]:
        with torch.no_grad():
            return (model.logits(image[which], noise, mask),)

    (logits,) = _in_chunks(call, model, image, noise, runs, size)
    _check_finite(output=logits)
    return logits


def _in_chunks(
    call: Callable[[Tensor, Noise, Tensor | None], tuple[Tensor, ...]],
    model: AttackedFunction,
    image: Tensor,
    noise: Noise,
    runs: list[int],
    size: int,
) -> list[Tensor]:
    """Returns ``call(image rows, noise, mask)`` for every image in every run, (B, len(runs), ...) each.

    Results that are equal in all runs are computed once: those of a model that claims to be deterministic and gives
    equal results in two runs, and masks that depend on the image alone.
    """
    n, keyed, parts = len(runs), noise.runs(runs), []
    if n > 2 and model.deterministic:
        pair = _in_chunks(call, model, image, noise, runs[:2], size)
        if torch.stack([(part[:, 0] == part[:, 1]).all() for part in pair]).all():
            return [part[:, :1].expand(-1, n, *part.shape[2:]) for part in pair]
    masks = None
    if model.mask is not None and n > 1 and len(image) * n > size:
        found = [
            model.mask(image[rows], noise.rows(rows))[:real] for rows, real in chunks(len(image), size, image.device)
        ]
        masks = torch.cat(found)
    for rows, real in chunks(len(image) * n, size, image.device):
        which = rows // n
        mask = None if masks is None else masks[which]
        parts.append([values[:real] for values in call(which, keyed.rows(rows), mask)])
    return [torch.cat(part).reshape(len(image), n, *part[0].shape[1:]) for part in zip(*parts, strict=True)]


def _check_finite(**values: Tensor) -> None:
    """Raises a ``RuntimeError`` for NaN or infinite values.

    An attack cannot make progress with NaN, and the robust accuracy would be meaningless.
    """
    # One check for all chunks, because a GPU synchronizes here.
    finite = torch.stack([each.isfinite().all() for each in values.values()]).tolist()
    for what, fine in zip(values, finite, strict=True):
        if not fine:
            raise RuntimeError(
                f"the {what} of the attacked network is NaN or infinite, so robust accuracy means nothing: "
                "check its weights, its precision and the scale of its inputs"
            )


class Draws(NamedTuple):
    """An attacker's observations at one point, for each of n noise draws; all detached.

    Attributes:
        logits: (B, n, classes).
        loss: (B, n).
        gradient: Gradient of the loss in the image, (B, n, C, H, W).
    """

    logits: Tensor
    loss: Tensor
    gradient: Tensor


def average(values: Tensor) -> Tensor:
    """Averages the draws of (B, n, ...) in a fixed order; a kernel may round differently for another B."""
    first, *others = values.unbind(dim=1)
    return sum(others, first) / values.shape[1]


def draws_in_chunks(
    model: AttackedFunction,
    loss: LossFunction,
    image: Tensor,
    label: Tensor,
    noise: Noise,
    runs: list[int],
    size: int,
    purified: bool = False,
) -> Draws:
    """Returns logits, loss and gradient for every image in every run.

    Args:
        model: The attacked function.
        loss: Loss of each sample.
        image: (B, C, H, W) in [0, 1].
        label: (B, ...), as the loss expects it.
        noise: Noise of the B rows.
        runs: Runs to draw; runs and samples are folded into one batch.
        size: Rows in a chunk.
        purified: Differentiate in the purified image instead of the input image. The purifier then keeps no graph.

    Raises:
        RuntimeError: An output or a gradient is NaN or infinite.
    """

    def call(which: Tensor, noise: Noise, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        leaf = image[which].detach()
        if purified and model.purified is not None:
            with torch.no_grad():
                leaf = model.purified(leaf, noise, mask).detach()
        with torch.enable_grad():
            leaf.requires_grad_()
            logits = model.classified(leaf, noise) if purified else model.logits(leaf, noise, mask)
            values = loss(logits, label[which])
            (gradient,) = torch.autograd.grad(values.sum(), leaf)
        return logits.detach(), values.detach(), gradient

    found = Draws(*_in_chunks(call, model, image, noise, runs, size))
    _check_finite(output=found.logits, gradient=found.gradient)
    return found


def gradient_in_chunks(
    model: AttackedFunction, loss: LossFunction, image: Tensor, label: Tensor, noise: Noise, runs: list[int], size: int
) -> tuple[Tensor, Tensor]:
    """Returns loss (B,) and gradient (B, C, H, W) averaged over runs: expectation over transformation (Athalye et al.).

    Arguments and errors are those of ``draws_in_chunks``.
    """
    draws = draws_in_chunks(model, loss, image, label, noise, runs, size)
    return average(draws.loss), average(draws.gradient)


def carried_in_chunks(model: AttackedFunction, image: Tensor, noise: Noise, direction: Tensor, size: int) -> Tensor:
    """Pulls a gradient at the purified images back to the input: J^T direction, J the Jacobian of the purifier.

    Args:
        model: The attacked function; J is the identity if it has no separate purifier.
        image: (B, C, H, W) in [0, 1].
        noise: Noise of the B rows, one draw for each image.
        direction: Same shape as the purified images.
        size: Rows in a chunk.

    Raises:
        RuntimeError: The gradient is NaN or infinite.
    """
    if model.purified is None:
        return direction
    parts = []
    for rows, real in chunks(len(image), size, image.device):
        with torch.enable_grad():
            leaf = image[rows].detach().requires_grad_()
            purified = model.purified(leaf, noise.rows(rows), None)
            parts.append(torch.autograd.grad(purified, leaf, direction[rows])[0][:real])
    gradient = torch.cat(parts)
    _check_finite(gradient=gradient)
    return gradient
