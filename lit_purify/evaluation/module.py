"""The evaluation as a LightningModule: batches from the loader, running accuracies."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence

import lightning as L

from lit_purify.data.base import Batch, ImageDataModule
from lit_purify.errors import InputError
from lit_purify.evaluation.evaluator import Evaluator
from lit_purify.evaluation.ledger import Ledger, View
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
        self._shares: dict[tuple[str, str | None], dict[int, float]] = defaultdict(dict)

    def resume(self, records: Iterable[Record], count: bool) -> None:
        """Takes over what an interrupted evaluation has recorded: it is not evaluated again.

        Args:
            records: The records.
            count: Whether this process counts them in its running accuracies; one process does.
        """
        found = list(records)
        check_records(found, self.evaluator)
        self.ledger.note(found)
        if count:
            self._count(found)

    def setup(self, stage: str) -> None:
        """Checks, and warns."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "on_evaluated") and not isinstance(callback, EvaluationListener):
                raise InputError(
                    f"{type(callback).__name__}: on_evaluated would never be called: let the class inherit "
                    "lit_purify.evaluation.EvaluationListener, too"
                )
        self.evaluator.check(self.data.evaluated)
        if self.trainer.is_global_zero:
            for remark in self.evaluator.remarks():
                print(f"warning: {remark}", file=sys.stderr)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluates what is not recorded yet of a batch, and tells the listeners after each pair."""
        shown = self.data.evaluated.positions[: self.gallery].tolist()
        listeners = [c for c in self.trainer.callbacks if isinstance(c, EvaluationListener)]  # type: ignore[attr-defined]
        for records, views in self.evaluator.evaluate(batch, self.ledger, shown):
            self._count(records)
            for listener in listeners:
                listener.on_evaluated(self.trainer, self, records, views)

    def running(self, defense: str, attack: str | None = None) -> float:
        """Average accuracy so far, on this process alone: robust of a pair, clean without an attack."""
        shares = self._shares[defense, attack].values()
        return sum(shares) / max(1, len(shares))

    def _count(self, records: Sequence[Record]) -> None:
        """Keeps the share of right runs of each sample; that of clean runs is the same under every attack."""
        for record in records:
            for attack, predictions in ((record.attack, record.adversarial), (None, record.clean)):
                share = predictions.count(record.label) / len(predictions)
                self._shares[record.defense, attack][record.index] = share

    @property
    def data(self) -> ImageDataModule:
        """The samples that are evaluated."""
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
