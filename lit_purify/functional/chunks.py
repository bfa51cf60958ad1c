"""Calling networks in chunks of one fixed shape.

Kernels round differently for different batch shapes, and sign steps amplify the difference. With one shape, padded at
the end, a row's result does not depend on the rows beside it nor on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lit_purify.functional.noise import Noise

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, classes), label (B, ...)) -> loss of each sample (B,), which the attacker raises."""


@dataclass(frozen=True)
class AttackedFunction:
    """The function that an attack sees: from images and noise to logits, in two parts where it has them.

    Attributes:
        classified: (purified image, noise) -> logits (B, classes); of a function in one part, (image, noise) -> logits.
        purified: (image (B, C, H, W) in [0, 1], noise, mask) -> the purified image, which the classifier is shown.
            The mask is ``None``, or what ``mask`` gives for these rows: the function then need not compute it. What
            gradient the mask has runs through this part. ``None``: a function in one part, which shows the image.
        mask: (image, noise) -> (B, 1, H, W), where the mask depends on the image alone: one mask serves all draws of
            noise. ``None`` elsewhere.
        relaxed: (image, noise) -> (B, 1, H, W) in [0, 1], differentiable: the mask as an attack on the mask sees it.
            ``None`` where there is no mask, or no image can move it.
        deterministic: Whether the noise changes nothing; a claim, which is checked on two draws.
    """

    classified: Callable[[Tensor, Noise], Tensor]
    purified: Callable[[Tensor, Noise, Tensor | None], Tensor] | None = None
    mask: Callable[[Tensor, Noise], Tensor] | None = None
    relaxed: Callable[[Tensor, Noise], Tensor] | None = None
    deterministic: bool = False

    def logits(self, image: Tensor, noise: Noise, mask: Tensor | None = None) -> Tensor:
        """Logits (B, classes); arguments as for ``purified``."""
        return self.classified(image if self.purified is None else self.purified(image, noise, mask), noise)

    def __call__(self, image: Tensor, noise: Noise) -> Tensor:
        """Logits (B, classes)."""
        return self.logits(image, noise)


def chunks(count: int, size: int, device: torch.device) -> Iterator[tuple[Tensor, int]]:
    """Rows of each chunk, always ``size`` of them (the last row repeated as padding), and how many are real."""
    for start in range(0, count, size):
        rows = torch.arange(start, start + size, device=device).clamp(max=count - 1)
        yield rows, min(size, count - start)


def out_of_memory(error: Exception) -> bool:
    """Whether a computation failed because memory ran out."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def logits_in_chunks(model: AttackedFunction, image: Tensor, noise: Noise, runs: list[int], size: int) -> Tensor:
    """Logits of every image in every run, (B, len(runs), classes), without a gradient.

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
    """``call(rows of the images, noise, mask)`` of every image in every run, (B, len(runs), ...) each.

    What is the same in all runs is computed once: everything of a model that claims to be deterministic and answers
    alike in two runs; and masks that depend on the image alone.
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
    """An attack that follows NaN stands still, and a robust accuracy that rests on it is worthless.

    Raises:
        RuntimeError: Some value is NaN or infinite.
    """
    # Once for all values of all chunks: a GPU is waited for here.
    finite = torch.stack([each.isfinite().all() for each in values.values()]).tolist()
    for what, fine in zip(values, finite, strict=True):
        if not fine:
            raise RuntimeError(
                f"the {what} of the attacked network is NaN or infinite: its robust accuracy means nothing"
            )


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
    model: AttackedFunction,
    loss: LossFunction,
    image: Tensor,
    label: Tensor,
    noise: Noise,
    runs: list[int],
    size: int,
    purified: bool = False,
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
        purified: Differentiate in the purified image in place of the image: the purifier then keeps no graph.

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
    """Loss (B,) and its gradient (B, C, H, W), averaged over runs: expectation over transformation (Athalye et al.).

    Arguments and errors are those of ``draws_in_chunks``.
    """
    draws = draws_in_chunks(model, loss, image, label, noise, runs, size)
    return average(draws.loss), average(draws.gradient)


def carried_in_chunks(model: AttackedFunction, image: Tensor, noise: Noise, direction: Tensor, size: int) -> Tensor:
    """A gradient at the purified images carried back to the images: J^T direction, J the derivative of the purifier.

    Args:
        model: What is attacked; in one part, J is the identity.
        image: (B, C, H, W) in [0, 1].
        noise: Noise of the B rows, one draw for each image.
        direction: Of the shape of the purified images.
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
