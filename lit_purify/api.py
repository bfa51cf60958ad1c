"""The Python API: evaluate, check and use defenses in one process."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from lit_purify.atomic import write_whole
from lit_purify.attacks import Attack
from lit_purify.checks.audit import audit_attack
from lit_purify.checks.findings import Findings
from lit_purify.checks.gradcheck import Check, check_gradients
from lit_purify.data.base import ImageDataset
from lit_purify.defense import DefendedClassifier, Exact, Gradient, Purifier, Trace, defend
from lit_purify.errors import InputError
from lit_purify.evaluation import Evaluator, Ledger, Record, View
from lit_purify.evaluation.estimate import work
from lit_purify.evaluation.folder import RunFolder
from lit_purify.evaluation.module import check_records
from lit_purify.evaluation.records import append_records, in_order
from lit_purify.functional.images import check_unit_range
from lit_purify.functional.noise import EVALUATION, KeyedNoise
from lit_purify.models import Classifier, Precision
from lit_purify.recorded import identity
from lit_purify.report import pictures
from lit_purify.report.finished import FinishedRun
from lit_purify.report.html import finish, page, summary_of
from lit_purify.report.summary import table

Defenses = Purifier | nn.Module | Mapping[str, Purifier | nn.Module]
Attacks = Attack | Mapping[str, Attack]
Images = Tensor | tuple[Tensor, Tensor] | Dataset[Any]


class Result(FinishedRun):
    """The result of an evaluation: summary, records, identity and pictures. ``print`` shows the table."""

    def __repr__(self) -> str:
        """The table that ``eval.py`` prints."""
        return table(self.summary)

    def _repr_html_(self) -> str:
        """The table as HTML, for notebooks."""
        return f"<pre>{escape(str(self))}</pre>"

    def to_frame(self) -> Any:  # noqa: ANN401
        """The results as a pandas data frame, one row for each (defense, attack).

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise InputError("to_frame needs pandas: pip install pandas, or use .summary or .to_csv()") from error
        return pandas.read_csv(io.StringIO(self.to_csv()))

    def to_csv(self) -> str:
        """The results as CSV, one row for each (defense, attack); accuracies in [0, 1] with 95 % intervals."""
        stream = io.StringIO()
        rules = [(kind, rule) for kind in ("clean", "robust") for rule in ("average", "worst", "majority")]
        ends = ("", "_low", "_high")
        writer = csv.writer(stream, lineterminator="\n")
        names = ("defense", "attack", "norm", "eps", "gradient", "nfe_defense", "nfe_attack")
        writer.writerow([*names, *(f"{kind}_{rule}{end}" for kind, rule in rules for end in ends)])
        for result in self.summary["results"]:
            values = [result[kind][rule][k] for kind, rule in rules for k in range(len(ends))]
            writer.writerow([*(result[name] for name in names), *values])
        return stream.getvalue()

    def save_report(self, path: str | Path) -> None:
        """Writes the report as one HTML file that needs no network; missing folders are created."""
        write_whole(Path(path).expanduser(), page(self))


def evaluate(
    classifier: nn.Module,
    defenses: Defenses,
    attacks: Attacks,
    images: Images,
    labels: Tensor | None = None,
    *,
    runs: int = 8,
    seed: int = 0,
    chunk: int = 64,
    baseline: str | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
    gradients: Mapping[str, Gradient] | None = None,
    skip_lost: bool = False,
    diagnostics: bool = False,
    batch_size: int = 64,
    gallery: int = 12,
    precision: Precision = "float32",
    replay: bool = True,
) -> Result:
    """Attacks every defense on the same samples, and reports accuracies over N runs with fresh noise.

    With the same settings, ``eval.py`` gives the same records, bit for bit. The evaluation runs on the classifier's
    device. All networks are switched to evaluation mode.

    Args:
        classifier: Any module from images (B, C, H, W) in [0, 1] to logits (B, classes). Attention
            masks need a ``Classifier``.
        defenses: By name, purifiers, classifiers, or other modules from images (B, C, H, W) in [0, 1] to logits.
        attacks: By name, attacks of this library, or ``ForeignAttack`` around an attack of another library.
        images: (N, C, H, W) floats in [0, 1]; a pair of images and labels; a dataset of (image, label) pairs; or a
            datamodule's split.
        labels: (N,) integers; ``None`` if ``images`` includes them.
        runs: N, runs of each image with fresh noise.
        seed: Seed of all noise.
        chunk: Rows of each network call; part of a result's identity.
        baseline: The defense that the others are compared with; ``None`` takes the first.
        folder: Run folder for records, summary, pictures and report; after an interruption, the same call resumes.
            ``None`` keeps everything in memory.
        progress: Whether to show a progress bar.
        gradients: The gradient that an attack follows, by the attack's name; the default is ``Exact()``.
        skip_lost: Skip samples that an earlier attack of the same threat model broke in all runs.
        diagnostics: Also measure accuracy over fresh replicas and under frozen noise, to separate denoising from
            randomness.
        batch_size: Samples evaluated together; it changes no result.
        gallery: Number of samples, from the first, whose pictures are kept.
        precision: ``bf16`` lets the denoisers compute with 16 bits. It changes results: use it for searches.
        replay: Replay network calls on a GPU as CUDA graphs.

    Raises:
        InputError: Arguments are invalid or do not match, or the folder holds a run with other settings.
    """
    own, data, device = _prepared(classifier, images, labels)
    named = _named(defenses, "defense"), _named(attacks, "attack")
    more: dict[str, Any] = {"precision": precision, "replay": replay, "diagnostics": diagnostics}
    evaluator = Evaluator(own, *named, gradients, baseline, runs, chunk, seed, skip_lost, **more)
    evaluator.to(device).check(data)
    where = {"labels": torch.as_tensor(data.labels[data.positions]), "positions": torch.as_tensor(data.positions)}
    about = evaluator.identity() | identity(data={**where, "first": data[0]["image"]})
    home = None if folder is None else RunFolder(Path(folder).expanduser())
    ledger, records, views = Ledger(), list[Record](), list[View]()
    with contextlib.ExitStack() as stack:
        stream = None
        if home is not None:
            stack.callback(home.release)
            home.claim(about, None, write=True)
            records = home.collect(write=True)
            check_records(records, evaluator, data)
            ledger.add(records)
            stream = stack.enter_context(home.open_part(0))
        for new, pictured in _evaluated(evaluator, data, ledger, gallery, batch_size, device, progress):
            if home is None or stream is None:
                records += new
                views += pictured
                continue
            for view in pictured:
                # Pictures come before records: a recorded sample gets no pictures later.
                pictures.write(view, home.overlays)
            append_records(stream, new)
        if home is not None:
            finish(home, evaluator, data, "images", "test")
            return Result.read(home.path)
    records = in_order(records)
    return Result(summary_of(evaluator, data, "images", "test", records, about), records, about, views=views)


