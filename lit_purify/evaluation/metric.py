"""Accuracy over N runs as a metric that sums over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_purify.functional.statistics import Accuracies, accuracies, outcomes


class RobustAccuracy(Metric):
    """Average, worst-of-N and majority-vote accuracy, each with its 95 % interval.

    Args:
        runs: N, predictions of each sample.
        kwargs: As for any metric.

    Example:
        >>> metric = RobustAccuracy(runs=2)
        >>> metric.update(torch.tensor([[1, 1], [0, 1]]), torch.tensor([1, 1]))
        >>> round(metric.compute().average.value, 2), metric.compute().worst.value
        (0.75, 0.5)
    """

    full_state_update = False
    higher_is_better = True
    sums: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self, runs: int, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.runs = runs
        self.add_state("sums", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, label: Tensor) -> None:
        """Adds samples: predictions (B, N), label (B,)."""
        values = outcomes(predictions, label)
        self.sums += values.sum(dim=0)
        self.squares += values.square().sum(dim=0)
        self.count += len(label)

    def compute(self) -> Accuracies:
        """The three accuracies."""
        return accuracies(self.sums, self.squares, int(self.count), self.runs)
