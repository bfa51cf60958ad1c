"""Evaluating defenses under attacks: every sample, N runs, one record each."""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lit_purify.attacks import Attack
from lit_purify.data.base import Batch, ImageDataModule
from lit_purify.defense import Attacked, BareClassifier, DefendedClassifier, Exact, Gradient, Purifier
from lit_purify.errors import InputError
from lit_purify.evaluation.metric import RobustAccuracy
from lit_purify.evaluation.records import Key, Record
from lit_purify.functional.chunks import fitting, logits_in_chunks
from lit_purify.functional.noise import ATTACK, EVALUATION, KeyedNoise
from lit_purify.functional.threat import l2_norm, linf_norm
from lit_purify.models import Classifier, Denoiser

ENSEMBLE = "ensemble"
"""What the worst case over several attacks is called, or begins with."""
_SKIPPING = "; leaves out samples that an earlier attack left wrong in all runs"


@dataclass(frozen=True)
class View:
    """One sample to look at: images (C, H, W) in [0, 1], mask (1, H, W) or ``None``, as the first run saw them."""

    record: Record
    original: Tensor
    adversarial: Tensor
    noised: Tensor
    purified: Tensor
    mask: Tensor | None


class EvaluationListener:
    """What callbacks of an evaluation are told, as soon as it is known."""

    def on_evaluated(
        self, trainer: L.Trainer, task: RobustnessTask, records: Sequence[Record], views: Sequence[View]
    ) -> None:
        """Some samples were evaluated under one defense and one attack."""


