"""The evaluator: it attacks defenses on a batch and returns records and pictures."""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lit_purify.attacks import Attack
from lit_purify.data.base import Batch, ImageDataset
from lit_purify.data.subset import subset_sha256
from lit_purify.defense import AttackView, BareClassifier, Exact, Gradient, Purifier, defend
from lit_purify.errors import InputError
from lit_purify.evaluation.diagnostics import cost, denoising, diagnose
from lit_purify.evaluation.ledger import Ledger, View
from lit_purify.evaluation.records import Record
from lit_purify.functional.chunks import logits_in_chunks, out_of_memory
from lit_purify.functional.noise import ATTACK, EVALUATION, KeyedNoise
from lit_purify.functional.threat import l2_norm, linf_norm
from lit_purify.models import Classifier, Precision, Replays, arithmetic, copied, rounded
from lit_purify.recorded import identity

ENSEMBLE = "ensemble"
"""Name, or first part of the name, of the worst case over several attacks."""
_Made = dict[Any, Tensor]
_SKIPPING = "; leaves out samples that an earlier attack left wrong in all runs"


class Evaluator(nn.Module):
    """Attacks every defense on the same samples, and classifies clean and adversarial images N times.

    Clean and adversarial images get the same fresh noise; the attack draws other noise. All defenses share the noise
    keys, so their differences are paired. A record depends only on the arguments and its sample.

    Args:
        classifier: The classifier behind the purifiers.
        defenses: Purifiers, or modules from images (B, C, H, W) in [0, 1] to logits, by name.
        attacks: Attacks by name.
        gradients: The gradient that an attack follows, by the attack's name; the default is ``Exact()``.
        baseline: The defense that the others are compared with; ``None`` takes the first.
        runs: N, runs of each image with fresh noise.
        chunk: Rows of each network call. Part of a result's identity: another number changes the rounding. Use at
            least 16 on a CPU: with fewer rows, the rounding may depend on the number of threads. If memory is too
            small, the evaluator halves it and records the smaller number.
        seed: Seed of all noise.
        skip_lost: Skip samples that an earlier attack of the same threat model broke in all runs; their records repeat
            the earlier ones. This is cheaper and leaves the ensemble of the attacks unchanged, but the rows of later
            attacks then include all attacks before them.
        precision: ``bf16`` lets the denoisers compute with 16 bits (``models.rounded``). It changes results: use it for
            searches. ``float32`` leaves convolutions on GPUs to torch's setting, which is TF32.
        replay: Replay network calls on a GPU as CUDA graphs (``models.Replays``).
        diagnostics: Also report accuracy over fresh replicas and under frozen noise, see ``diagnose``.

    Raises:
        InputError: Arguments are invalid or do not match.
    """

    def __init__(
        self,
        classifier: Classifier,
        defenses: Mapping[str, Purifier | nn.Module],
        attacks: Mapping[str, Attack],
        gradients: Mapping[str, Gradient] | None = None,
        baseline: str | None = None,
        runs: int = 8,
        chunk: int = 64,
        seed: int = 0,
        skip_lost: bool = False,
        precision: Precision = "float32",
        replay: bool = True,
        diagnostics: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("runs", runs), ("chunk", chunk)):
            if value < 1:
                raise InputError(f"{name} = {value}: use at least 1")
        for kind, names, letters in (("defenses", [*defenses], "/-"), ("attacks", [*attacks], "-")):
            if not names:
                raise InputError(f"{kind} is empty: give at least one")
            for name in names:
                if not isinstance(name, str) or not re.fullmatch(rf"[\w{letters}]+", name, re.ASCII):
                    raise InputError(f"{kind}: the name {name!r} may hold only letters, digits, _ {letters}: rename it")
        for name in [name for name, attack in attacks.items() if not isinstance(attack, Attack)]:
            kind = type(attacks[name]).__name__
            raise InputError(f"attacks: {name} is a {kind}: use an attack, or wrap a function in ForeignAttack")
        for name in attacks:
            if name == ENSEMBLE or name.startswith(f"{ENSEMBLE}-"):
                raise InputError(f"attacks: {name!r} is reserved for the worst case over all attacks: use another name")
        self.baseline = next(iter(defenses)) if baseline is None else baseline
        if self.baseline not in defenses:
            raise InputError(f"baseline = {baseline!r} is not among the defenses {', '.join(defenses)}: set it to one")
        if not 0 <= seed < 2**32:
            raise InputError(f"seed = {seed} is outside 0 .. 2**32 - 1: use a seed within it")
        if precision not in get_args(Precision):
            raise InputError(f"precision = {precision!r}: use {' or '.join(get_args(Precision))}")
        if precision == "bf16":
            # One deepcopy, because they share networks; the classifier computes with 32 bits and is not copied.
            defenses, gradients = copied((dict(defenses), dict(gradients or {})), classifier)
            rounded(nn.ModuleList(each for each in defenses.values() if isinstance(each, nn.Module)))
        self.classifier, self.unwrapped = classifier, dict(defenses)
        self.defenses = {name: defend(name, defense, classifier) for name, defense in defenses.items()}
        # Registered, so that they move with this module.
        self.modules_of_defenses = nn.ModuleList(self.defenses.values())
        self.requires_grad_(False).eval()
        self.attacks = dict(attacks)
        self.gradients = dict(gradients or {})
        self.views = self._views()
        self.runs, self.chunk, self.seed, self.skip_lost = runs, chunk, seed, skip_lost
        self.precision, self.replay = precision, replay
        self.replays = Replays(*([self] if replay else []))
        self.diagnostics = diagnostics

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """All pairs (defense, attack), in order."""
        return [(defense, attack) for defense in self.defenses for attack in self.attacks]

    def identity(self) -> dict[str, Any]:
        """The settings that records depend on, without the data; see ``recorded.identity``."""
        more: dict[str, Any] = {"order of the attacks": list(self.attacks)} if self.skip_lost else {}
        if self.precision != "float32":
            more["precision"] = self.precision
        if self.diagnostics:
            more["diagnostics"] = True
        own = {name: getattr(self, name) for name in ("attacks", "gradients", "runs", "chunk", "seed", "skip_lost")}
        return identity(classifier=self.classifier, defenses=self.unwrapped, **own, **more)

    def describe(self) -> list[dict[str, Any]]:
        """The settings and costs of each result, in the order of ``pairs``."""
        described = []
        for defense, attack in self.pairs:
            defended, method, view = self.defenses[defense], self.attacks[attack], self.views[defense, attack]
            described.append(
                {
                    "defense": defense,
                    "attack": attack,
                    "attack_title": method.title,
                    "norm": method.threat,
                    "eps": method.eps,
                    "attack_steps": method.steps,
                    "eot": method.eot,
                    # An attack without a gradient, or with one of another model, names it itself.
                    "gradient": view.gradient if method.gradient == "exact" else method.gradient,
                    "mask_gradient": "none" if method.gradient == "none" else view.mask_gradient,
                    "queries": method.queries._asdict(),
                    "stopping": method.stopping + (_SKIPPING if self.skip_lost else ""),
                    "nfe_defense": defended.purifier.nfe,
                    "nfe_attack": view.nfe,
                    # Images classified in N runs: the adversarial ones, and under the first attack also the clean ones.
                    "evaluations": 2 if attack == next(iter(self.attacks)) else 1,
                    "levels": defended.purifier.levels,
                    "attack_levels": view.levels,
                    **({"diagnostics": cost(method)} if self.diagnostics else {}),
                    "undefended": defended.undefended and defended.classifier is self.classifier,
                }
            )
        return described

    def facts(self, data: ImageDataset, name: str, split: str) -> dict[str, Any]:
        """Facts about the whole evaluation, for its summary.

        Args:
            data: The evaluated samples.
            name: Name of the dataset.
            split: Name of the split.
        """
        denoisers = {d.purifier.denoiser.title for d in self.defenses.values() if d.purifier.nfe}
        return {
            "dataset": name,
            "split": split,
            "classes": list(data.classes),
            "samples": len(data),
            "subset_sha256": subset_sha256(data.positions),
            **{name: getattr(self, name) for name in ("seed", "runs", "chunk")},
            "classifier": self.classifier.title,
            "denoiser": ", ".join(sorted(denoisers)) or "none",
            "denoising": denoising(self.defenses, data, self.seed),
            **({} if data.domain is None else {"features": data.domain.stated()}),
            **({} if data.kinds is None else {"kinds": {int(i): str(data.kinds[i]) for i in data.positions}}),
            "arithmetic": arithmetic(self.classifier.mean.device, self.precision, self.replay, self.replays.refused),
            "versions": {package: version(package) for package in ("torch", "lightning")},
        }

    def check(self, data: ImageDataset) -> None:
        """Raises an ``InputError`` if data, networks and attacks do not match."""
        first = data[0]["image"][None].to(self.classifier.mean.device)
        classifiers = {defended.classifier: name for name, defended in self.defenses.items()}
        for classifier, name in {self.classifier: "", **classifiers}.items():
            try:
                classifier.check_image(first)
                classifier.check_classes(data.classes)
                classifier.check_output(first)
            except InputError as error:
                if classifier is self.classifier:
                    raise
                raise InputError(f"defenses.{name}: {error}") from error
        for defended in self.defenses.values():
            defended.purifier.check_image(first)
        for name, attack in self.attacks.items():
            attack.prepare(data.positions.tolist(), data.domain)
            if "dlr" in attack.raised and len(data.classes) < 3:
                raise InputError(f"attacks.{name}: the dlr loss needs 3 classes, the data has 2: use loss: margin")

    def remarks(self) -> list[str]:
        """Warnings, one line each."""
        found = ((pair, view.remark) for pair, view in self.views.items() if view.remark)
        return [f"{attack} on {defense}: {remark}" for (defense, attack), remark in found]

    def evaluate(
        self, batch: Batch, ledger: Ledger, shown: Iterable[int] = ()
    ) -> Iterator[tuple[list[Record], list[View]]]:
        """Evaluates the samples of a batch that the ledger lacks.

        Args:
            batch: ``image`` (B, C, H, W) in [0, 1], ``label`` and ``index`` (B,).
            ledger: Existing records; the new ones are added to it.
            shown: Indices of samples whose pictures are kept.

        Yields:
            For every (defense, attack) the new records and pictures.

        Raises:
            InputError: The images do not match the classifier, or memory is too small for one row.
        """
        self.classifier.check_image(batch["image"])
        transferred: dict[tuple[str, Classifier, int, int], Tensor] = {}
        indices = batch["index"].tolist()
        for defense, attack in self.pairs:
            todo = [k for k, index in enumerate(indices) if (defense, attack, index) not in ledger.done]
            if not todo:
                continue
            before = {k: self._lost_before(defense, attack, indices[k], ledger) for k in todo}
            records = [record for record in before.values() if record is not None]
            views: list[View] = []
            if remaining := [k for k in todo if before[k] is None]:
                rows = torch.tensor(remaining, device=batch["image"].device)
                part = {name: values[rows] for name, values in batch.items()}
                with self.replays:
                    made, views = self._fitted(defense, attack, part, ledger, transferred, set(shown))
                records = sorted([*records, *made], key=lambda record: record.index)
            ledger.add(records)
            yield records, views

    def _fitted(
        self, defense: str, attack: str, batch: Batch, ledger: Ledger, transferred: _Made, shown: set[int]
    ) -> tuple[list[Record], list[View]]:
        """Retries with less memory if it runs out: first without recorded CUDA graphs, then with half the rows."""
        retried = False
        while True:
            size = ledger.chunk = ledger.chunk or self.chunk
            try:
                return self._evaluate(defense, attack, batch, ledger, transferred, shown, size)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            # Outside of the except block: the error no longer holds tensors.
            before, retried = retried, self.replays.forget()
            torch.cuda.empty_cache()
            if retried and not before:
                continue
            if size == 1:
                raise InputError("out of memory with chunk = 1: lower data.batch_size, or use a larger device")
            ledger.chunk = size // 2
            print(
                f"warning: out of memory with chunks of {size} rows: from {defense} under {attack} on, this process "
                f"has {ledger.chunk}, and its records equal others only up to rounding",
                file=sys.stderr,
            )

    def _evaluate(
        self, defense: str, attack: str, batch: Batch, ledger: Ledger, transferred: _Made, shown: set[int], chunk: int
    ) -> tuple[list[Record], list[View]]:
        started = time.perf_counter()
        defended, image, label, index = self.defenses[defense], batch["image"], batch["label"], batch["index"]
        noise = KeyedNoise(self.seed, index, torch.zeros_like(index), EVALUATION)
        adversarial = self._perturbed(defense, attack, batch, transferred, chunk)
        smaller = None if chunk == self.chunk else chunk

        def classified(images: Tensor, noise: KeyedNoise) -> Tensor:
            return logits_in_chunks(defended.attacked(), images, noise, list(range(self.runs)), chunk).argmax(dim=2)

        delta, indices = adversarial - image, index.tolist()
        found = [classified(adversarial, noise), label, linf_norm(delta), l2_norm(delta)]
        keys = [(defense, i, smaller) for i in indices]
        new = [k for k, key in enumerate(keys) if key not in ledger.clean]
        if new:
            rows = torch.tensor(new, device=image.device)
            found.append(classified(image[rows], noise.rows(rows)))
        # One transfer: each waits for the GPU.
        broken, labels, linf, l2, *clean = _fetched(found)
        ledger.clean |= zip([keys[k] for k in new], *clean, strict=True) if new else {}
        seconds = (time.perf_counter() - started) / len(image)
        records = [
            Record(defense, attack, i, y, ledger.clean[key], runs, large, long, seconds, chunk=smaller)
            for i, y, key, runs, large, long in zip(indices, labels, keys, broken, linf, l2, strict=True)
        ]
        if self.diagnostics:
            method = self.views[defense, attack], self.attacks[attack]
            records = diagnose(records, *method, batch, adversarial, noise, chunk)
        pictured = [k for k, record in enumerate(records) if record.index in shown]
        if not pictured:
            return records, []
        rows = torch.tensor(pictured, device=image.device)
        trace = defended.trace_in_chunks(adversarial[rows], noise.rows(rows), chunk)
        masks = [None] * len(pictured) if trace.mask is None else trace.mask.cpu()
        images = (x.cpu() for x in (image[rows], adversarial[rows], trace.noised, trace.purified))
        return records, [View(records[k], *views) for k, *views in zip(pictured, *images, masks, strict=True)]

    def _perturbed(self, defense: str, attack: str, batch: Batch, transferred: _Made, chunk: int) -> Tensor:
        """Adversarial images. An attack on the bare classifier runs once for all defenses of that classifier."""
        method, image, index = self.attacks[attack], batch["image"], batch["index"]
        noise = KeyedNoise(self.seed, index, torch.zeros_like(index), ATTACK)
        view = self.views[defense, attack]
        if method.target == "defense":
            return method(view, image, batch["label"], noise, chunk)
        keys = [(attack, self.defenses[defense].classifier, i, chunk) for i in index.tolist()]
        if any(key not in transferred for key in keys):
            transferred.update(zip(keys, method(view, image, batch["label"], noise, chunk), strict=True))
        return torch.stack([transferred[key] for key in keys])

    def _lost_before(self, defense: str, attack: str, index: int, ledger: Ledger) -> Record | None:
        """With ``skip_lost``, the record of a sample that an earlier attack broke in all runs."""
        if not self.skip_lost:
            return None
        # Only attacks that come earlier in the order: an interrupted run may hold only a later one's record.
        for earlier in itertools.takewhile(lambda name: name != attack, self.attacks):
            own, other = self.attacks[attack], self.attacks[earlier]
            lost = ledger.lost.get((defense, earlier, index))
            if lost and (own.threat, own.eps) == (other.threat, other.eps):
                return replace(lost, attack=attack, lost_to=lost.lost_to or earlier, seconds=0.0)
        return None

    def _views(self) -> dict[tuple[str, str], AttackView]:
        """The attacked function of every (defense, attack)."""
        for name in self.gradients:
            if name not in self.attacks:
                raise InputError(f"gradients: {name!r} is not among the attacks {', '.join(self.attacks)}: use one")
            if self.attacks[name].target == "classifier":
                raise InputError(f"gradients: {name} attacks the bare classifier and needs no gradient: leave it out")
        views = {}
        for defense, attack in self.pairs:
            bare = self.attacks[attack].target == "classifier"
            gradient = BareClassifier() if bare else self.gradients.get(attack, Exact())
            try:
                views[defense, attack] = gradient.attacked(self.defenses[defense])
            except InputError as error:
                raise InputError(f"gradients: {attack} on {defense}: {error}") from error
        return views


def _fetched(values: Sequence[Tensor]) -> list[Any]:
    """Several tensors as lists, fetched in one transfer."""
    flat, found = torch.cat([each.double().flatten() for each in values]).cpu(), []
    for each in values:
        found.append(flat[: each.numel()].to(each.dtype).reshape(each.shape).tolist())
        flat = flat[each.numel() :]
    return found
