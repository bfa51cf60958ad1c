"""Is the gradient that attacks follow the gradient of the defense?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from lit_purify.checks.findings import Finding, Findings
from lit_purify.data.base import ImageDataset
from lit_purify.defense import DefendedClassifier, ForeignDefense
from lit_purify.errors import InputError
from lit_purify.functional.chunks import AttackedFunction
from lit_purify.functional.levels import LevelMap
from lit_purify.functional.losses import margin_loss
from lit_purify.functional.noise import ATTACK, START_STEP, KeyedNoise
from lit_purify.functional.threat import linf_norm
from lit_purify.models import Denoiser

RECOMPUTED_LIMIT, FINITE_LIMIT, ZERO_LIMIT = 1e-5, 1e-4, 0.9
"""Largest relative differences, and largest part of zeros."""
_STEPS = (1e-4, 1e-6, 1e-7, 1e-8)
"""Of finite differences, in pixels of [0, 1]."""
_DIRECTIONS, _DRAWS = 5, 4
_MOVED = 0.02
"""How far images are moved at random, in pixels of [0, 1]; 0.02 from the border before that."""


Function = AttackedFunction | DefendedClassifier


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

    def loss(self, model: Function, shift: Tensor | float = 0.0) -> Tensor:
        """Loss of each sample, (B,), with the images moved."""
        return margin_loss(model(self.image + shift, self.noise), self.label)

    def gradient(self, model: Function) -> Tensor:
        """Of each sample's loss in its image, (B, C, H, W); zero where nothing connects the two."""
        with torch.enable_grad():
            shift = torch.zeros_like(self.image, requires_grad=True)
            total = self.loss(model, shift).sum()
            found = torch.autograd.grad(total, shift, allow_unused=True)[0] if total.requires_grad else None
        return torch.zeros_like(shift) if found is None else found


def check_gradient(name: str, model: DefendedClassifier, samples: Samples) -> list[Finding]:
    """All checks of one defense.

    ``recomputed``: the gradient by recomputation against that of plain autograd. ``finite_differences``: in float64,
    directional derivatives along random directions against central differences, the best of several step sizes. Most
    directions of every sample must agree: a kink of a ReLU network lies across single directions, a wrong gradient
    across all. Masks are piecewise constant, so each is frozen at its value for the unmoved image. ``replayed``: with
    the same keys two forward passes have the same bits, and so has every call of the denoiser that the backward pass
    repeats. ``nonzero``: the gradient is finite, and no sample's is zero everywhere. ``zero_share``: the part of the
    pixels whose gradient is exactly zero in several draws, which is small unless something saturates or quantizes.
    """
    checks: list[Callable[[DefendedClassifier, Samples], tuple[str, float, float, str]]] = [
        _recomputed,
        _finite_differences,
        _replayed,
        _nonzero,
        _zero_share,
    ]
    found = []
    for check in checks:
        title, figure, limit, detail = check(model, samples)
        # A figure that is not a number has failed.
        found.append(Finding(name, title, figure, limit, "pass" if figure <= limit else "fail", detail))
    return found


def _recomputed(model: DefendedClassifier, samples: Samples) -> tuple[str, float, float, str]:
    if isinstance(model, ForeignDefense):
        return "recomputed", 0.0, RECOMPUTED_LIMIT, "nothing of this defense is recomputed"
    plain = DefendedClassifier(model.purifier.without_recomputation(), model.classifier)
    first, second = samples.gradient(model), samples.gradient(plain)
    # Zero against zero is equal, which is for another check to judge.
    size = float(second.abs().max()) or 1.0
    figure = float((first - second).abs().max()) / size
    return "recomputed", figure, RECOMPUTED_LIMIT, "relative difference to plain autograd"


def _finite_differences(model: DefendedClassifier, samples: Samples) -> tuple[str, float, float, str]:
    model, samples = copy.deepcopy(model).double(), samples.double()
    mask = model.masked(samples.image, samples.noise)
    fixed = None if mask is None else mask.detach()
    function = AttackedFunction(lambda image, noise, _: model(image, noise, fixed))
    gradient = samples.gradient(function)
    errors = []
    for k in range(_DIRECTIONS):
        direction = samples.noise.runs([k]).normal(START_STEP, samples.image)
        derivative = (gradient * direction).flatten(1).sum(dim=1)
        tried = [_error(function, samples, direction, step, derivative) for step in _STEPS]
        errors.append(torch.stack(tried).amin(dim=0))
    figure = float(torch.stack(errors).median(dim=0).values.max())
    frozen = "" if mask is None else ", mask frozen"
    detail = (
        f"relative error of directional derivatives, float64, best step, median of {_DIRECTIONS} directions{frozen}"
    )
    return "finite_differences", figure, FINITE_LIMIT, detail


