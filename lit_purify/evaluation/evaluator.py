"""The evaluator: a defense, an attack and a batch go in, records and pictures come out."""

from __future__ import annotations

import copy
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
from lit_purify.defense import Attacked, BareClassifier, Exact, Gradient, Purifier, defend
from lit_purify.errors import InputError
from lit_purify.evaluation.diagnostics import cost, diagnose
from lit_purify.evaluation.ledger import Ledger, View
from lit_purify.evaluation.records import Record
from lit_purify.functional.chunks import logits_in_chunks, out_of_memory
from lit_purify.functional.diffusion import noised, to_diffusion
from lit_purify.functional.noise import ATTACK, EVALUATION, KeyedNoise
from lit_purify.functional.threat import l2_norm, linf_norm
from lit_purify.models import Classifier, Precision, Replays, arithmetic, rounded
from lit_purify.recorded import identity

ENSEMBLE = "ensemble"
"""The worst case over several attacks has this name, or begins with it."""
_Made = dict[Any, Tensor]
_SKIPPING = "; leaves out samples that an earlier attack left wrong in all runs"


class Evaluator(nn.Module):
    """Attacks every defense on the same samples, and classifies clean and adversarial images N times.

    Clean and adversarial images see the same fresh noise; the attack draws noise of its own. All defenses share the
    noise keys, so their differences are paired. A record depends on nothing but the arguments and its sample.

    Args:
        classifier: The classifier that purifiers defend.
        defenses: Purifiers, or modules from [0, 1] images to logits, by name.
        attacks: Attacks by name.
        gradients: What attacks differentiate, by the attack's name; ``Exact()`` where none is given.
        baseline: The defense that paired differences are taken to; ``None`` is the first.
        runs: N.
        chunk: Rows that networks are called with, always this many. Part of a result's identity: another number
            changes results by rounding. At least 16 on a CPU: for fewer, kernels were seen to round differently with
            another number of threads. Where memory is too small it is halved, and the records say so.
        seed: Seed of all noise.
        skip_lost: Do not attack a sample again that an earlier attack of the same threat model left wrong in all runs:
            its record repeats the earlier one. Cheaper, and the ensemble of the attacks is the same; the rows of later
            attacks then are those of all attacks so far.
        precision: ``bf16``: the defenses' denoisers compute with 16 bits (``models.rounded``); for searches, since it
            changes results. ``float32`` leaves convolutions on GPUs to torch's setting, which is TF32.
        replay: Replay calls of networks on a GPU as CUDA graphs (``models.Replays``).
        diagnostics: Look at each result by fresh replicas and under frozen noise, see ``diagnose``.

    Raises:
        InputError: Arguments do not fit each other.
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
                    raise InputError(f"{kind}: the name {name!r} may hold letters, digits, _ {letters} only")
        for name in [name for name, attack in attacks.items() if not isinstance(attack, Attack)]:
            kind = type(attacks[name]).__name__
            raise InputError(f"attacks: {name} is a {kind}: give an attack, or ForeignAttack around a function")
        for name in attacks:
            if name == ENSEMBLE or name.startswith(f"{ENSEMBLE}-"):
                raise InputError(f"attacks: {name!r} names the worst case over all attacks; use another name")
        self.baseline = next(iter(defenses)) if baseline is None else baseline
        if self.baseline not in defenses:
            raise InputError(f"baseline = {baseline!r} is not among the defenses {', '.join(defenses)}: set it to one")
        if not 0 <= seed < 2**32:
            raise InputError(f"seed = {seed} is outside 0 .. 2**32 - 1")
        if precision not in get_args(Precision):
            raise InputError(f"precision = {precision!r}: use {' or '.join(get_args(Precision))}")
        if precision == "bf16":
            # In one go: they share networks.
            classifier, defenses, gradients = copy.deepcopy((classifier, dict(defenses), dict(gradients or {})))
            rounded(nn.ModuleList(each for each in defenses.values() if isinstance(each, nn.Module)))
        self.classifier, self.given = classifier, dict(defenses)
        self.defenses = {name: defend(name, defense, classifier) for name, defense in defenses.items()}
        # Moves them with this module.
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
        """Every (defense, attack), in order."""
        return [(defense, attack) for defense in self.defenses for attack in self.attacks]

    def identity(self) -> dict[str, Any]:
        """What records depend on beside the data: see ``recorded.identity``."""
        more: dict[str, Any] = {"order of the attacks": list(self.attacks)} if self.skip_lost else {}
        if self.precision != "float32":
            more["precision"] = self.precision
        if self.diagnostics:
            more["diagnostics"] = True
        own = {name: getattr(self, name) for name in ("attacks", "gradients", "runs", "chunk", "seed", "skip_lost")}
        return identity(classifier=self.classifier, defenses=self.given, **own, **more)

    def describe(self) -> list[dict[str, Any]]:
        """What each result states beside its accuracies, in the order of ``pairs``."""
        described = []
        for defense, attack in self.pairs:
            defended, how, view = self.defenses[defense], self.attacks[attack], self.views[defense, attack]
            described.append(
                {
                    "defense": defense,
                    "attack": attack,
                    "attack_title": how.title,
                    "norm": how.threat,
                    "eps": how.eps,
                    "attack_steps": how.steps,
                    "eot": how.eot,
                    # An attack that differentiates nothing, or another model, says so itself.
                    "gradient": view.gradient if how.gradient == "exact" else how.gradient,
                    "mask_gradient": "none" if how.gradient == "none" else view.mask_gradient,
                    "queries": how.queries._asdict(),
                    "stopping": how.stopping + (_SKIPPING if self.skip_lost else ""),
                    "nfe_defense": defended.purifier.nfe,
                    "nfe_attack": view.nfe,
                    # Images that are classified in N runs: clean ones once for all attacks.
                    "evaluations": 2 if attack == next(iter(self.attacks)) else 1,
                    "levels": defended.purifier.levels,
                    "attack_levels": view.levels,
                    **({"diagnostics": cost(how)} if self.diagnostics else {}),
                    "undefended": defended.undefended and defended.classifier is self.classifier,
                }
            )
        return described

    def facts(self, data: ImageDataset, name: str, split: str) -> dict[str, Any]:
        """What a summary states of a whole evaluation.

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
            "denoising": self.denoising(data),
            **({} if data.domain is None else {"features": data.domain.stated()}),
            **({} if data.kinds is None else {"kinds": {int(i): str(data.kinds[i]) for i in data.positions}}),
            "arithmetic": arithmetic(self.classifier.mean.device, self.precision, self.replay),
            "versions": {package: version(package) for package in ("torch", "lightning")},
        }

    @torch.no_grad()
    def denoising(self, data: ImageDataset, samples: int = 16) -> dict[str, list[float]]:
        """How well denoisers denoise the evaluated images.

        Args:
            data: The evaluated samples.
            samples: How many are noised, from the first.

        Returns:
            For each defense with a denoiser its strongest level, and the mean squared error of the noise predicted
            there, in parts of the error of predicting none: near 0 for a good denoiser, 1 for one that has learned
            nothing.
        """
        found: dict[str, list[float]] = {}
        known: dict[tuple[int, int], float] = {}
        device = self.classifier.mean.device
        items = [data[k] for k in range(min(samples, len(data)))]
        image = torch.stack([item["image"] for item in items]).to(device)
        index = torch.tensor([item["index"] for item in items], device=device)
        noise = KeyedNoise(self.seed, index, torch.zeros_like(index), EVALUATION)
        for name, defended in self.defenses.items():
            purifier = defended.purifier
            if not purifier.nfe or image.shape[-1] != purifier.denoiser.size:
                continue
            denoiser, level = purifier.denoiser, purifier.levels[0]
            if (id(denoiser), level) not in known:
                u = to_diffusion(image)
                eps = noise.normal(0, u)
                t = torch.full((len(u),), level, device=device)
                error = denoiser(noised(u, denoiser.schedule.at(level), eps), t) - eps
                known[id(denoiser), level] = float(error.square().mean() / eps.square().mean())
            found[name] = [level, known[id(denoiser), level]]
        return found

    def check(self, data: ImageDataset) -> None:
        """Raises an ``InputError`` when data, networks and attacks do not fit each other."""
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
        """What to warn of, a line each."""
        found = ((pair, view.remark) for pair, view in self.views.items() if view.remark)
        return [f"{attack} on {defense}: {remark}" for (defense, attack), remark in found]

    def evaluate(
        self, batch: Batch, ledger: Ledger, shown: Iterable[int] = ()
    ) -> Iterator[tuple[list[Record], list[View]]]:
        """Evaluates what the ledger lacks of a batch: for every (defense, attack) the new records, and pictures.

        Args:
            batch: ``image`` (B, C, H, W) in [0, 1], ``label`` and ``index`` (B,).
            ledger: What is known already; it is brought up to date.
            shown: Samples (by index) of which pictures are taken.
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
            if left := [k for k in todo if before[k] is None]:
                rows = torch.tensor(left, device=batch["image"].device)
                part = {name: values[rows] for name, values in batch.items()}
                with self.replays:
                    made, views = self._fitted(defense, attack, part, ledger, transferred, set(shown))
                records = sorted([*records, *made], key=lambda record: record.index)
            ledger.note(records)
            yield records, views

    def _fitted(
        self, defense: str, attack: str, batch: Batch, ledger: Ledger, transferred: dict[Any, Tensor], shown: set[int]
    ) -> tuple[list[Record], list[View]]:
        """In chunks that fit into memory: where it runs out, first without earlier graphs, then with half the rows."""
        retried = False
        while True:
            size = ledger.chunk = ledger.chunk or self.chunk
            try:
                return self._evaluate(defense, attack, batch, ledger, transferred, shown, size)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            # Here what the error held is free.
            before, retried = retried, self.replays.forget()
            torch.cuda.empty_cache()
            if retried and not before:
                continue
            if size == 1:
                raise InputError("out of memory with chunk = 1: use smaller batches, or a larger device")
            ledger.chunk = size // 2
            print(
                f"warning: out of memory with chunks of {size} rows: {defense} under {attack} and what follows on this "
                f"process has {ledger.chunk}, and equals other results up to rounding only",
                file=sys.stderr,
            )

    def _evaluate(
        self, defense: str, attack: str, batch: Batch, ledger: Ledger, made: _Made, shown: set[int], chunk: int
    ) -> tuple[list[Record], list[View]]:
        started = time.perf_counter()
        defended, image, label, index = self.defenses[defense], batch["image"], batch["label"], batch["index"]
        noise = KeyedNoise(self.seed, index, torch.zeros_like(index), EVALUATION)
        adversarial = self._perturbed(defense, attack, batch, made, chunk)
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
        # Fetched in one go: a GPU is waited for here.
        broken, labels, linf, l2, *clean = _fetched(found)
        ledger.clean |= zip([keys[k] for k in new], *clean, strict=True) if new else {}
        seconds = (time.perf_counter() - started) / len(image)
        records = [
            Record(defense, attack, i, y, ledger.clean[key], runs, large, long, seconds, chunk=smaller)
            for i, y, key, runs, large, long in zip(indices, labels, keys, broken, linf, l2, strict=True)
        ]
        if self.diagnostics:
            how = self.views[defense, attack], self.attacks[attack]
            records = diagnose(records, *how, batch, adversarial, noise, chunk)
        pictured = [k for k, record in enumerate(records) if record.index in shown]
        if not pictured:
            return records, []
        rows = torch.tensor(pictured, device=image.device)
        trace = defended.trace_in_chunks(adversarial[rows], noise.rows(rows), chunk)
        masks = [None] * len(pictured) if trace.mask is None else trace.mask.cpu()
        images = (x.cpu() for x in (image[rows], adversarial[rows], trace.noised, trace.purified))
        return records, [View(records[k], *views) for k, *views in zip(pictured, *images, masks, strict=True)]

    def _perturbed(self, defense: str, attack: str, batch: Batch, transferred: dict[Any, Tensor], chunk: int) -> Tensor:
        """Adversarial images; those of an attack on a bare classifier are the same for all its defenses."""
        how, image, index = self.attacks[attack], batch["image"], batch["index"]
        noise = KeyedNoise(self.seed, index, torch.zeros_like(index), ATTACK)
        view = self.views[defense, attack]
        if how.target == "defense":
            return how(view, image, batch["label"], noise, chunk)
        keys = [(attack, self.defenses[defense].classifier, i, chunk) for i in index.tolist()]
        if any(key not in transferred for key in keys):
            transferred.update(zip(keys, how(view, image, batch["label"], noise, chunk), strict=True))
        return torch.stack([transferred[key] for key in keys])

    def _lost_before(self, defense: str, attack: str, index: int, ledger: Ledger) -> Record | None:
        """The record of a sample that needs no further attack."""
        if not self.skip_lost:
            return None
        # Earlier in the order of the attacks: an interrupted run may have left a later one's record alone.
        for earlier in itertools.takewhile(lambda name: name != attack, self.attacks):
            how, other = self.attacks[attack], self.attacks[earlier]
            found = ledger.lost.get((defense, earlier, index))
            if found and (how.threat, how.eps) == (other.threat, other.eps):
                return replace(found, attack=attack, lost_to=found.lost_to or earlier, seconds=0.0)
        return None

    def _views(self) -> dict[tuple[str, str], Attacked]:
        """What each attack is handed of each defense."""
        for name in self.gradients:
            if name not in self.attacks:
                raise InputError(f"gradients: {name!r} is not among the attacks {', '.join(self.attacks)}")
            if self.attacks[name].target == "classifier":
                raise InputError(f"gradients: {name} is handed the bare classifier in any case: leave it out")
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
    """Integers and floats of several tensors as lists."""
    flat, found = torch.cat([each.double().flatten() for each in values]).cpu(), []
    for each in values:
        found.append(flat[: each.numel()].to(each.dtype).reshape(each.shape).tolist())
        flat = flat[each.numel() :]
    return found
