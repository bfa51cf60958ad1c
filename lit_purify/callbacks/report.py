"""summary.json, report.html and the printed table, from the records of all processes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lit_purify.errors import InputError
from lit_purify.evaluation import RobustnessTask
from lit_purify.evaluation.folder import RunFolder, file_hashes
from lit_purify.evaluation.records import uncollected, write_whole
from lit_purify.report.html import write_report
from lit_purify.report.summary import summarize, table


class Report(Callback):
    """Turns records into what people read, when every sample is there."""

    text = ""

    @uncollected()
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rank zero writes, once all processes are done."""
        trainer.strategy.barrier("report")
        if not trainer.is_global_zero or not isinstance(pl_module, RobustnessTask):
            return
        folder, evaluator = RunFolder(Path(trainer.default_root_dir)), pl_module.evaluator
        records = folder.collect(write=True)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        wanted = {(*pair, int(i)) for pair in evaluator.pairs for i in data.evaluated.positions}
        missing = sorted(wanted - {record.key for record in records})
        if missing:
            raise InputError(
                f"{folder.records}: {len(missing)} of {len(wanted)} records are missing (first {missing[0]}); "
                "run the same command again to go on"
            )
        used = [record for record in records if record.key in wanted]
        facts = evaluator.facts(data.evaluated, data.name, data.evaluate_on)
        facts["files"] = file_hashes(json.loads(folder.identity.read_text()))
        facts["smaller_chunks"] = dict(Counter(record.chunk for record in used if record.chunk is not None))
        summary = summarize(used, evaluator.describe(), facts, evaluator.baseline)
        write_whole(folder.summary, json.dumps(summary, indent=1) + "\n")
        write_report(folder)
        self.text = f"{table(summary)}\nReport: {folder.report}"

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Prints, after whatever the loggers print."""
        if self.text:
            print(self.text)
            self.text = ""