class RobustnessTask(L.LightningModule):
    """Attacks every defense on the same samples and counts what survives.

    Clean and adversarial images are classified N times with the same fresh noise; the attack draws noise of its own.
    All defenses share the noise keys, so their differences are paired.

    Args:
        classifier: What is defended.
        denoiser: What purifies.
        defenses: Purifiers by name.
        attacks: Attacks by name.
        baseline: The defense that paired differences are taken to; ``None`` is the first.
        runs: N.
        chunk: Rows that networks are called with, always this many. Part of what identifies a result: another number
            changes results by rounding. At least 16 on a CPU: for fewer, kernels were seen to round differently with
            another number of threads, and so with another number of processes on one machine. Where memory is too small
            it is halved, and the records say so.
        seed: Of all noise.
        gallery: Samples whose images are shown, the first of the evaluated ones.
        gradients: What attacks differentiate, by the attack's name; ``Exact()`` where none is given.
        skip_lost: Do not attack a sample again that an earlier attack of the same threat model left wrong in all runs:
            its record repeats the earlier one. Cheaper, and the ensemble of the attacks is the same; the rows of later
            attacks then are those of all attacks so far.
    """

    def __init__(
        self,
        classifier: Classifier,
        denoiser: Denoiser,
        defenses: dict[str, Callable[[Denoiser, Classifier], Purifier]],
        attacks: dict[str, Attack],
        baseline: str | None = None,
        runs: int = 8,
        chunk: int = 64,
        seed: int = 0,
        gallery: int = 12,
        gradients: dict[str, Gradient] | None = None,
        skip_lost: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("runs", runs), ("chunk", chunk)):
            if value < 1:
                raise InputError(f"{name} = {value}: use at least 1")
        for kind, named in (("defenses", defenses), ("attacks", attacks)):
            if not named:
                raise InputError(f"{kind} is empty: give at least one")
            for name in named:
                if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                    raise InputError(f"{kind}: the name {name!r} may hold letters, digits, '-' and '_' only")
        check_attack_names(attacks)
        self.baseline = next(iter(defenses)) if baseline is None else baseline
        if self.baseline not in defenses:
            raise InputError(f"baseline = {baseline!r} is not among the defenses {', '.join(defenses)}")
        if not 0 <= seed < 2**32:
            raise InputError(f"seed = {seed} is outside 0 .. 2**32 - 1")
        self.classifier, self.denoiser = classifier, denoiser
        purifiers = {}
        for name, make in defenses.items():
            try:
                purifiers[name] = make(denoiser, classifier)
            except InputError as error:
                raise InputError(f"defenses.{name}: {error}") from error
        self.defenses = nn.ModuleDict({name: DefendedClassifier(p, p.classifier) for name, p in purifiers.items()})
        self.requires_grad_(False)
        self.attacks = dict(attacks)
        self.views = self._views(gradients or {})
        self.runs, self.chunk, self.seed, self.gallery, self.skip_lost = runs, chunk, seed, gallery, skip_lost
        self._fitting = chunk
        self.metrics = nn.ModuleDict({self.metric_name(*pair): RobustAccuracy(runs) for pair in self.pairs})
        self.clean = nn.ModuleDict({name: RobustAccuracy(runs) for name in defenses})
        self._done: set[Key] = set()
        self._clean_counted: set[tuple[str, int]] = set()
        self._lost: dict[Key, Record] = {}
        self._clean: dict[tuple[str, int, int | None], list[int]] = {}
        self._transferred: dict[tuple[str, Classifier, int, int], Tensor] = {}
        self._shown: set[int] = set()

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every (defense, attack), in order."""
        return [(defense, attack) for defense in self.defenses for attack in self.attacks]

    @property
    def completed(self) -> int:
        """Records that are there."""
        return len(self._done)

    @staticmethod
    def metric_name(defense: str, attack: str) -> str:
        """Name of the robust accuracy of a pair."""
        return f"{defense}/{attack}"

    def describe(self) -> list[dict[str, Any]]:
        """What each result states beside its accuracies, in the order of ``pairs``."""
        described = []
        for defense, attack in self.pairs:
            purifier, how, view = (
                self._defended(defense).purifier,
                self.attacks[attack],
                self.views[defense, attack],
            )
            described.append(
                {
                    "defense": defense,
                    "attack": attack,
                    "attack_title": how.title,
                    "norm": how.norm,
                    "eps": how.eps,
                    "attack_steps": how.steps,
                    "eot": how.eot,
                    # An attack that differentiates nothing, or another model, says so itself.
                    "gradient": view.gradient if how.gradient == "exact" else how.gradient,
                    "mask_gradient": "none" if how.gradient == "none" else view.mask_gradient,
                    "queries": how.queries._asdict(),
                    "stopping": how.stopping + (_SKIPPING if self.skip_lost else ""),
                    "nfe_defense": purifier.nfe,
                    "nfe_attack": view.nfe,
                    # Images that are classified in N runs: clean ones once for all attacks.
                    "evaluations": 2 if attack == next(iter(self.attacks)) else 1,
                    "levels": purifier.levels,
                    "attack_levels": view.levels,
                }
            )
        return described

    def resume(self, records: Iterable[Record], count: bool) -> None:
        """Takes over what an interrupted evaluation has recorded: it is not evaluated again.

        Args:
            records: The records.
            count: Whether this process counts them in its metrics; one process does.
        """
        pairs: dict[tuple[str, str], list[Record]] = {pair: [] for pair in self.pairs}
        for record in records:
            pair = (record.defense, record.attack)
            if pair not in pairs or len(record.clean) != self.runs:
                raise InputError(
                    f"the run's folder holds a record of {record.defense} under {record.attack} with "
                    f"{len(record.clean)} runs, which this evaluation does not make; use another --run"
                )
            self._note(record)
            pairs[pair].append(record)
        for found in pairs.values():
            if count:
                self._count(found)
            else:
                self._clean_counted.update((record.defense, record.index) for record in found)

    def check(self, data: ImageDataModule) -> None:
        """Raises an ``InputError`` when data, networks and attacks do not fit each other."""
        evaluated = data.evaluated
        first = evaluated[0]["image"][None]
        for name in self.defenses:
            defended = self._defended(name)
            try:
                defended.classifier.check_image(first)
                defended.classifier.check_classes(data.classes)
            except InputError as error:
                if defended.classifier is self.classifier:
                    raise
                raise InputError(f"defenses.{name}: {error}") from error
            defended.purifier.check_image(first)
        for attack in self.attacks.values():
            attack.prepare(evaluated.positions.tolist())

    def setup(self, stage: str) -> None:
        """Checks, warns, and chooses what is shown."""
        self.check(self._data())
        for (defense, attack), view in self.views.items():
            if view.remark is not None and self.trainer.is_global_zero:
                print(f"warning: {attack} on {defense}: {view.remark}", file=sys.stderr)
        self._shown = set(self._data().evaluated.positions[: self.gallery].tolist())

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluates what is not yet recorded of a batch, and tells the listeners after each pair."""
        self.classifier.check_image(batch["image"])
        self._transferred.clear()
        for defense, attack in self.pairs:
            todo = [i for i, index in enumerate(batch["index"].tolist()) if (defense, attack, index) not in self._done]
            if not todo:
                continue
            lost = {int(batch["index"][i]): self._lost_before(defense, attack, int(batch["index"][i])) for i in todo}
            records = [record for record in lost.values() if record is not None]
            views: list[View] = []
            if left := [i for i in todo if lost[int(batch["index"][i])] is None]:
                rows = torch.tensor(left, device=self.device)
                made, views = self._evaluate(defense, attack, {name: values[rows] for name, values in batch.items()})
                records = sorted([*records, *made], key=lambda record: record.index)
            for record in records:
                self._note(record)
            self._count(records)
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, EvaluationListener):
                    callback.on_evaluated(self.trainer, self, records, views)

    def on_test_epoch_end(self) -> None:
        """Logs the final accuracies, over all processes."""
        values = {}
        for defense, attack in self.pairs:
            result = self._metric(self.metrics, self.metric_name(defense, attack)).compute()
            for rule in ("average", "worst", "majority"):
                values[f"robust/{defense}/{attack}/{rule}"] = getattr(result, rule).value
        for defense in self.defenses:
            result = self._metric(self.clean, defense).compute()
            for rule in ("average", "worst", "majority"):
                values[f"clean/{defense}/{rule}"] = getattr(result, rule).value
        self.log_dict(values)

    def running(self, defense: str, attack: str | None = None) -> float:
        """Average accuracy so far, on this process alone: robust of a pair, clean without an attack."""
        clean = attack is None
        metric = self._metric(self.clean, defense) if clean else self._metric(self.metrics, f"{defense}/{attack}")
        return float(metric.sums[0]) / max(1, int(metric.count))

    def _evaluate(self, defense: str, attack: str, batch: Batch) -> tuple[list[Record], list[View]]:
        """In chunks that fit into memory."""
        found, fitted = fitting(partial(self._evaluate_in_chunks, defense, attack, batch), self._fitting)
        if fitted != self._fitting:
            print(
                f"warning: out of memory with chunks of {self._fitting} rows: {defense} under {attack} and what "
                f"follows on this process has {fitted}, and equals other results up to rounding only",
                file=sys.stderr,
            )
            self._fitting = fitted
        return found

    def _evaluate_in_chunks(
        self, defense: str, attack: str, batch: Batch, chunk: int
    ) -> tuple[list[Record], list[View]]:
        started = time.perf_counter()
        model, image, label, index = self._defended(defense), batch["image"], batch["label"], batch["index"]
        noise = KeyedNoise(self.seed, index, torch.zeros_like(index), EVALUATION)
        adversarial = self._perturbed(defense, attack, batch, chunk)
        smaller = None if chunk == self.chunk else chunk

        def classified(images: Tensor, noise: KeyedNoise) -> list[list[int]]:
            return logits_in_chunks(model, images, noise, list(range(self.runs)), chunk).argmax(dim=2).tolist()

        # Clean runs are the same under every attack.
        keys = [(defense, int(i), smaller) for i in index]
        if new := [k for k, key in enumerate(keys) if key not in self._clean]:
            rows = torch.tensor(new, device=self.device)
            self._clean.update(zip([keys[k] for k in new], classified(image[rows], noise.rows(rows)), strict=True))
        clean, broken = [self._clean[key] for key in keys], classified(adversarial, noise)
        delta = adversarial - image
        linf, l2 = linf_norm(delta).tolist(), l2_norm(delta).tolist()
        seconds = (time.perf_counter() - started) / len(image)
        records = [
            Record(defense, attack, int(i), int(y), clean[k], broken[k], linf[k], l2[k], seconds, chunk=smaller)
            for k, (i, y) in enumerate(zip(index, label, strict=True))
        ]
        shown_rows = [k for k, record in enumerate(records) if record.index in self._shown]
        views = []
        for first in range(0, len(shown_rows), chunk):
            rows = torch.tensor(shown_rows[first : first + chunk], device=self.device)
            with torch.no_grad():
                trace = model.purifier.trace(adversarial[rows], noise.rows(rows))
            for k, row in enumerate(rows.tolist()):
                mask = None if trace.mask is None else trace.mask[k].cpu()
                original, shown = image[row].cpu(), adversarial[row].cpu()
                views.append(View(records[row], original, shown, trace.noised[k].cpu(), trace.purified[k].cpu(), mask))
        return records, views

    def _perturbed(self, defense: str, attack: str, batch: Batch, chunk: int) -> Tensor:
        """Adversarial images; those of an attack on a bare classifier are the same for all its defenses."""
        how, image, index = self.attacks[attack], batch["image"], batch["index"]
        noise = KeyedNoise(self.seed, index, torch.zeros_like(index), ATTACK)
        keys = [(attack, self._defended(defense).classifier, int(i), chunk) for i in index]
        if how.target == "defense" or any(key not in self._transferred for key in keys):
            adversarial = how(self.views[defense, attack], image, batch["label"], noise, chunk)
            if how.target == "defense":
                return adversarial
            self._transferred.update(zip(keys, adversarial, strict=True))
        return torch.stack([self._transferred[key] for key in keys])

    def _lost_before(self, defense: str, attack: str, index: int) -> Record | None:
        """What stands for a sample that needs no further attack."""
        if not self.skip_lost:
            return None
        # Earlier in the order of the attacks: an interrupted run may have left a later one's record alone.
        for earlier in itertools.takewhile(lambda name: name != attack, self.attacks):
            how, other = self.attacks[attack], self.attacks[earlier]
            if (how.norm, how.eps) == (other.norm, other.eps) and (found := self._lost.get((defense, earlier, index))):
                return replace(found, attack=attack, lost_to=found.lost_to or earlier, seconds=0.0)
        return None

    def _note(self, record: Record) -> None:
        self._done.add(record.key)
        self._clean[record.defense, record.index, record.chunk] = record.clean
        if record.label not in record.adversarial:
            self._lost[record.key] = record

    def _count(self, records: Sequence[Record]) -> None:
        """Counts records of one pair; clean runs, which are the same under every attack, once."""

        def add(metric: RobustAccuracy, predictions: list[list[int]], of: Sequence[Record]) -> None:
            if of:
                label = torch.tensor([record.label for record in of], device=self.device)
                metric.update(torch.tensor(predictions, device=self.device), label)

        new = [record for record in records if (record.defense, record.index) not in self._clean_counted]
        self._clean_counted.update((record.defense, record.index) for record in new)
        for record in records[:1]:
            name = self.metric_name(record.defense, record.attack)
            add(self._metric(self.metrics, name), [r.adversarial for r in records], records)
            add(self._metric(self.clean, record.defense), [r.clean for r in new], new)

    def _views(self, gradients: Mapping[str, Gradient]) -> dict[tuple[str, str], Attacked]:
        """What each attack is handed of each defense."""
        for name in gradients:
            if name not in self.attacks:
                raise InputError(f"gradients: {name!r} is not among the attacks {', '.join(self.attacks)}")
            if self.attacks[name].target == "classifier":
                raise InputError(f"gradients: {name} is handed the bare classifier in any case: leave it out")
        views = {}
        for defense, attack in self.pairs:
            bare = self.attacks[attack].target == "classifier"
            gradient = BareClassifier() if bare else gradients.get(attack, Exact())
            try:
                views[defense, attack] = gradient.attacked(self._defended(defense))
            except InputError as error:
                raise InputError(f"gradients: {attack} on {defense}: {error}") from error
        return views

    def _defended(self, defense: str) -> DefendedClassifier:
        found = self.defenses[defense]
        assert isinstance(found, DefendedClassifier)
        return found

    @staticmethod
    def _metric(metrics: nn.ModuleDict, name: str) -> RobustAccuracy:
        found = metrics[name]
        assert isinstance(found, RobustAccuracy)
        return found

    def _data(self) -> ImageDataModule:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, ImageDataModule)
        return data


def check_attack_names(names: Iterable[str]) -> None:
    """Raises an ``InputError`` when an attack has the name of what is computed from several."""
    for name in names:
        if name == ENSEMBLE or name.startswith(f"{ENSEMBLE}-"):
            raise InputError(f"attacks: {name!r} is what the worst case over all attacks is called; use another name")