def _evaluated(
    evaluator: Evaluator,
    data: ImageDataset,
    ledger: Ledger,
    gallery: int,
    batch_size: int,
    device: torch.device,
    progress: bool,
) -> Iterable[tuple[list[Record], list[View]]]:
    cost = {(d["defense"], d["attack"]): work(d, evaluator.runs) for d in evaluator.describe()}
    total = sum(cost[pair] for pair in evaluator.pairs for i in data.positions if (*pair, int(i)) not in ledger.done)
    shown, style = data.positions[:gallery].tolist(), "{l_bar}{bar}| {elapsed}<{remaining}"
    with tqdm(total=total, desc="attacking", disable=not progress, bar_format=style) as bar:
        for first in range(0, len(data), batch_size):
            items = [data[k] for k in range(first, min(first + batch_size, len(data)))]
            batch = {"image": torch.stack([item["image"] for item in items]).to(device)}
            batch |= {key: torch.tensor([item[key] for item in items], device=device) for key in ("label", "index")}
            for records, views in evaluator.evaluate(batch, ledger, shown):
                yield records, views
                bar.update(cost[records[0].defense, records[0].attack] * len(records))


def gradcheck(
    classifier: nn.Module,
    defenses: Defenses,
    images: Images,
    labels: Tensor | None = None,
    *,
    samples: int = 4,
    seed: int = 0,
    further: Sequence[Check] = (),
) -> Findings:
    """Checks that attacks get the gradient of the defense, see ``checks.gradcheck.check_gradient``.

    Args:
        classifier: As in ``evaluate``.
        defenses: As in ``evaluate``; or one defense.
        images: As in ``evaluate``.
        labels: As in ``evaluate``.
        samples: Number of samples to check, from the first.
        seed: Seed of all noise.
        further: Your own checks: functions of a defended classifier and ``Samples`` that return ``Measured``.

    Returns:
        A list of findings. ``print`` shows one line for each, and the verdict.
    """
    own, data, device = _prepared(classifier, images, labels)
    named = {name: defend(name, d, own).to(device) for name, d in _named(defenses, "defense").items()}
    return check_gradients(named, data, samples, seed, device, further=further)


def audit(
    classifier: nn.Module,
    defenses: Defenses,
    attack: Attacks,
    images: Images,
    labels: Tensor | None = None,
    *,
    gradient: Gradient | None = None,
    samples: int = 32,
    runs: int = 8,
    proposals: int = 100,
    seed: int = 0,
    chunk: int = 64,
) -> Findings:
    """Checks whether other attacks break more samples than this one, see ``checks.audit``.

    Args:
        classifier: As in ``evaluate``.
        defenses: As in ``evaluate``; or one defense.
        attack: An attack of this library that follows a gradient, or a mapping with one such attack.
        images: As in ``evaluate``.
        labels: As in ``evaluate``.
        gradient: The gradient that the attack follows; ``None`` is ``Exact()``.
        samples: Number of samples to audit, from the first.
        runs: N, runs of each image with fresh noise.
        proposals: Steps of the black-box attack.
        seed: Seed of all noise.
        chunk: Rows of each network call, at most.

    Returns:
        A list of findings. ``print`` shows one line for each, and the verdict.

    Raises:
        InputError: The mapping holds several attacks, or the attack follows no gradient.
    """
    if isinstance(attack, Mapping):
        if len(attack) != 1:
            raise InputError(f"audit takes one attack, not {len(attack)}: choose one")
        attack = next(iter(attack.values()))
    own, data, device = _prepared(classifier, images, labels)
    named = {name: defend(name, d, own).to(device) for name, d in _named(defenses, "defense").items()}
    views = {name: (gradient or Exact()).attacked(defended) for name, defended in named.items()}
    return audit_attack(views, attack, data, samples, runs, proposals, seed, chunk, device)


