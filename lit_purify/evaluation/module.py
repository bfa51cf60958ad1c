"""The evaluation as a LightningModule: batches from the loader, metrics over all processes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import lightning as L
import torch
from torch import nn

from lit_purify.data.base import Batch, ImageDataModule
from lit_purify.errors import InputError
from lit_purify.evaluation.evaluator import Evaluator
from lit_purify.evaluation.ledger import Ledger, View
from lit_purify.evaluation.metric import RobustAccuracy
from lit_purify.evaluation.records import Record


class EvaluationListener:
    """A callback of an evaluation that learns of results at once; inherit it beside ``lightning.Callback``."""

    def on_evaluated(
        self, trainer: L.Trainer, task: RobustnessTask, records: Sequence[Record], views: Sequence[View]
    ) -> None:
        """Some samples were evaluated under one defense and one attack."""


class RobustnessTask(L.LightningModule):
    """Runs an evaluator over a datamodule's samples, on any number of processes.

    Args:
        evaluator: What evaluates.
        gallery: Samples whose images are shown, the first of the evaluated ones.
    """

    def __init__(self, evaluator: Evaluator, gallery: int = 12) -> None:
        super().__init__()
        self.evaluator, self.gallery, self.ledger = evaluator, gallery, Ledger()
        names = [*(" under ".join(pair) for pair in evaluator.pairs), *evaluator.defenses]
        self.metrics = nn.ModuleDict({name: RobustAccuracy(evaluator.runs) for name in names})
        self._clean_counted: set[tuple[str, int]] = set()

    def resume(self, records: Iterable[Record], count: bool) -> None:
        """Takes over what an interrupted evaluation has recorded: it is not evaluated again.

        Args:
            records: The records.
            count: Whether this process counts them in its metrics; one process does.
        """
        found = list(records)
        check_records(found, self.evaluator)
        self.ledger.note(found)
        by_pair: dict[tuple[str, str], list[Record]] = {}
        for record in found:
            by_pair.setdefault((record.defense, record.attack), []).append(record)
        for same in by_pair.values():
            if count:
                self._count(same)
            else:
                self._clean_counted.update((record.defense, record.index) for record in same)

    def setup(self, stage: str) -> None:
        """Checks, and warns."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "on_evaluated") and not isinstance(callback, EvaluationListener):
                raise InputError(
                    f"{type(callback).__name__}: on_evaluated would never be called: let the class inherit "
                    "lit_purify.evaluation.EvaluationListener, too"
                )
        self.evaluator.check(self._data().evaluated)
        if self.trainer.is_global_zero:
            for remark in self.evaluator.remarks():
                print(f"warning: {remark}", file=sys.stderr)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluates what is not recorded yet of a batch, and tells the listeners after each pair."""
        shown = self._data().evaluated.positions[: self.gallery].tolist()
        listeners = [c for c in self.trainer.callbacks if isinstance(c, EvaluationListener)]  # type: ignore[attr-defined]
        for records, views in self.evaluator.evaluate(batch, self.ledger, shown):
            self._count(records)
            for listener in listeners:
                listener.on_evaluated(self.trainer, self, records, views)

    def on_test_epoch_end(self) -> None:
        """Logs the final accuracies, over all processes."""
        values = {}
        for name, metric in self.metrics.items():
            assert isinstance(metric, RobustAccuracy)
            result, kind = metric.compute(), "clean" if name in self.evaluator.defenses else "robust"
            for rule in ("average", "worst", "majority"):
                values[f"{kind}/{name.replace(' under ', '/')}/{rule}"] = getattr(result, rule).value
        self.log_dict(values)

    def running(self, defense: str, attack: str | None = None) -> float:
        """Average accuracy so far, on this process alone: robust of a pair, clean without an attack."""
        metric = self.metrics[defense if attack is None else f"{defense} under {attack}"]
        assert isinstance(metric, RobustAccuracy)
        return float(metric.sums[0]) / max(1, int(metric.count))

    def _count(self, records: Sequence[Record]) -> None:
        """Counts records of one pair; clean runs, which are the same under every attack, once."""

        def add(name: str, predictions: list[list[int]], of: Sequence[Record]) -> None:
            metric = self.metrics[name]
            assert isinstance(metric, RobustAccuracy)
            if of:
                label = torch.tensor([record.label for record in of], device=self.device)
                metric.update(torch.tensor(predictions, device=self.device), label)

        new = [record for record in records if (record.defense, record.index) not in self._clean_counted]
        self._clean_counted.update((record.defense, record.index) for record in new)
        for record in records[:1]:
            add(f"{record.defense} under {record.attack}", [r.adversarial for r in records], records)
            add(record.defense, [r.clean for r in new], new)

    def _data(self) -> ImageDataModule:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, ImageDataModule)
        return data


def check_records(records: Iterable[Record], evaluator: Evaluator) -> None:
    """Raises an ``InputError`` when a record is of another evaluation."""
    pairs = set(evaluator.pairs)
    for record in records:
        if (record.defense, record.attack) not in pairs or len(record.clean) != evaluator.runs:
            raise InputError(
                f"the run's folder holds a record of {record.defense} under {record.attack} with "
                f"{len(record.clean)} runs, which this evaluation does not make; use another folder"
            )
