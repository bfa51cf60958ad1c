"""Purifies and classifies your own images."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms.functional import to_pil_image

from lit_purify.atomic import write_whole
from lit_purify.data import ImageDataModule
from lit_purify.data.folder import read_image
from lit_purify.defense import DefendedClassifier
from lit_purify.errors import InputError
from lit_purify.evaluation.evaluator import Evaluator
from lit_purify.evaluation.own_files import KEY, Job, check_output, embedded, plan
from lit_purify.functional.chunks import chunks
from lit_purify.functional.noise import EVALUATION, KeyedNoise
from lit_purify.functional.rendering import panels
from lit_purify.models import Classifier, Replays
from lit_purify.recorded import identity


class _Sources(Dataset[dict[str, Any]]):
    def __init__(self, jobs: Sequence[Job], channels: int, size: int, shorter: int | None) -> None:
        self.jobs, self.channels, self.size, self.shorter = jobs, channels, size, shorter

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, item: int) -> dict[str, Any]:
        job = self.jobs[item]
        try:
            # The overlay has the longest name, plus an ending while it is written.
            if len(os.fsencode(job.overlay.name)) + len(".partial") > 255:
                raise InputError(f"{job.source}: its name is too long for the files written beside it: shorten it")
            image = read_image(job.source, self.channels, self.size, self.shorter)
            return {"image": image, "sha256": job.sha256(), "item": item}
        except InputError as error:
            return {"name": job.name, "unreadable": str(error)}


def _collated(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The readable images as a batch, and the reason for each unreadable file, by name."""
    images = [item for item in items if "image" in item]
    unreadable = {item["name"]: item["unreadable"] for item in items if "image" not in item}
    return {**(default_collate(images) if images else {}), "unreadable": unreadable}


class Purification(L.LightningModule):
    """Purifies files, and writes each result at once.

    The noise of a file is keyed by the sha256 of its content, the run and the seed. So a result does not depend on the
    file's name, the other files, batches or processes. The image of the first run is written.

    Attributes:
        unreadable: The reason for each unreadable file, by name; the other files are purified.

    Args:
        defended: The defense.
        jobs: The files.
        runs: Number of runs to purify and classify each file; ``None`` purifies once and does not classify.
        overlays: Whether to write masks and overlays.
        chunk: Rows of each network call.
        seed: Seed of the noise.
        data: Gives the size that the shorter side is resized to, and the number of reading processes.
    """

    def __init__(
        self,
        defended: DefendedClassifier,
        jobs: Sequence[Job],
        runs: int | None,
        overlays: bool,
        chunk: int,
        seed: int,
        data: ImageDataModule,
    ) -> None:
        super().__init__()
        self.defended, self.jobs, self.overlays, self.chunk, self.seed = defended, jobs, overlays, chunk, seed
        self.classify, self.runs = runs is not None, runs or 1
        self.data, self.unreadable = data, dict[str, str]()
        self.replays = Replays(defended)

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The files of this rank, in batches that fill a chunk."""
        self.own_jobs = self.jobs[self.trainer.global_rank :: self.trainer.world_size]
        classifier = self.defended.classifier
        sources = _Sources(self.own_jobs, classifier.channels, classifier.size, self.data.resize)
        batch_size = max(1, self.chunk // self.runs)
        return DataLoader(sources, batch_size=batch_size, num_workers=self.data.num_workers, collate_fn=_collated)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> int:
        """Purifies and writes a batch; returns its number of files."""
        self.unreadable |= batch["unreadable"]
        if "image" not in batch:
            return len(batch["unreadable"])
        image, n = batch["image"], self.runs
        key = torch.tensor([int(sha256[:8], 16) for sha256 in batch["sha256"]], device=self.device)
        noise = KeyedNoise(self.seed, key, torch.zeros_like(key), EVALUATION).runs(list(range(n)))
        with self.replays:
            trace = self.defended.trace_in_chunks(image.repeat_interleave(n, dim=0), noise, self.chunk)
        predictions: list[int] = []
        for rows, real in chunks(len(trace.purified) if self.classify else 0, self.chunk, self.device):
            predictions += self.defended.classifier(trace.purified[rows])[:real].argmax(dim=1).tolist()
        mask = torch.zeros_like(trace.purified[:, :1]) if trace.mask is None else trace.mask
        images = (x[::n].cpu() for x in (trace.purified, trace.noised, mask))
        for k, (item, *views) in enumerate(zip(batch["item"].tolist(), image.cpu(), *images, strict=True)):
            metadata = {"sha256": batch["sha256"][k], "predictions": predictions[k * n : (k + 1) * n]}
            self._write(self.own_jobs[item], metadata, *views)
        return len(image) + len(batch["unreadable"])

    def on_predict_end(self) -> None:
        """Gathers the unreadable files of all ranks."""
        if torch.distributed.is_initialized():
            parts: list[dict[str, str]] = [{}] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, self.unreadable)
            self.unreadable = {name: reason for part in parts for name, reason in part.items()}

    def _write(
        self, job: Job, metadata: Mapping[str, Any], image: Tensor, purified: Tensor, noised: Tensor, mask: Tensor
    ) -> None:
        """Writes a file's results; the purified image comes last and marks the file as done."""
        for old in (job.mask, job.overlay):
            old.unlink(missing_ok=True)
        if self.overlays:
            if self.defended.purifier.mask is not None:
                _save(mask, job.mask, metadata)
            _save(panels(torch.stack([image, image, noised, purified]), mask, overlay=1), job.overlay, metadata)
        _save(purified, job.target, metadata)


