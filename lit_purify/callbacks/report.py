"""summary.json, report.html and the printed table, from the records of all processes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lit_purify import __version__
from lit_purify.errors import InputError
from lit_purify.evaluation import FrontierTask, RobustnessTask
from lit_purify.evaluation.folder import RunFolder
from lit_purify.evaluation.records import uncollected, write_whole
from lit_purify.report import frontier
from lit_purify.report.html import write_report
from lit_purify.report.summary import RULES, summarize, table


class Report(Callback):
    """Turns records into what people read, when every sample is there."""

    text = ""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Says what is left out."""
        if isinstance(pl_module, FrontierTask) and pl_module.refused and trainer.is_global_zero:
            name, reason = next(iter(pl_module.refused.items()))
            print(f"{len(pl_module.refused)} combinations left out, which their purifier refuses; {name}: {reason}")

    @uncollected()
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rank zero writes, once all processes are done."""
        trainer.strategy.barrier("report")
        if not trainer.is_global_zero or not isinstance(pl_module, RobustnessTask):
            return
        folder = RunFolder(Path(trainer.default_root_dir))
        records = folder.collect(write=True)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        evaluated = data.evaluated
        wanted = {(*pair, int(i)) for pair in pl_module.pairs for i in evaluated.positions}
        missing = sorted(wanted - {record.key for record in records})
        if missing:
            raise InputError(
                f"{folder.records}: {len(missing)} of {len(wanted)} records are missing (first {missing[0]}); "
                "run the same command again to go on"
            )
        facts = {
            "dataset": data.name,
            "split": data.evaluate_on,
            "classes": list(data.classes),
            "samples": len(evaluated),
            "subset_sha256": data.subset_sha256,
            "seed": pl_module.seed,
            "runs": pl_module.runs,
            "chunk": pl_module.chunk,
            "classifier": pl_module.classifier.title,
            "denoiser": pl_module.denoiser.title,
            "versions": {"lit_purify": __version__, "torch": torch.__version__, "lightning": L.__version__},
            "files": folder.hashes(),
        }
        used = [record for record in records if record.key in wanted]
        facts["smaller_chunks"] = dict(Counter(record.chunk for record in used if record.chunk is not None))
        summary = summarize(used, pl_module.describe(), facts, pl_module.baseline)
        write_whole(folder.summary, json.dumps(summary, indent=1) + "\n")
        combined = {
            f"robust/{result['defense']}/{result['attack']}/{rule}": result["robust"][rule][0]
            for result in summary["results"]
            for rule in RULES
            if "attacks" in result
        }
        if combined:
            # Those of single attacks are logged by the task.
            for logger in trainer.loggers:
                logger.log_metrics(combined)
        text = table(summary)
        if isinstance(pl_module, FrontierTask):
            found = frontier.compare(used, summary, pl_module.families, pl_module.refused)
            text = frontier.write(found, summary, folder.path)
        write_report(folder)
        self.text = f"{text}\nReport: {folder.report}"

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Prints, after whatever the loggers print."""
        if self.text:
            print(self.text)
            self.text = ""
