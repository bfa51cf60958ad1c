"""What an evaluation shows in Weights & Biases, with a WandbRun as a logger."""

from __future__ import annotations

import itertools
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
from lit_purify.report.summary import KINDS, RULES


class WandbReport(Callback, EvaluationListener):
    """Logs accuracies, mask overlays that can be toggled, a table of samples, the frontier and costs; rank zero alone.

    The names that it logs under are listed in docs/wandb.md.
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
    rows: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    for result in summary["results"]:
        pair, nfe = {name: result[name] for name in ("defense", "attack")}, result["nfe_defense"]
        # Seconds of all processes: the speed of one.
        speed = summary["samples"] / max(1e-9, result["seconds"])
        costs = {"nfe": result["nfe_attack"], "images_per_second": speed}
        logged |= {f"cost/{'/'.join(pair.values())}/{name}": value for name, value in costs.items()}
        logged[f"cost/{result['defense']}/nfe"] = nfe
        intervals = {
            f"{kind} {rule}{end}": result[kind][rule][k]
            for kind, rule in itertools.product(KINDS, RULES)
            for k, end in enumerate(("", " low", " high"))
        }
        rows.append({**pair, "gradient": result["gradient"], "nfe": nfe, "images per second": speed, **intervals})
        points.append({**pair, **{kind: result[kind]["average"][0] for kind in KINDS}})
    title = "Clean against robust accuracy"
    return {**logged, "results": _table(rows), "frontier": wandb.plot.scatter(_table(points), *KINDS, title=title)}


def _pictures(views: Sequence[View], classes: Sequence[str]) -> dict[str, Any]:
    """Strips, adversarial images with their mask as a layer, and a table of samples."""
    rows: list[dict[str, Any]] = []
    strips, masks = [], []
    for view in views:
        record = view.record
        caption = f"{record.defense}, {record.attack}, sample {record.index}"
        strips.append(wandb.Image(pil(strip(view)), caption=caption))
        masked = None
        if view.mask is not None:
            layer = (enlarged(view.mask)[0] > 0.5).numpy().astype("uint8")
            strong = {"strong_noise": {"mask_data": layer, "class_labels": {0: "weak", 1: "strong"}}}
            masked = wandb.Image(pil(enlarged(view.adversarial)), caption=caption, masks=strong)
            masks.append(masked)
        row = {name: getattr(record, name) for name in ("defense", "attack", "index", "linf", "l2")}
        for name, predictions in (("clean", record.clean), ("attacked", record.adversarial)):
            row[name] = ", ".join(classes[p] for p in predictions)
            row[f"{name} right"] = sum(p == record.label for p in predictions) / len(predictions)
        images = {name: wandb.Image(pil(enlarged(getattr(view, name)))) for name in PANELS}
        rows.append({**row, "label": classes[record.label], **images, "mask": masked})
    return {name: found for name, found in (("pictures", strips), ("masks", masks)) if found} | (
        {"samples": _table(rows)} if rows else {}
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:  # noqa: ANN401
    return wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