def _save(image: Tensor, path: Path, metadata: Mapping[str, Any]) -> None:
    text, stream = PngInfo(), io.BytesIO()
    text.add_text(KEY, json.dumps(metadata))
    to_pil_image(image.mul(255.0).round().byte()).save(stream, "png", pnginfo=text)
    write_whole(path, stream.getvalue())


def purify_files(
    evaluator: Evaluator,
    data: ImageDataModule,
    trainer: L.Trainer,
    folder: Path,
    output: Path,
    defense: str | None = None,
    overlays: bool = True,
    classify: bool = False,
    config: str = "",
) -> bool:
    """Purifies images and writes them as PNGs of the same names, with masks and overlays.

    Each file is rotated by its EXIF orientation, put on white if it is transparent, and brought to the classifier's
    size and channels as the data is: the shorter side is resized, the center cropped. Hidden files are ignored.
    Unreadable files are listed at the end and do not stop the others.

    Args:
        evaluator: Provides the defense, the classifier and N.
        data: Names the classes, and gives the size that the shorter side is resized to; its images are not read.
        trainer: Runs the prediction, with any number of processes.
        folder: A folder of images at any depth, or one image.
        output: The folder to write. It must be empty or hold results of the same settings, which are then completed.
            Subfolders of the input are kept.
        defense: Name of the defense; ``None`` takes the first with a mask, or else the first that purifies.
        overlays: Whether to write NAME.mask.png and NAME.overlay.png.
        classify: Whether to classify each image N times and write ``predictions.csv``: file, most frequent class (ties:
            the lowest), class name, its share of the runs, and the class of each run.
        config: Text of ``config.yaml`` in the output folder.

    Returns:
        Whether all files could be read.

    Raises:
        InputError: The input holds no readable image, or the output holds other files.
    """
    folder, output = folder.expanduser(), output.expanduser()
    name = _choose(evaluator.defenses, defense)
    defended = evaluator.defenses[name]
    classifier = defended.classifier
    if not classifier.channels:
        raise InputError("these networks take rows of tables, not images: call lit_purify.purify on rows in Python")
    probe = torch.zeros(1, classifier.channels, classifier.size, classifier.size)
    defended.purifier.check_image(probe)
    if classify:
        classifier.check_output(probe)
    runs = evaluator.runs if classify else None
    about = identity(classifier=classifier, purifier=defended.purifier, data=data.resize)
    own = {name: getattr(evaluator, name) for name in ("chunk", "seed", "precision")}
    settings = {**about, **own, "runs": runs, "overlays": overlays}
    jobs, not_images = plan(folder, output)
    check_output(output, settings)
    todo = [job for job in jobs if not job.done()]
    if 0 < len(todo) < trainer.world_size:
        raise InputError(
            f"{len(todo)} images are fewer than {trainer.world_size} processes: use fewer devices (trainer.devices)"
        )
    if trainer.is_global_zero:
        others = f"; {len(not_images)} other files left out, such as {not_images[0]}" if not_images else ""
        there = f", {len(jobs) - len(todo)} of them exist already" if len(todo) < len(jobs) else ""
        of = f" (of {', '.join(evaluator.defenses)})" if defense is None and len(evaluator.defenses) > 1 else ""
        print(f"{len(jobs)} images of {folder}{there}{others}; defense {name}{of}", flush=True)
        size = f"{classifier.size}x{classifier.size} in {classifier.channels} channels"
        print(f"{classifier.title}, images of {size}, as of {data.name}", flush=True)
        write_whole(output / "identity.json", json.dumps(settings, indent=1))
        write_whole(output / "config.yaml", config)
    task = Purification(defended, todo, runs, overlays, evaluator.chunk, evaluator.seed, data).eval()
    try:
        if todo:
            trainer.predict(task, return_predictions=False)
    except SystemExit:
        # Lightning raises it after an interruption.
        if trainer.is_global_zero:
            print(f"\n{output}: stopped; the same command resumes from here", flush=True)
        raise
    unreadable, table = task.unreadable, output / "predictions.csv"
    if len(unreadable) == len(jobs):
        raise InputError(next(iter(unreadable.values())) + (f" (all {len(jobs)} files)" if len(jobs) > 1 else ""))
    if trainer.is_global_zero:
        if classify:
            _write_table(table, [job for job in jobs if job.name not in unreadable], _names(classifier, data))
        print(f"Purified: {output}" + (f"\nPredictions: {table}" if classify else ""))
        if unreadable:
            reasons = (unreadable[name] for name in sorted(unreadable))
            print("\n".join((f"Not written, {len(unreadable)} of {len(jobs)}:", *reasons)))
    return not unreadable


