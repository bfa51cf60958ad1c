"""Diagnostics: how much of a robust accuracy is denoising, and how well the denoisers denoise the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_purify.attacks import Attack
from lit_purify.attacks.base import single_draw
from lit_purify.data.base import Batch, ImageDataset
from lit_purify.defense import AttackView, DefendedClassifier
from lit_purify.evaluation.records import Record
from lit_purify.functional.chunks import average, logits_in_chunks
from lit_purify.functional.diffusion import noised, to_diffusion
from lit_purify.functional.noise import EVALUATION, FrozenNoise, KeyedNoise

REPLICAS = (1, 10, 30, 50, 100)
"""Numbers of fresh draws that jointly classify a finished adversarial image."""


def diagnose(
    records: Sequence[Record],
    view: AttackView,
    attack: Attack,
    batch: Batch,
    adversarial: Tensor,
    noise: KeyedNoise,
    chunk: int,
) -> list[Record]:
    """Adds diagnostics to the records of one defense under one attack.

    ``replicas`` holds predictions of fresh draws on the finished adversarial image; ``averaged`` holds the predictions
    of their averaged logits (MEFA, 2026). The attack has seen none of these draws. For ``frozen`` the attack runs once
    more and shares its only draw with the defense, so the attacker knows all noise (DW-box; ADDT, ICLR 2025). Images
    that were not computed on the defense (``Transfer``, ``SavedImages``) stay as they are.

    Args:
        records: The records of the batch, in order.
        view: The defense and its attacked function.
        attack: The attack.
        batch: ``image`` (B, C, H, W) in [0, 1] and ``label`` (B,).
        adversarial: (B, C, H, W) in [0, 1], the result of the attack.
        noise: The noise of the evaluation.
        chunk: Rows of each network call.

    Returns:
        Copies of the records, with ``replicas``, ``averaged`` and ``frozen``.
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
    """The cost of ``diagnose`` for one sample: images classified with one draw, and queries of the attack."""
    queries = single_draw(attack).queries._asdict() if attack.target == "defense" else {"forward": 0, "backward": 0}
    return {"replicas": REPLICAS[-1] + 1, "queries": queries}


@torch.no_grad()
def denoising(
    defenses: Mapping[str, DefendedClassifier], data: ImageDataset, seed: int, samples: int = 16
) -> dict[str, list[float]]:
    """Measures how well the denoisers denoise the evaluated images.

    Args:
        defenses: The defenses by name.
        data: The evaluated samples.
        seed: Seed of the noise.
        samples: Number of samples to noise, from the first.

    Returns:
        For each defense with a denoiser: its strongest level, and the mean squared error of the predicted noise
        relative to predicting zero. A good denoiser is near 0, one that has learned nothing is at 1.
    """
    errors: dict[str, list[float]] = {}
    known: dict[tuple[int, int], float] = {}
    items = [data[k] for k in range(min(samples, len(data)))]
    for name, defended in defenses.items():
        purifier, device = defended.purifier, defended.classifier.mean.device
        image = torch.stack([item["image"] for item in items]).to(device)
        if not purifier.nfe or image.shape[-1] != purifier.denoiser.size:
            continue
        denoiser, level = purifier.denoiser, purifier.levels[0]
        if (id(denoiser), level) not in known:
            index = torch.tensor([item["index"] for item in items], device=device)
            u = to_diffusion(image)
            eps = KeyedNoise(seed, index, torch.zeros_like(index), EVALUATION).normal(0, u)
            t = torch.full((len(u),), level, device=device)
            error = denoiser(noised(u, denoiser.schedule.at(level), eps), t) - eps
            known[id(denoiser), level] = float(error.square().mean() / eps.square().mean())
        errors[name] = [level, known[id(denoiser), level]]
    return errors
