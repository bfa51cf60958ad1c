"""Is the gradient that attacks follow the gradient of the defense?"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

from lit_purify.data import ImageDataModule
from lit_purify.defense import DefendedClassifier
from lit_purify.defense.masks import Given
from lit_purify.errors import InputError
from lit_purify.evaluation.module import RobustnessTask
from lit_purify.evaluation.records import identity_sha256, write_whole
from lit_purify.functional.chunks import LogitsFunction
from lit_purify.functional.levels import LevelMap
from lit_purify.functional.losses import margin_loss
from lit_purify.functional.noise import ATTACK, START_STEP, KeyedNoise
from lit_purify.functional.threat import linf_norm
from lit_purify.models import Denoiser

RECOMPUTED_LIMIT, FINITE_LIMIT, ZERO_LIMIT = 1e-5, 1e-4, 0.9
"""Largest relative differences, and largest part of zeros."""
_STEPS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
"""Of finite differences, in pixels of [0, 1]."""
_DIRECTIONS, _DRAWS = 2, 4
_MOVED = 0.02
"""How far images are moved at random, in pixels of [0, 1]; 0.02 from the border before that."""


@dataclass(frozen=True)
class Finding:
    """What one check of one defense found.

    Attributes:
        defense: Its name.
        check: ``recomputed``, ``finite_differences``, ``replayed``, ``nonzero`` or ``zero_share``.
        figure: What was measured.
        limit: What it may be.
        detail: What that means, in words.
    """

    defense: str
    check: str
    figure: float
    limit: float
    detail: str

    @property
    def passed(self) -> bool:
        """The verdict; a figure that is not a number has failed."""
        return self.figure <= self.limit

    def json(self) -> dict[str, Any]:
        """For ``gradcheck.json``, where a figure that is not finite is ``null``."""
        figure = self.figure if -torch.inf < self.figure < torch.inf else None
        return {**asdict(self), "figure": figure, "passed": self.passed}


@dataclass(frozen=True)
class Samples:
    """What is differentiated: the margin loss of some samples, under the attack's first draw of noise.

    Attributes:
        image: (B, C, H, W) in [0, 1].
        label: (B,).
        noise: Of the same rows.
    """

    image: Tensor
    label: Tensor
    noise: KeyedNoise

    @classmethod
    def moved(cls, image: Tensor, label: Tensor, noise: KeyedNoise) -> Samples:
        """Samples moved at random, off even backgrounds: there a network can stand in the very kink of a ReLU."""
        image = image.clamp(_MOVED, 1.0 - _MOVED)
        return cls(image + _MOVED * (2.0 * noise.uniform(START_STEP, image) - 1.0), label, noise)

    def double(self) -> Samples:
        """In float64."""
        return Samples(self.image.double(), self.label, self.noise)

    def loss(self, model: LogitsFunction, shift: Tensor | float = 0.0) -> Tensor:
        """Loss of each sample, (B,), with the images moved."""
        return margin_loss(model(self.image + shift, self.noise), self.label)

    def gradient(self, model: LogitsFunction) -> Tensor:
        """Of each sample's loss in its image, (B, C, H, W); zero where nothing connects the two."""
        with torch.enable_grad():
            shift = torch.zeros_like(self.image, requires_grad=True)
            total = self.loss(model, shift).sum()
            found = torch.autograd.grad(total, shift, allow_unused=True)[0] if total.requires_grad else None
        return torch.zeros_like(shift) if found is None else found


def check_gradient(name: str, model: DefendedClassifier, samples: Samples) -> list[Finding]:
    """All checks of one defense.

    ``recomputed``: the gradient by recomputation against that of plain autograd. ``finite_differences``: in float64,
    directional derivatives along random directions against central differences, the best of several step sizes; masks
    are piecewise constant, so each is frozen at its value for the unmoved image. ``replayed``: with the same keys two
    forward passes have the same bits, and so has every call of the denoiser that the backward pass repeats.
    ``nonzero``: the gradient is finite, and no sample's is zero everywhere. ``zero_share``: the part of the pixels
    whose gradient is exactly zero in several draws, which is small unless something saturates or quantizes.
    """
    return [
        _recomputed(name, model, samples),
        _finite_differences(name, model, samples),
        _replayed(name, model, samples),
        *_zeros(name, model, samples),
    ]


def _recomputed(name: str, model: DefendedClassifier, samples: Samples) -> Finding:
    plain = DefendedClassifier(model.purifier.without_recomputation(), model.classifier)
    first, second = samples.gradient(model), samples.gradient(plain)
    # Zero against zero is equal, which is for another check to judge.
    size = float(second.abs().max()) or 1.0
    figure = float((first - second).abs().max()) / size
    return Finding(name, "recomputed", figure, RECOMPUTED_LIMIT, "relative difference to plain autograd")


def _finite_differences(name: str, model: DefendedClassifier, samples: Samples) -> Finding:
    model, samples = copy.deepcopy(model).double(), samples.double()
    purifier, frozen = model.purifier, ""
    if purifier.mask is not None:
        mask = purifier.mask(model.classifier, samples.image, samples.noise).detach()
        given = purifier.with_mask(Given(mask, purifier.mask.grades))
        model, frozen = DefendedClassifier(given, model.classifier), ", mask frozen"
    gradient = samples.gradient(model)
    best = []
    for k in range(_DIRECTIONS):
        direction = samples.noise.runs([k]).normal(START_STEP, samples.image)
        derivative = (gradient * direction).flatten(1).sum(dim=1)
        best.append(torch.stack([_error(model, samples, direction, step, derivative) for step in _STEPS]).amin(dim=0))
    detail = f"relative error of directional derivatives, float64, best step{frozen}"
    return Finding(name, "finite_differences", float(torch.stack(best).max()), FINITE_LIMIT, detail)


