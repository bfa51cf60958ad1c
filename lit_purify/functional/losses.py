"""Losses of each sample, which attacks maximize."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lit_purify.errors import InputError
from lit_purify.functional.chunks import LossFunction, average

LossName = Literal["ce", "margin", "dlr"]
_TINY = 1e-12


def cross_entropy_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Returns the cross entropy of each sample, (B,)."""
    return cross_entropy(logits, label, reduction="none")


def margin_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Returns the largest wrong logit minus the correct one, (B,): positive if the sample is misclassified.

    Its gradient does not vanish where the softmax saturates (Carlini & Wagner 2017, f_6).
    """
    right = logits.gather(1, label[:, None])[:, 0]
    wrong = logits.scatter(1, label[:, None], -torch.inf).amax(dim=1)
    return wrong - right


def dlr_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Returns the difference-of-logits ratio, (B,): the margin over the gap between the first and the third logit.

    Neither a shift nor a scale of the logits changes it (Croce & Hein 2020, equation 6).

    Raises:
        InputError: There are fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise InputError(f"the dlr loss needs 3 classes, the classifier has {logits.shape[1]}: use loss: margin")
    ranked = logits.sort(dim=1, descending=True).values
    return margin_loss(logits, label) / (ranked[:, 0] - ranked[:, 2] + _TINY)


def targeted_dlr_loss(logits: Tensor, goal: Tensor) -> Tensor:
    """Returns the targeted difference-of-logits ratio, (B,) (Croce & Hein 2020, equation 7).

    Args:
        logits: (B, classes).
        goal: Label and target class of each sample, (B, 2).
    """
    ranked = logits.sort(dim=1, descending=True).values
    right, target = logits.gather(1, goal).unbind(dim=1)
    return (target - right) / (ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2.0 + _TINY)


def named_loss(name: LossName) -> LossFunction:
    """Returns the loss with this name.

    Raises:
        InputError: There is no such loss.
    """
    losses = {"ce": cross_entropy_loss, "margin": margin_loss, "dlr": dlr_loss}
    if name not in losses:
        raise InputError(f"loss = {name!r}: use one of {', '.join(losses)}")
    return losses[name]


def log_probabilities(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log probabilities of all wrong classes together and of the label, (B, n) each.

    Softmax kernels round differently for different batch sizes; in float64 this does not show in float32 results.

    Args:
        logits: (B, n, classes) for n draws of each sample.
        label: (B,).
    """
    log_softmax = logits.double().log_softmax(dim=2)
    at = label[:, None, None].expand(-1, logits.shape[1], 1)
    return log_softmax.scatter(2, at, -torch.inf).logsumexp(dim=2), log_softmax.gather(2, at)[:, :, 0]


def success(logits: Tensor, label: Tensor) -> Tensor:
    """Scores an attack, (B,): the number of wrong draws plus a share of 1 that grows with the mean margin.

    Args:
        logits: (B, n, classes) for n draws of each sample.
        label: (B,).
    """
    wrong = (logits.argmax(dim=2) != label[:, None]).sum(dim=1)
    return (wrong + 0.999 * mean_margin(logits, label).double().sigmoid()).to(logits.dtype)


def mean_margin(logits: Tensor, label: Tensor) -> Tensor:
    """Returns ``margin_loss`` averaged over the draws of (B, n, classes): (B,)."""
    return average(torch.stack([margin_loss(draw, label) for draw in logits.unbind(dim=1)], dim=1))
