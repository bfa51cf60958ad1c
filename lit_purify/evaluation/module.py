"""The evaluation as a LightningModule, with running accuracies."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence

import lightning as L

from lit_purify.data.base import Batch, ImageDataModule, ImageDataset
from lit_purify.errors import InputError
from lit_purify.evaluation.evaluator import Evaluator
from lit_purify.evaluation.ledger import Ledger, View
from lit_purify.evaluation.records import Record


class EvaluationListener:
    """Receives each result at once; a callback inherits it beside ``lightning.Callback``."""

    def on_evaluated(
        self, trainer: L.Trainer, task: RobustnessTask, records: Sequence[Record], views: Sequence[View]
    ) -> None:
        """Runs after some samples were evaluated under one defense and one attack.

        Args:
            trainer: The trainer.
            task: The evaluation.
            records: The new records, all of one (defense, attack).
            views: The pictures of gallery samples among them.
        """


class RobustnessTask(L.LightningModule):
    """Runs an evaluator over a datamodule's samples, on any number of processes.

    Args:
        evaluator: The evaluator.
        gallery: Number of samples, from the first, whose pictures are kept.
    """

    def __init__(self, evaluator: Evaluator, gallery: int = 12) -> None:
        super().__init__()
        self.evaluator, self.gallery, self.ledger = evaluator, gallery, Ledger()
        self._shares: dict[tuple[str, str | None], dict[int, float]] = defaultdict(dict)

    def resume(self, records: Iterable[Record], count: bool) -> None:
        """Takes over the records of an interrupted evaluation, so their samples are not evaluated again.

        Args:
            records: The records.
            count: Whether this process counts them in its running accuracies; set it on one process only.

        Raises:
            InputError: A record belongs to another evaluation.
        """
        existing = list(records)
        check_records(existing, self.evaluator, self.data.evaluated)
        self.ledger.add(existing)
        if count:
            self._count(existing)

    def setup(self, stage: str) -> None:
        """Checks callbacks and data, and prints warnings."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "on_evaluated") and not isinstance(callback, EvaluationListener):
                raise InputError(
                    f"{type(callback).__name__}: on_evaluated would never be called: let the class inherit "
                    "lit_purify.evaluation.EvaluationListener too"
                )
        self.evaluator.check(self.data.evaluated)
        if self.trainer.is_global_zero:
            for remark in self.evaluator.remarks():
                print(f"warning: {remark}", file=sys.stderr)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluates the unrecorded samples of a batch, and notifies the listeners after each (defense, attack)."""
        shown = self.data.evaluated.positions[: self.gallery].tolist()
        listeners = [c for c in self.trainer.callbacks if isinstance(c, EvaluationListener)]  # type: ignore[attr-defined]
        for records, views in self.evaluator.evaluate(batch, self.ledger, shown):
            self._count(records)
            for listener in listeners:
                listener.on_evaluated(self.trainer, self, records, views)

    def running(self, defense: str, attack: str | None = None) -> float:
        """Average accuracy so far in [0, 1], on this process: robust, or clean if ``attack`` is ``None``."""
        shares = self._shares[defense, attack].values()
        return sum(shares) / max(1, len(shares))

    def _count(self, records: Sequence[Record]) -> None:
        """Keeps each sample's share of correct runs; all attacks share the clean one."""
        for record in records:
            for attack, predictions in ((record.attack, record.adversarial), (None, record.clean)):
                share = predictions.count(record.label) / len(predictions)
                self._shares[record.defense, attack][record.index] = share

    @property
    def data(self) -> ImageDataModule:
        """The datamodule of the evaluated samples."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, ImageDataModule)
        return data


def check_records(records: Iterable[Record], evaluator: Evaluator, data: ImageDataset) -> None:
    """Raises an ``InputError`` if a record belongs to another evaluation or to other samples."""
    pairs = set(evaluator.pairs)
    labels = dict(zip(data.positions.tolist(), data.labels[data.positions].tolist(), strict=True))
    for record in records:
        if labels.get(record.index) != record.label:
            raise InputError(
                f"the run folder holds a record of sample {record.index} with label {record.label}, but the data has "
                "no such sample: choose another run folder"
            )
        if (record.defense, record.attack) not in pairs or len(record.clean) != evaluator.runs:
            raise InputError(
                f"the run folder holds a record of {record.defense} under {record.attack} with {len(record.clean)} "
                "runs: this evaluation has no such result, choose another run folder"
            )