def purify(
    purifier: Purifier,
    images: Tensor,
    classifier: Classifier | None = None,
    *,
    seed: int = 0,
    run: int = 0,
    chunk: int = 64,
) -> Trace:
    """Purifies images. An image's noise is keyed by its position, the seed and the run.

    Args:
        purifier: A purifier.
        images: (N, C, H, W) floats in [0, 1], or rows (N, F).
        classifier: Needed if the purifier's mask follows the attention of a classifier.
        seed: Seed of the noise.
        run: Number of the run; each run has other noise.
        chunk: Rows of each network call.

    Returns:
        Purified and noised images (N, C, H, W) in [0, 1], and the masks (N, 1, H, W); for rows, all (N, F).

    Raises:
        InputError: The purifier needs a classifier, or the images do not match it.
    """
    if not isinstance(images, Tensor):
        raise _no_tensor(images)
    check_unit_range(images)
    purifier.check_image(images[:1])
    if purifier.mask is not None and classifier is None:
        raise InputError("classifier: this purifier's mask is made from a classifier's attention: give one")
    index = torch.arange(len(images), device=images.device)
    noise = KeyedNoise(seed, index, torch.full_like(index, run), EVALUATION)
    # Without a mask the classifier is never called.
    classifier = classifier or Classifier(nn.Identity(), images.shape[-1], 1, images.shape[1])
    return DefendedClassifier(purifier, classifier).trace_in_chunks(images, noise, chunk)


def _prepared(
    classifier: nn.Module, images: Images, labels: Tensor | None
) -> tuple[Classifier, ImageDataset, torch.device]:
    """The classifier, the evaluated samples, and the device of the networks."""
    device = next((p.device for p in classifier.parameters()), torch.device("cpu"))
    if isinstance(images, ImageDataset):
        return as_classifier(classifier, images[0]["image"]), images, device
    if isinstance(images, tuple) and len(images) == 2 and labels is None:
        images, labels = images
    if hasattr(images, "__array__") and not isinstance(images, Tensor):
        raise _no_tensor(images)
    if not isinstance(images, Tensor):
        images, labels = _stacked(images)
    if labels is None:
        raise InputError("labels are missing: give one integer for each image")
    check_unit_range(images)
    labels = torch.as_tensor(labels)
    if labels.is_floating_point():
        raise InputError(f"labels are {labels.dtype}: give integers, one for each image")
    own = as_classifier(classifier, images[0])
    return own, ImageDataset.of(images, labels, [str(k) for k in range(own.num_classes)]), device


def _no_tensor(images: object) -> InputError:
    return InputError(f"images are {type(images).__name__}: give a tensor, such as torch.from_numpy(images).float()")


def _stacked(dataset: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    try:
        items = [dataset[k] for k in range(len(dataset))]
        pairs = [(item["image"], item["label"]) if isinstance(item, Mapping) else (item[0], item[1]) for item in items]
        return torch.stack([image for image, _ in pairs]), torch.tensor([int(label) for _, label in pairs])
    except (TypeError, KeyError, IndexError, ValueError, RuntimeError) as error:
        raise InputError(f"images: give a tensor and labels, or a dataset of (image tensor, label): {error}") from error


def as_classifier(module: nn.Module, image: Tensor) -> Classifier:
    """Wraps a module as a classifier in evaluation mode, with as many classes as it has logits.

    Args:
        module: A module from images (B, C, H, W) in [0, 1] to logits.
        image: (C, H, W), an image of the size that it takes.

    Raises:
        InputError: It does not return logits (1, classes) for one image.
    """
    module.eval()
    if isinstance(module, Classifier):
        return module
    name, device = type(module).__name__, next((p.device for p in module.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            logits = module(image[None].to(device))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"classifier: {name} does not take images of shape {tuple(image.shape)} ({reason}): resize them"
        ) from error
    logits = getattr(logits, "logits", logits)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"classifier: {name} gives {shape} for one image, not logits (1, 2 or more): wrap the network")
    return Classifier(module, image.shape[-1], logits.shape[1], image.shape[0] if image.ndim == 3 else 0)


def _named(value: Any, name: str) -> dict[str, Any]:  # noqa: ANN401
    return dict(value) if isinstance(value, Mapping) else {name: value}