def _error(model: AttackedFunction, samples: Samples, direction: Tensor, step: float, derivative: Tensor) -> Tensor:
    with torch.no_grad():
        high, low = (samples.loss(model, sign * step * direction) for sign in (1.0, -1.0))
    difference = (high - low) / (2.0 * step)
    size = torch.maximum(difference.abs(), derivative.abs())
    return torch.where(size > 0, (difference - derivative).abs() / torch.where(size > 0, size, 1.0), 0.0)


def _replayed(model: DefendedClassifier, samples: Samples) -> tuple[str, float, float, str]:
    with torch.no_grad():
        first, second = samples.loss(model), samples.loss(model)
    different = int((first != second).sum())
    with _calls(model.purifier) as calls, torch.enable_grad(), set_checkpoint_early_stop(False):
        shift = torch.zeros_like(samples.image, requires_grad=True)
        total = samples.loss(model, shift).sum()
        forward = len(calls)
        if total.requires_grad:
            torch.autograd.grad(total, shift, allow_unused=True)
    seen, repeated = calls[:forward], calls[forward:]
    strange = sum(not any(_equal(call, other) for other in seen) for call in repeated)
    detail = f"of {len(first)} outputs or {len(repeated)} calls repeated in the backward pass differ"
    return "replayed", float(different + strange), 0.0, detail


@contextmanager
def _calls(purifier: nn.Module) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Inputs and output of every call of a denoiser."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(module: Denoiser, inputs: tuple[Tensor, Tensor | LevelMap], output: Tensor) -> None:
        x, t = inputs
        calls.append((x.detach().clone(), t.dense if isinstance(t, LevelMap) else t.clone(), output.detach().clone()))

    handles = [m.register_forward_hook(keep) for m in purifier.modules() if isinstance(m, Denoiser)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def _nonzero(model: DefendedClassifier, samples: Samples) -> tuple[str, float, float, str]:
    gradient = samples.gradient(model)
    useless = ~(linf_norm(gradient) > 0) | ~gradient.isfinite().flatten(1).all(dim=1)
    detail = f"of {len(gradient)} samples have a gradient of 0 everywhere, or one that is not finite"
    return "nonzero", float(useless.sum()), 0.0, detail


def _zero_share(model: DefendedClassifier, samples: Samples) -> tuple[str, float, float, str]:
    # A sound defense may leave out most pixels in one draw.
    draws = [replace(samples, noise=samples.noise.runs([k])).gradient(model) == 0 for k in range(_DRAWS)]
    share = float(torch.stack(draws).all(dim=0).double().mean())
    return "zero_share", share, ZERO_LIMIT, f"of all pixels' gradients are exactly 0 in each of {_DRAWS} draws"


def check_gradients(
    defenses: Mapping[str, DefendedClassifier],
    data: ImageDataset,
    samples: int = 4,
    seed: int = 0,
    device: torch.device | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Findings:
    """Checks at a few samples, moved a little, that attacks differentiate what is defended.

    Args:
        defenses: By name.
        data: The evaluated samples.
        samples: How many of them, from the first.
        seed: Seed of all noise.
        device: Where the networks are; ``None`` is the CPU.
        say: Is handed a line for each finding as soon as it is known.

    Raises:
        InputError: ``samples`` is below 1.
    """
    if samples < 1:
        raise InputError(f"samples = {samples}: use at least 1")
    rows = [data[k] for k in range(min(samples, len(data)))]
    index = torch.tensor([row["index"] for row in rows], device=device)
    noise = KeyedNoise(seed, index, torch.zeros_like(index), ATTACK)
    image = torch.stack([row["image"] for row in rows]).to(device)
    chosen = Samples.moved(image, torch.tensor([row["label"] for row in rows], device=device), noise)
    findings = Findings()
    for name, defended in defenses.items():
        for finding in check_gradient(name, defended, chosen):
            findings.append(finding)
            say(str(finding))
    findings.facts = {"samples": index.tolist()}
    return findings
