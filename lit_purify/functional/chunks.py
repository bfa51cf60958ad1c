"""Calling networks in chunks of one fixed shape.

Kernels round differently for different batch shapes, and sign steps amplify the difference. With one shape, padded at
the end, a row's result does not depend on the rows beside it nor on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lit_purify.functional.noise import Noise

LogitsFunction = Callable[[Tensor, Noise], Tensor]
"""(image (B, C, H, W) in [0, 1], noise) -> logits (B, classes)."""
LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, classes), label (B,)) -> loss of each sample (B,), which the attacker raises."""


def chunks(count: int, size: int, device: torch.device) -> Iterator[tuple[Tensor, int]]:
    """Rows of each chunk, always ``size`` of them (the last row repeated as padding), and how many are real."""
    for start in range(0, count, size):
        rows = torch.arange(start, start + size, device=device).clamp(max=count - 1)
        yield rows, min(size, count - start)


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


def gradient_in_chunks(
    model: LogitsFunction, loss: LossFunction, image: Tensor, label: Tensor, noise: Noise, runs: list[int], size: int
) -> tuple[Tensor, Tensor]:
    """Loss and its gradient in the image, averaged over runs (expectation over transformation, Athalye et al. 2018).

    Args:
        model: What is attacked.
        loss: Loss of each sample.
        image: (B, C, H, W) in [0, 1].
        label: (B,).
        noise: Noise of the B rows.
        runs: The draws to average over; draws and samples are folded into one batch.
        size: Rows in a chunk.

    Returns:
        Loss (B,) and gradient (B, C, H, W), both detached.

    Raises:
        RuntimeError: The gradient is NaN or infinite.
    """
    draws = len(runs)
    noise = noise.runs(runs)
    losses, gradients = [], []
    for rows, real in chunks(len(image) * draws, size, image.device):
        with torch.enable_grad():
            leaf = image[rows // draws].detach().requires_grad_()
            values = loss(model(leaf, noise.rows(rows)), label[rows // draws])
            (gradient,) = torch.autograd.grad(values.sum(), leaf)
        losses.append(values.detach()[:real])
        gradients.append(_finite("gradient", gradient[:real]))
    by_draw = torch.cat(losses).reshape(len(image), draws).unbind(dim=1)
    gradient_by_draw = torch.cat(gradients).reshape(len(image), draws, *image.shape[1:]).unbind(dim=1)
    # Added one after the other: a reduction kernel may round differently for different batch sizes.
    return sum(by_draw[1:], by_draw[0]) / draws, sum(gradient_by_draw[1:], gradient_by_draw[0]) / draws
