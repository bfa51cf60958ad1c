"""What an evaluation shows in Weights & Biases, with a WandbRun as a logger."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import wandb
from lightning.pytorch.callbacks import Callback

from lit_purify.callbacks.wandb_run import log_settings, wandb_run
from lit_purify.evaluation import EvaluationListener, Record, RobustnessTask, View
from lit_purify.evaluation.estimate import peak_memory
from lit_purify.evaluation.folder import RunFolder
from lit_purify.functional.rendering import PANELS, enlarged
from lit_purify.report import pictures
from lit_purify.report.pictures import pil, strip
from lit_purify.report.summary import RULES

_LABELS = {0: "weak", 1: "strong"}


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
            "nfe": {result["defense"]: result["nfe_defense"] for result in pl_module.evaluator.describe()},
        }
        log_settings(logger, RunFolder(Path(trainer.default_root_dir)), facts)
        run = logger.experiment
        run.define_metric("running/samples", hidden=True)
        names = [f"robust/{defense}/{attack}" for defense, attack in pl_module.evaluator.pairs]
        for name in (*names, *(f"clean/{defense}" for defense in pl_module.evaluator.defenses), "images_per_second"):
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
                "running/samples": len(task.ledger.done),
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
        if folder.summary.exists():
            logger.log_media(_figures(json.loads(folder.summary.read_text())))
        views = list(pictures.read(folder.overlays, folder.collect(write=False)))
        logger.log_media(_pictures(views, trainer.datamodule.classes))  # type: ignore[attr-defined]
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


def _pictures(views: Sequence[View], classes: Sequence[str]) -> dict[str, Any]:
    """Strips, adversarial images with their mask as a layer, and a table of samples."""
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
    table = wandb.Table(columns=[*columns, *PANELS, "mask"])
    strips, masks = [], []
    for view in views:
        record = view.record
        caption = f"{record.defense}, {record.attack}, sample {record.index}"
        strips.append(wandb.Image(pil(strip(view)), caption=caption))
        masked = None
        if view.mask is not None:
            layer = {"mask_data": (enlarged(view.mask)[0] > 0.5).numpy().astype("uint8"), "class_labels": _LABELS}
            masked = wandb.Image(pil(enlarged(view.adversarial)), caption=caption, masks={"strong_noise": layer})
            masks.append(masked)
        both = (record.clean, record.adversarial)
        table.add_data(
            *(record.defense, record.attack, record.index, classes[record.label]),
            *(", ".join(classes[p] for p in predictions) for predictions in both),
            *(sum(p == record.label for p in predictions) / len(predictions) for predictions in both),
            *(record.linf, record.l2),
            *(wandb.Image(pil(enlarged(getattr(view, name)))) for name in PANELS),
            masked,
        )
    return {"samples": table, "pictures": strips} | ({"masks": masks} if masks else {}) if views else {}
