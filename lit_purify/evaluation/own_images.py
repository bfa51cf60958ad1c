"""People's own images through a defense: purified, with masks and overlays, and classified."""

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

from lit_purify.data import ImageDataModule
from lit_purify.data.folder import read_image
from lit_purify.defense import DefendedClassifier
from lit_purify.errors import InputError
from lit_purify.evaluation.evaluator import Evaluator
from lit_purify.evaluation.own_files import KEY, Job, check_output, plan, said_by
from lit_purify.evaluation.records import write_whole
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
            # Of what is written the overlay's name is the longest, with an ending while it is written.
            if len(os.fsencode(job.overlay.name)) + len(".partial") > 255:
                raise InputError(f"{job.source}: too long a name for what is written beside it")
            image = read_image(job.source, self.channels, self.size, self.shorter)
            return {"image": image, "sha256": job.sha256(), "item": item}
        except InputError as error:
            return {"name": job.name, "unreadable": str(error)}


def _collated(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The images as a batch, and those that cannot be read, with the reason."""
    images = [item for item in items if "image" in item]
    unreadable = {item["name"]: item["unreadable"] for item in items if "image" not in item}
    return {**(default_collate(images) if images else {}), "unreadable": unreadable}


class Purification(L.LightningModule):
    """Purifies files, and writes each result at once.

    The noise of a file is keyed by the sha256 of its content, its run and the seed: what comes out depends neither on
    the file's name nor on the files beside it, on batches or processes. The first run's image is written.

    Attributes:
        unreadable: By name why files could not be read, which stops none of the others.

    Args:
        defended: The defense.
        jobs: The files.
        runs: How many times each is purified and classified; ``None`` purifies once and classifies nothing.
        overlays: Whether masks and overlays are written.
        chunk: Rows that networks are called with, always this many.
        seed: Of the noise.
        data: Says what the shorter side is resized to, and how many processes read images.
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
        """This process's share, in batches that fill a chunk."""
        self.mine = self.jobs[self.trainer.global_rank :: self.trainer.world_size]
        taker = self.defended.classifier
        sources = _Sources(self.mine, taker.channels, taker.size, self.data.resize)
        fitting = max(1, self.chunk // self.runs)
        return DataLoader(sources, batch_size=fitting, num_workers=self.data.num_workers, collate_fn=_collated)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> int:
        """Purifies and writes a batch; returns how many files it had."""
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
            said = {"sha256": batch["sha256"][k]}
            self._write(self.mine[item], said | {"predictions": predictions[k * n : (k + 1) * n]}, *views)
        return len(image) + len(batch["unreadable"])

    def on_predict_end(self) -> None:
        """What one process could not read, all know; all wait for it."""
        if torch.distributed.is_initialized():
            parts: list[dict[str, str]] = [{}] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, self.unreadable)
            self.unreadable = {name: reason for part in parts for name, reason in part.items()}

    def _write(self, job: Job, said: Any, image: Tensor, purified: Tensor, noised: Tensor, mask: Tensor) -> None:  # noqa: ANN401
        """The purified image comes last: where it is, everything is."""
        job.target.parent.mkdir(parents=True, exist_ok=True)
        for old in (job.mask, job.overlay):
            old.unlink(missing_ok=True)
        if self.overlays:
            if self.defended.purifier.mask is not None:
                _save(mask, job.mask, said)
            _save(panels(torch.stack([image, image, noised, purified]), mask, overlay=1), job.overlay, said)
        _save(purified, job.target, said)


def _save(image: Tensor, path: Path, said: Any) -> None:  # noqa: ANN401
    text, stream = PngInfo(), io.BytesIO()
    text.add_text(KEY, json.dumps(said))
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
    """Purifies images, and writes them as PNG under their own names, with masks and overlays beside them.

    Files are turned upright as their EXIF says, laid on white where they are transparent, and brought to the
    classifier's size (as the data does it: the shorter side resized, the center cropped) and channels. Hidden files do
    not count. Files that cannot be read stop none of the others, and are named at the end.

    Args:
        evaluator: One of its defenses is used; its ``runs`` are N.
        data: It is not read; it names the classes, and says what the shorter side is resized to.
        trainer: Runs the prediction, on any number of processes.
        folder: A folder of images at any depth, or one image.
        output: The folder to write, new or of the same settings, which go on after an interruption; subfolders are
            kept.
        defense: Name of the defense; ``None`` takes the first with a mask, or else the first that purifies.
        overlays: Write NAME.mask.png and NAME.overlay.png too.
        classify: Also classify each image N times, and write ``predictions.csv``: the file, the class that most runs
            agree on (of several the first), its name, its share of the runs, and the class of each run.
        config: Is written beside the images as ``config.yaml``.

    Returns:
        Whether all files could be read.

    Raises:
        InputError: Nothing can be made of the input, or the output holds something else.
    """
    folder, output = folder.expanduser(), output.expanduser()
    name = _choose(evaluator.defenses, defense)
    defended = evaluator.defenses[name]
    taker = defended.classifier
    if not taker.channels:
        raise InputError("these networks take rows of tables, not images: call lit_purify.purify on rows in Python")
    probe = torch.zeros(1, taker.channels, taker.size, taker.size)
    defended.purifier.check_image(probe)
    if classify:
        taker.check_output(probe)
    runs = evaluator.runs if classify else None
    about = identity(classifier=taker, purifier=defended.purifier, data=data.resize)
    own = {name: getattr(evaluator, name) for name in ("chunk", "seed", "precision")}
    settings = {**about, **own, "runs": runs, "overlays": overlays}
    jobs, left_out = plan(folder, output)
    check_output(output, settings)
    todo = [job for job in jobs if not job.done()]
    if 0 < len(todo) < trainer.world_size:
        raise InputError(f"{len(todo)} images are fewer than {trainer.world_size} processes: use fewer devices")
    if trainer.is_global_zero:
        others = f"; {len(left_out)} other files left out, such as {left_out[0]}" if left_out else ""
        there = f", {len(jobs) - len(todo)} of them exist already" if len(todo) < len(jobs) else ""
        of = f" (of {', '.join(evaluator.defenses)})" if defense is None and len(evaluator.defenses) > 1 else ""
        print(f"{len(jobs)} images of {folder}{there}{others}; defense {name}{of}", flush=True)
        print(
            f"{taker.title}, images of {taker.size}x{taker.size} in {taker.channels} channels, as of {data.name}",
            flush=True,
        )
        output.mkdir(parents=True, exist_ok=True)
        write_whole(output / "identity.json", json.dumps(settings, indent=1))
        write_whole(output / "config.yaml", config)
    task = Purification(defended, todo, runs, overlays, evaluator.chunk, evaluator.seed, data).eval()
    try:
        if todo:
            trainer.predict(task, return_predictions=False)
    except SystemExit:
        # Lightning's answer to an interruption.
        if trainer.is_global_zero:
            print(f"\n{output}: stopped; the same command goes on from here", flush=True)
        raise
    unreadable, table = task.unreadable, output / "predictions.csv"
    if len(unreadable) == len(jobs):
        raise InputError(next(iter(unreadable.values())) + (f" ({len(jobs)} alike)" if len(jobs) > 1 else ""))
    if trainer.is_global_zero:
        if classify:
            _write_table(table, [job for job in jobs if job.name not in unreadable], _names(taker, data))
        print(f"Purified: {output}" + (f"\nPredictions: {table}" if classify else ""))
        if unreadable:
            reasons = (unreadable[name] for name in sorted(unreadable))
            print("\n".join((f"Not made, {len(unreadable)} of {len(jobs)}:", *reasons)))
    return not unreadable


def _choose(defenses: Mapping[str, DefendedClassifier], name: str | None) -> str:
    if name is None:
        purifying = [key for key, defended in defenses.items() if defended.purifier.nfe]
        if not purifying:
            raise InputError(f"defenses: none of {', '.join(defenses)} purifies: add one, or name it")
        return next((key for key in purifying if defenses[key].purifier.mask is not None), purifying[0])
    if name not in defenses:
        raise InputError(f"defense {name}: the configuration has {', '.join(defenses)}; name one of these")
    return name


def _names(classifier: Classifier, data: ImageDataModule) -> Sequence[str] | None:
    """Of the classes; ``None`` where the data is not at hand, or is not what the classifier was made for."""
    try:
        classifier.check_classes(data.classes)
    except (InputError, OSError) as error:
        print(f"classes are given by their numbers alone: {error}")
        return None
    return data.classes


def _write_table(path: Path, jobs: Sequence[Job], names: Sequence[str] | None) -> None:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    for k, job in enumerate(jobs):
        predictions = said_by(job.target)["predictions"]
        if k == 0:
            writer.writerow(["file", "class", "name", "share", *(f"run_{run}" for run in range(len(predictions)))])
        counts = Counter(predictions)
        vote = min(counts, key=lambda c: (-counts[c], c))
        name = "" if names is None else names[vote]
        writer.writerow([job.name, vote, name, f"{counts[vote] / len(predictions):.4g}", *predictions])
    # Names of files need not be UTF-8.
    write_whole(path, stream.getvalue().encode(errors="backslashreplace"))