def _choose(defenses: Mapping[str, DefendedClassifier], name: str | None) -> str:
    if name is None:
        purifying = [key for key, defended in defenses.items() if defended.purifier.nfe]
        if not purifying:
            raise InputError(f"defenses: none of {', '.join(defenses)} purifies: add a purifier, or name a defense")
        return next((key for key in purifying if defenses[key].purifier.mask is not None), purifying[0])
    if name not in defenses:
        raise InputError(f"defense {name}: no such defense; use one of {', '.join(defenses)}")
    return name


def _names(classifier: Classifier, data: ImageDataModule) -> Sequence[str] | None:
    """Names of the classes; ``None`` if the data is missing or does not match the classifier."""
    try:
        classifier.check_classes(data.classes)
    except (InputError, OSError) as error:
        print(f"predictions have no class names: {error}")
        return None
    return data.classes


def _write_table(path: Path, jobs: Sequence[Job], names: Sequence[str] | None) -> None:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    for k, job in enumerate(jobs):
        predictions = embedded(job.target)["predictions"]
        if k == 0:
            writer.writerow(["file", "class", "name", "share", *(f"run_{run}" for run in range(len(predictions)))])
        counts = Counter(predictions)
        vote = min(counts, key=lambda c: (-counts[c], c))
        name = "" if names is None else names[vote]
        writer.writerow([job.name, vote, name, f"{counts[vote] / len(predictions):.4g}", *predictions])
    # File names may not be valid UTF-8.
    write_whole(path, stream.getvalue().encode(errors="backslashreplace"))
