"""Is the robust accuracy of an evaluation to be believed?"""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import torch

from lit_purify.checks.audit_checks import LEVEL, TOLERANCE, Audit
from lit_purify.checks.gradcheck import CheckingTrainer
from lit_purify.checks.judging import Row, least_samples
from lit_purify.data import ImageDataModule
from lit_purify.defense import DefendedClassifier
from lit_purify.errors import InputError
from lit_purify.evaluation.module import RobustnessTask
from lit_purify.evaluation.records import identity_sha256, write_whole


class AuditingTrainer(CheckingTrainer):
    """A trainer that can also audit the robust accuracy of an evaluation's defenses."""

    def audit(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule,
        samples: int = 32,
        runs: int = 8,
        proposals: int = 100,
    ) -> None:
        """Asks of each defense whether its robust accuracy under the first attack that follows a gradient holds up.

        Prints a line for each check and a verdict; ``audit.json`` in the run's folder holds the same. The verdict is
        undecided, and not passed, where no check fails, but an attack that takes half of the samples would not be
        significant on so few.

        Args:
            model: An evaluation.
            datamodule: Its data.
            samples: How many of the evaluated samples, from the first.
            runs: N, with which each image is evaluated.
            proposals: Steps of the black-box attack.
        """
        assert isinstance(model, RobustnessTask)
        assert isinstance(datamodule, ImageDataModule)
        for option, value in (("samples", samples), ("runs", runs), ("proposals", proposals)):
            if value < 1:
                raise InputError(f"{option} = {value}: use at least 1")
        usable = [n for n, a in model.attacks.items() if (a.gradient, a.target) == ("exact", "defense")]
        if not usable:
            raise InputError(
                f"attacks: none of {', '.join(model.attacks)} follows a gradient of the defense: add one, such as PGD"
            )
        name, attack = usable[0], model.attacks[usable[0]]
        datamodule.prepare_data()
        model.check(datamodule)
        device = self.strategy.root_device
        model.to(device).eval()
        evaluated = datamodule.evaluated
        chosen = [evaluated[k] for k in range(min(samples, len(evaluated)))]
        image = torch.stack([row["image"] for row in chosen]).to(device)
        label, index = (torch.tensor([row[key] for row in chosen], device=device) for key in ("label", "index"))
        chunk = min(model.chunk, max(16, len(chosen) * attack.eot))
        print(f"Audit of {name} ({attack.title}, eps {attack.eps:.4g}) on {len(chosen)} samples of {datamodule.name}")
        rows: list[Row] = []
        for defense, defended in model.defenses.items():
            assert isinstance(defended, DefendedClassifier)
            view = model.views[defense, name]
            with self.precision_plugin.forward_context():
                audit = Audit(defended, view, attack, image, label, index, model.seed, runs, chunk, proposals)
                for row in audit.rows(defense):
                    rows.append(row)
                    limit = "" if row.limit is None else f"{row.limit:.2g}"
                    shown = "FAIL" if row.verdict == "fail" else row.verdict
                    said = f"{shown}  {defense:14}  {row.check:18}  {row.figure:8.2g}  {limit:6}  {row.reason}"
                    print(said, flush=True)
        failed = [row for row in rows if row.verdict == "fail"]
        compared = max(sum(row.limit == TOLERANCE for row in rows if row.defense == each) for each in model.defenses)
        least = least_samples(compared, LEVEL)
        # Only gross overstatement by some comparisons can show, and none by too few samples.
        undecided = not failed and len(chosen) < least
        self.passed = not failed and not undecided
        if self.is_global_zero:
            content = {
                "schema": 1,
                "passed": self.passed,
                "undecided": undecided,
                "attack": name,
                "dataset": datamodule.name,
                "split": datamodule.evaluate_on,
                "samples": index.tolist(),
                "runs": runs,
                "proposals": proposals,
                "level": LEVEL,
                "tolerance": TOLERANCE,
                "settings_sha256": identity_sha256(self.settings),
                "checks": [row.json() for row in rows],
            }
            folder = Path(self.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "audit.json", json.dumps(content, indent=1) + "\n")
        blamed = ", ".join(dict.fromkeys(f"{row.defense} ({row.check})" for row in failed))
        if undecided:
            few = f"{len(chosen)} samples are too few to find even an attack that takes half of them"
            print(f"audit: UNDECIDED: {few}: use --samples {least} or more")
        else:
            print(f"audit: {'passed' if self.passed else 'FAILED: not to be believed: ' + blamed}")