def _error(model: DefendedClassifier, samples: Samples, direction: Tensor, step: float, derivative: Tensor) -> Tensor:
    with torch.no_grad():
        high, low = (samples.loss(model, sign * step * direction) for sign in (1.0, -1.0))
    difference = (high - low) / (2.0 * step)
    size = torch.maximum(difference.abs(), derivative.abs())
    return torch.where(size > 0, (difference - derivative).abs() / torch.where(size > 0, size, 1.0), 0.0)


def _replayed(name: str, model: DefendedClassifier, samples: Samples) -> Finding:
    with torch.no_grad():
        first, second = samples.loss(model), samples.loss(model)
    different = int((first != second).sum())
    with _calls(model.purifier.denoiser) as calls, torch.enable_grad(), set_checkpoint_early_stop(False):
        shift = torch.zeros_like(samples.image, requires_grad=True)
        total = samples.loss(model, shift).sum()
        forward = len(calls)
        if total.requires_grad:
            torch.autograd.grad(total, shift, allow_unused=True)
    seen, repeated = calls[:forward], calls[forward:]
    strange = sum(not any(_equal(call, other) for other in seen) for call in repeated)
    detail = f"of {len(first)} outputs or {len(repeated)} calls repeated in the backward pass differ"
    return Finding(name, "replayed", float(different + strange), 0.0, detail)


@contextmanager
def _calls(denoiser: Denoiser) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Inputs and output of every call."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(module: Denoiser, inputs: tuple[Tensor, Tensor | LevelMap], output: Tensor) -> None:
        x, t = inputs
        calls.append((x.detach().clone(), t.dense if isinstance(t, LevelMap) else t.clone(), output.detach().clone()))

    handle = denoiser.register_forward_hook(keep)
    try:
        yield calls
    finally:
        handle.remove()


def _equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def _zeros(name: str, model: DefendedClassifier, samples: Samples) -> list[Finding]:
    gradient = samples.gradient(model)
    useless = ~(linf_norm(gradient) > 0) | ~gradient.isfinite().flatten(1).all(dim=1)
    # A sound defense may leave out most pixels in one draw.
    draws = [replace(samples, noise=samples.noise.runs([k])).gradient(model) == 0 for k in range(_DRAWS)]
    share = float(torch.stack(draws).all(dim=0).double().mean())
    detail = f"of {len(gradient)} samples have a gradient of 0 everywhere, or one that is not finite"
    return [
        Finding(name, "nonzero", float(useless.sum()), 0.0, detail),
        Finding(
            name, "zero_share", share, ZERO_LIMIT, f"of all pixels' gradients are exactly 0 in each of {_DRAWS} draws"
        ),
    ]


class CheckingTrainer(L.Trainer):
    """A trainer that can also check the gradients of an evaluation's defenses."""

    settings: Mapping[str, Any] = {}
    """What identifies the evaluation: its sha256 stands in ``gradcheck.json``, so that a stale one can be told."""
    passed: bool = False

    def gradcheck(self, model: L.LightningModule, datamodule: L.LightningDataModule, samples: int = 4) -> None:
        """Checks at a few evaluated samples, moved a little, that attacks differentiate what is defended.

        Prints a line for each check and a verdict; ``gradcheck.json`` in the run's folder holds the same.

        Args:
            model: An evaluation.
            datamodule: Its data.
            samples: How many of the evaluated samples, from the first.
        """
        assert isinstance(model, RobustnessTask)
        assert isinstance(datamodule, ImageDataModule)
        if samples < 1:
            raise InputError(f"samples = {samples}: use at least 1")
        datamodule.prepare_data()
        model.check(datamodule)
        findings: list[Finding] = []
        device = self.strategy.root_device
        model.to(device).eval()
        evaluated = datamodule.evaluated
        rows = [evaluated[k] for k in range(min(samples, len(evaluated)))]
        index = torch.tensor([row["index"] for row in rows], device=device)
        noise = KeyedNoise(model.seed, index, torch.zeros_like(index), ATTACK)
        image = torch.stack([row["image"] for row in rows]).to(device)
        chosen = Samples.moved(image, torch.tensor([row["label"] for row in rows], device=device), noise)
        print(f"Gradients of {len(rows)} samples of {datamodule.name} ({datamodule.evaluate_on})")
        for name, defense in model.defenses.items():
            assert isinstance(defense, DefendedClassifier)
            with self.precision_plugin.forward_context():
                found = check_gradient(name, defense, chosen)
            for finding in found:
                verdict = "passed" if finding.passed else "FAILED"
                print(f"{verdict}  {name:14}  {finding.check:18}  {finding.figure:8.2g}  {finding.detail}", flush=True)
            findings += found
        good = sum(finding.passed for finding in findings)
        self.passed = good == len(findings)
        if self.is_global_zero:
            content = {
                "schema": 1,
                "passed": self.passed,
                "dataset": datamodule.name,
                "split": datamodule.evaluate_on,
                "samples": index.tolist(),
                "settings_sha256": identity_sha256(self.settings),
                "checks": [finding.json() for finding in findings],
            }
            folder = Path(self.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "gradcheck.json", json.dumps(content, indent=1) + "\n")
        print(f"gradcheck: {'passed' if self.passed else 'FAILED'}, {good} of {len(findings)} checks")
