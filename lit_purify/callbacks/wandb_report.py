"""What an evaluation shows in Weights & Biases, with a WandbRun as a logger."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import wandb
from lightning.pytorch.callbacks import Callback
from PIL import Image

from lit_purify.callbacks.wandb_run import log_settings, wandb_run
from lit_purify.evaluation.estimate import peak_memory
from lit_purify.evaluation.folder import RunFolder
from lit_purify.evaluation.module import EvaluationListener, RobustnessTask, View
from lit_purify.evaluation.records import Record
from lit_purify.functional.rendering import spans
from lit_purify.report.summary import RULES

_PANELS = ("original", "adversarial", "mask", "noised", "purified")


class WandbReport(Callback, EvaluationListener):
    """Logs accuracies, mask overlays that can be toggled, a table of samples, the frontier and costs; rank zero alone.

    Names: ``running/robust/<defense>/<attack>`` and ``running/clean/<defense>`` over ``running/samples``;
    ``robust/<defense>/<attack>/<rule>`` and ``clean/<defense>/<rule>`` (logged by the task);
    ``cost/<defense>/...``; the tables ``results``, ``samples`` and ``frontier``; the images ``masks`` and ``pictures``.
    """

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs what is evaluated."""
        logger = wandb_run(trainer)
        if logger is None or not isinstance(pl_module, RobustnessTask):
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        facts = {
            "subset_sha256": data.subset_sha256,
            "samples": len(data.evaluated),
            "nfe": {result["defense"]: result["nfe_defense"] for result in pl_module.describe()},
        }
        log_settings(logger, RunFolder(Path(trainer.default_root_dir)), facts)
        run = logger.experiment
        run.define_metric("running/samples", hidden=True)
        names = [f"robust/{defense}/{attack}" for defense, attack in pl_module.pairs]
        for name in (*names, *(f"clean/{defense}" for defense in pl_module.defenses), "images_per_second"):
            run.define_metric(f"running/{name}", step_metric="running/samples")
        self.told = time.perf_counter()

    def on_evaluated(
        self, trainer: L.Trainer, task: RobustnessTask, records: Sequence[Record], views: Sequence[View]
    ) -> None:
        """Running accuracies of one pair, over the samples of rank zero; the speed is that of all processes."""
        logger = wandb_run(trainer)
        if logger is None:
            return
        now = time.perf_counter()
        speed, self.told = len(records) * trainer.world_size / (now - self.told), now
        defense, attack = records[0].defense, records[0].attack
        logger.log_metrics(
            {
                "running/samples": task.completed,
                f"running/robust/{defense}/{attack}": task.running(defense, attack),
                f"running/clean/{defense}": task.running(defense),
                "running/images_per_second": speed,
                "cost/peak_memory_gib": peak_memory(task.device) / 2**30,
            }
        )

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reads what all processes have written into the run's folder."""
        logger = wandb_run(trainer)
        if logger is None or not isinstance(pl_module, RobustnessTask):
            return
        folder = RunFolder(Path(trainer.default_root_dir))
        classes = trainer.datamodule.classes  # type: ignore[attr-defined]
        if folder.summary.exists():
            logger.log_media(_figures(json.loads(folder.summary.read_text())))
        logger.log_media(_pictures(folder, classes))
        drawn = folder.path / "frontier.png"
        if drawn.exists():
            logger.experiment.log({"frontier_drawn": wandb.Image(str(drawn))})
        kept = [folder.config, folder.identity, folder.records, folder.summary, folder.report, folder.overlays]
        logger.log_files("evaluation", "evaluation", kept)


def _figures(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Costs, a table of all results, and the clean against the robust accuracy of every defense."""
    logged: dict[str, Any] = {}
    rows, points = [], []
    for result in summary["results"]:
        defense, attack, clean, robust = (result[key] for key in ("defense", "attack", "clean", "robust"))
        # Seconds of all processes: the speed of one.
        speed = summary["samples"] / max(1e-9, result["seconds"])
        logged[f"cost/{defense}/nfe"] = result["nfe_defense"]
        logged[f"cost/{defense}/{attack}/nfe"] = result["nfe_attack"]
        logged[f"cost/{defense}/{attack}/images_per_second"] = speed
        intervals = [value for kind in (clean, robust) for rule in RULES for value in kind[rule]]
        rows.append([defense, attack, result["gradient"], result["nfe_defense"], speed, *intervals])
        points.append([defense, attack, clean["average"][0], robust["average"][0]])
    values = [f"{kind} {rule}{end}" for kind in ("clean", "robust") for rule in RULES for end in ("", " low", " high")]
    head = ["defense", "attack", "gradient", "nfe", "images per second"]
    frontier = wandb.Table(columns=["defense", "attack", "clean", "robust"], data=points)
    logged["results"] = wandb.Table(columns=[*head, *values], data=rows)
    logged["frontier"] = wandb.plot.scatter(frontier, "clean", "robust", title="Clean against robust accuracy")
    return logged


def _pictures(folder: RunFolder, classes: Sequence[str]) -> dict[str, Any]:
    """The samples whose pictures lie in the folder, whichever process has written them."""
    rows: list[list[Any]] = []
    overlays: list[wandb.Image] = []
    strips: list[wandb.Image] = []
    for record, strip in folder.pictured(folder.collect(write=False)):
        images = dict(zip(_PANELS, _cut(strip), strict=True))
        mask = strip.with_suffix(".mask.png")
        caption = f"{record.defense}, {record.attack}, sample {record.index}"
        strips.append(wandb.Image(str(strip), caption=caption))
        shown = _masked(images["adversarial"], mask, caption) if mask.exists() else None
        if shown is not None:
            overlays.append(shown)
        rows.append(
            [
                record.defense,
                record.attack,
                record.index,
                classes[record.label],
                *(", ".join(classes[p] for p in predictions) for predictions in (record.clean, record.adversarial)),
                *(sum(p == record.label for p in ps) / len(ps) for ps in (record.clean, record.adversarial)),
                record.linf,
                record.l2,
                *(shown if name == "mask" else wandb.Image(image) for name, image in images.items()),
            ]
        )
    columns = [
        "defense",
        "attack",
        "index",
        "label",
        "clean",
        "attacked",
        "clean right",
        "attacked right",
        "linf",
        "l2",
    ]
    logged = {"samples": wandb.Table(columns=[*columns, *_PANELS], data=rows), "pictures": strips, "masks": overlays}
    return {key: value for key, value in logged.items() if value != []}


def _cut(path: Path) -> list[Image.Image]:
    """The panels of a picture of the gallery."""
    with Image.open(path) as strip:
        return [strip.crop((left, 0, right, strip.height)) for left, right in spans(strip.width, len(_PANELS))]


def _masked(image: Image.Image, path: Path, caption: str) -> wandb.Image:
    """An image with its mask as a layer of its own."""
    with Image.open(path) as mask:
        layer = np.array(mask.convert("L").resize(image.size, Image.Resampling.NEAREST)) > 127
    labels = {0: "weak", 1: "strong"}
    masks = {"strong_noise": {"mask_data": layer.astype(np.uint8), "class_labels": labels}}
    return wandb.Image(image, caption=caption, masks=masks)
