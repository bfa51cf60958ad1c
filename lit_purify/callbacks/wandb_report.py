"""Logs an evaluation to Weights & Biases, with a WandbRun as the logger."""

from __future__ import annotations

import itertools
import json
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
from lit_purify.report.diagnostics import WAYS
from lit_purify.report.pictures import pil
from lit_purify.report.rows import changed, changes
from lit_purify.report.summary import KINDS, RULES

_KIND = ("samples", "clean", "robust")


class WandbReport(Callback, EvaluationListener):
    """Logs accuracies, mask layers, a table of samples and costs on rank 0; docs/wandb.md lists the names."""

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs settings and facts, and declares the running metrics."""
        logger = wandb_run(trainer)
        if logger is None or not isinstance(pl_module, RobustnessTask):
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        evaluator, run = pl_module.evaluator, logger.experiment
        facts = {"subset_sha256": data.subset_sha256, "samples": len(data.evaluated)}
        facts["nfe"] = {result["defense"]: result["nfe_defense"] for result in evaluator.describe()}
        log_settings(logger, RunFolder(Path(trainer.default_root_dir)), facts)
        run.define_metric("running/samples", hidden=True)
        clean = [f"clean/{defense}" for defense in evaluator.defenses]
        for name in (*clean, *("robust/" + "/".join(pair) for pair in evaluator.pairs)):
            run.define_metric(f"running/{name}", step_metric="running/samples")

    def on_evaluated(
        self, trainer: L.Trainer, task: RobustnessTask, records: Sequence[Record], views: Sequence[View]
    ) -> None:
        """Logs running accuracies of one (defense, attack) over the samples of rank 0."""
        logger = wandb_run(trainer)
        if logger is None:
            return
        defense, attack = records[0].defense, records[0].attack
        found = {f"robust/{defense}/{attack}": task.running(defense, attack), f"clean/{defense}": task.running(defense)}
        running = {f"running/{name}": value for name, value in {**found, "samples": len(task.ledger.done)}.items()}
        logger.log_metrics({**running, "cost/peak_memory_gib": peak_memory(task.device) / 2**30})

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs figures and pictures from the run folder, which holds the results of all ranks."""
        logger, folder = wandb_run(trainer), RunFolder(Path(trainer.default_root_dir))
        if logger is None:
            return
        if folder.summary.exists():
            logger.log_media(_figures(json.loads(folder.summary.read_text())))
        views = list(pictures.read(folder.overlays, folder.collect(write=False)))
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        domain = data.evaluated.domain
        logger.log_media(_pictures(views, data.classes, [] if domain is None else domain.stated()))


def _figures(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Costs, the table of results, and a plot of clean against robust accuracy."""
    logged: dict[str, Any] = {}
    rows, points, replicas, fresh, kinds = [], [], [], [], []
    for result in summary["results"]:
        pair, nfe = {name: result[name] for name in ("defense", "attack")}, result["nfe_defense"]
        # Seconds are summed over processes, so this is the speed of one process.
        speed, place = summary["samples"] / max(1e-9, result["seconds"]), "cost/" + "/".join(pair.values())
        logged |= {f"{place}/nfe": result["nfe_attack"], f"{place}/images_per_second": speed}
        logged[f"cost/{result['defense']}/nfe"] = nfe
        row = {**pair, "gradient": result["gradient"], "nfe": nfe, "images per second": speed}
        for kind, rule in itertools.product(KINDS, RULES):
            ends = zip(("", " low", " high"), result[kind][rule], strict=True)
            row |= {f"{kind} {rule}{end}": value for end, value in ends}
        for name in ("detection", "false_alarms"):
            logged |= {f"{name}/{'/'.join(pair.values())}": result[name]["robust"][0]} if name in result else {}
        kinds += [
            {**pair, "kind": k, **dict(zip(_KIND, each, strict=True))} for k, each in result.get("kinds", {}).items()
        ]
        rows.append(row)
        points.append({**pair, **{kind: result[kind]["average"][0] for kind in KINDS}})
        for rows_of in zip(*(result["replicas"][way] for way in WAYS), strict=True) if "frozen" in result else ():
            shares = {way: row[1] for way, row in zip(WAYS, rows_of, strict=True)}
            replicas.append({"result": "/".join(pair.values()), "replicas": rows_of[0][0], **shares})
        if "frozen" in result:
            logged[f"robust/{'/'.join(pair.values())}/frozen"] = result["frozen"][0]
            fresh.append({**pair, "frozen": result["frozen"][0], "fresh": result["robust"]["average"][0]})
    if replicas:
        title = "Robust accuracy over fresh replicas, averaged logits"
        logged["replicas"] = wandb.plot.line(_table(replicas), "replicas", "averaged", stroke="result", title=title)
        title = "Robust accuracy under frozen and fresh noise"
        logged["frozen"] = wandb.plot.scatter(_table(fresh), "frozen", "fresh", title=title)
    logged |= {"kinds": _table(kinds)} if kinds else {}
    title = "Clean against robust accuracy"
    return {**logged, "results": _table(rows), "frontier": wandb.plot.scatter(_table(points), *KINDS, title=title)}


def _pictures(views: Sequence[View], classes: Sequence[str], features: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Adversarial images with mask layers and a table of samples; for table rows, the changed columns."""
    masks, rows = [], []
    if features and views:
        samples = [{**_sample_row(view, classes), "changes": changes(view, features)} for view in views]
        return {"samples": _table(samples), "columns": _table(changed(views, features))}
    for view in views:
        record, masked = view.record, None
        caption = f"{record.defense}, {record.attack}, sample {record.index}"
        if view.mask is not None:
            layer = (enlarged(view.mask)[0] > 0.5).numpy().astype("uint8")
            strong = {"strong_noise": {"mask_data": layer, "class_labels": {0: "weak", 1: "strong"}}}
            masked = wandb.Image(pil(enlarged(view.adversarial)), caption=caption, masks=strong)
            masks.append(masked)
        images = {name: wandb.Image(pil(enlarged(getattr(view, name)))) for name in PANELS}
        rows.append({**_sample_row(view, classes), **images, "mask": masked})
    return ({"masks": masks} if masks else {}) | ({"samples": _table(rows)} if rows else {})


def _sample_row(view: View, classes: Sequence[str]) -> dict[str, Any]:
    """The cells of one sample in the table of samples."""
    record = view.record
    row = {name: getattr(record, name) for name in ("defense", "attack", "index", "linf", "l2")}
    for name, predictions in (("clean", record.clean), ("attacked", record.adversarial)):
        row[name] = ", ".join(classes[p] for p in predictions)
        row[f"{name} right"] = sum(p == record.label for p in predictions) / len(predictions)
    return {**row, "label": classes[record.label]}


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:  # noqa: ANN401
    return wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
