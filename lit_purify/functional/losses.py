"""Losses of each sample, which attacks raise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def cross_entropy_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross entropy of each sample, (B,)."""
    return cross_entropy(logits, label, reduction="none")


def margin_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Largest wrong logit minus the right one, (B,): positive where the sample is misclassified.

    Its gradient does not vanish where the softmax saturates (Carlini & Wagner 2017, f_6).
    """
    right = logits.gather(1, label[:, None])[:, 0]
    wrong = logits.scatter(1, label[:, None], -torch.inf).amax(dim=1)
    return wrong - right
