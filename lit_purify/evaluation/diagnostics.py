"""What a robust accuracy is made of: denoising, which stays when the noise is known, and dice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_purify.attacks import Attack
from lit_purify.attacks.base import single_draw
from lit_purify.data.base import Batch
from lit_purify.defense import Attacked
from lit_purify.evaluation.records import Record
from lit_purify.functional.chunks import average, logits_in_chunks
from lit_purify.functional.noise import EVALUATION, FrozenNoise, KeyedNoise

REPLICAS = (1, 10, 30, 50, 100)
"""Numbers of fresh draws that classify a finished adversarial image together."""


def diagnose(
    records: Sequence[Record],
    view: Attacked,
    attack: Attack,
    batch: Batch,
    adversarial: Tensor,
    noise: KeyedNoise,
    chunk: int,
) -> list[Record]:
    """The records of one defense under one attack, with two more looks at each sample.

    ``replicas`` are the predictions of draws after the recorded runs, and ``averaged`` those of their averaged logits
    (MEFA, 2026), both on the finished adversarial image, which has not seen them. ``frozen`` is the prediction where
    attack and defense share a single draw, so that the attacker knows all noise (DW-box; ADDT, ICLR 2025): the attack
    runs once more, in its version with one draw a step. An attack on the bare classifier knows no noise, and keeps its
    image.

    Args:
        records: Of the samples of the batch, in order.
        view: The defense, and what the attack is handed.
        attack: The attack.
        batch: ``image`` (B, C, H, W) in [0, 1] and ``label`` (B,).
        adversarial: What the attack has made of the images.
        noise: Of the evaluation.
        chunk: Rows that networks are called with.
    """
    function, first = view.defended.attacked(), len(records[0].clean)
    logits = logits_in_chunks(function, adversarial, noise, list(range(first, first + REPLICAS[-1])), chunk)
    averaged = torch.stack([average(logits[:, :count]).argmax(dim=1) for count in REPLICAS], dim=1)
    frozen = FrozenNoise(noise.seed, noise.index, noise.run, EVALUATION)
    if attack.target == "defense":
        adversarial = single_draw(attack)(view, batch["image"], batch["label"], frozen, chunk)
    known = logits_in_chunks(function, adversarial, frozen, [0], chunk)[:, 0].argmax(dim=1)
    rows = zip(records, logits.argmax(dim=2).tolist(), averaged.tolist(), known.tolist(), strict=True)
    return [replace(record, replicas=r, averaged=a, frozen=f) for record, r, a, f in rows]


def cost(attack: Attack) -> dict[str, Any]:
    """What ``diagnose`` adds to a result's description: images classified by one draw, and queries of the attack."""
    queries = single_draw(attack).queries._asdict() if attack.target == "defense" else {"forward": 0, "backward": 0}
    return {"replicas": REPLICAS[-1] + 1, "queries": queries}
