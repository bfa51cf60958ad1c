"""Is the robust accuracy of an evaluation to be believed?"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from lit_purify.attacks import Attack
from lit_purify.checks.audit_checks import LEVEL, TOLERANCE, Audit
from lit_purify.checks.findings import Findings, least_samples
from lit_purify.data.base import ImageDataset
from lit_purify.defense import Attacked
from lit_purify.errors import InputError


def audit_attack(
    views: Mapping[str, Attacked],
    attack: Attack,
    data: ImageDataset,
    samples: int = 32,
    runs: int = 8,
    proposals: int = 100,
    seed: int = 0,
    chunk: int = 64,
    device: torch.device | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Findings:
    """Checks for each defense whether its robust accuracy under an attack holds up against other attacks.

    The verdict is undecided, and not passed, where no check fails, but an attack that takes half of the samples would
    not be significant on so few.

    Args:
        views: What the attack differentiates, by the defense's name.
        attack: The configured attack; it follows a gradient of the defense.
        data: The evaluated samples.
        samples: How many of them, from the first.
        runs: N, with which each image is evaluated.
        proposals: Steps of the black-box attack.
        seed: Seed of all noise.
        chunk: Rows that networks are called with, at most.
        device: Where the networks are; ``None`` is the CPU.
        say: Is handed a line for each finding as soon as it is known.

    Raises:
        InputError: An argument is below 1, or the attack follows no gradient of the defense.
    """
    for option, value in (("samples", samples), ("runs", runs), ("proposals", proposals)):
        if value < 1:
            raise InputError(f"{option} = {value}: use at least 1")
    if (attack.gradient, attack.target) != ("exact", "defense"):
        raise InputError(f"attacks: {type(attack).__name__} follows no gradient of the defense: audit PGD, for example")
    chosen = [data[k] for k in range(min(samples, len(data)))]
    image = torch.stack([row["image"] for row in chosen]).to(device)
    label, index = (torch.tensor([row[key] for row in chosen], device=device) for key in ("label", "index"))
    rows = min(chunk, max(16, len(chosen) * attack.eot))
    findings, compared = Findings(), 0
    for name, view in views.items():
        audit = Audit(view.defended, view, attack, image, label, index, seed, runs, rows, proposals)
        found = []
        for finding in audit.rows(name):
            found.append(finding)
            say(str(finding))
        compared = max(compared, sum(finding.limit == TOLERANCE for finding in found))
        findings += found
    least = least_samples(compared, LEVEL)
    if len(chosen) < least:
        # Only gross overstatement by some comparisons can show, and none by too few samples.
        few = f"{len(chosen)} samples are too few to find even an attack that takes half of them"
        findings.undecided = f"{few}: use {least} or more (samples)"
    findings.facts = {
        "samples": index.tolist(),
        "runs": runs,
        "proposals": proposals,
        "level": LEVEL,
        "tolerance": TOLERANCE,
    }
    return findings
