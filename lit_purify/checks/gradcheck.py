"""Gradcheck: checks that attacks follow the gradient of the defense."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_purify.checks.findings import Finding, Findings, Verdict
from lit_purify.data.base import ImageDataset
from lit_purify.defense import DefendedClassifier, ForeignDefense
from lit_purify.errors import InputError
from lit_purify.functional.chunks import AttackedFunction
from lit_purify.functional.losses import margin_loss
from lit_purify.functional.noise import ATTACK, START_STEP, KeyedNoise
from lit_purify.functional.threat import l2_norm, linf_norm

RECOMPUTED_LIMIT, FINITE_LIMIT, ZERO_LIMIT = 1e-5, 1e-4, 0.9
"""Largest relative differences, and largest fraction of zeros."""
_STEPS = (1e-9, 1e-8, 1e-10, 1e-7, 1e-6)
"""Steps of finite differences, in pixels of [0, 1], in the order of trial."""
_DIRECTIONS, _DRAWS = 5, 4
_MOVED = 0.02
"""Size of random shifts of images, in pixels of [0, 1]; images are first clipped to 0.02 from the border."""

Function = AttackedFunction | DefendedClassifier


@dataclass(frozen=True)
class Samples:
    """Samples whose margin loss is differentiated, under the attack's first noise draw.

    Attributes:
        image: (B, C, H, W) in [0, 1].
        label: (B,).
        noise: Noise of the same rows.
    """

    image: Tensor
    label: Tensor
    noise: KeyedNoise

    @classmethod
    def moved(cls, image: Tensor, label: Tensor, noise: KeyedNoise) -> Samples:
        """Shifts samples at random: on even backgrounds a network can be exactly at the kink of a ReLU."""
        image = image.clamp(_MOVED, 1.0 - _MOVED)
        return cls(image + _MOVED * (2.0 * noise.uniform(START_STEP, image) - 1.0), label, noise)

    def loss(self, model: Function, shift: Tensor | float = 0.0) -> Tensor:
        """Returns the loss of each sample, (B,), with shifted images."""
        return margin_loss(model(self.image + shift, self.noise), self.label)

    def gradient(self, model: Function) -> Tensor:
        """Returns the gradient of each sample's loss in its image, (B, C, H, W); zero if it does not depend on it."""
        with torch.enable_grad():
            shift = torch.zeros_like(self.image, requires_grad=True)
            total = self.loss(model, shift).sum()
            found = torch.autograd.grad(total, shift, allow_unused=True)[0] if total.requires_grad else None
        return torch.zeros_like(shift) if found is None else found


Measured = tuple[float | None, float, str]
"""Value, largest value that passes, and description; without a value the check is not applicable."""


def recomputed(model: DefendedClassifier, samples: Samples) -> Measured:
    """Compares the gradient by recomputation with that of plain autograd."""
    if isinstance(model, ForeignDefense):
        return None, RECOMPUTED_LIMIT, "this defense recomputes nothing"
    plain = DefendedClassifier(model.purifier.without_recomputation(), model.classifier)
    difference = relative(samples.gradient(model), samples.gradient(plain))
    return difference, RECOMPUTED_LIMIT, "relative difference to plain autograd"


def finite_differences(model: DefendedClassifier, samples: Samples) -> Measured:
    """Compares directional derivatives with central differences of several steps, in float64.

    A kink of a ReLU network within a step falsifies the difference of a correct gradient; a shorter step or another
    direction avoids it. A wrong gradient is wrong at all steps and in nearly all directions. The error is therefore the
    median over directions of the minimum over steps, relative to the difference or to the norm of the gradient, the
    typical directional derivative. Masks are piecewise constant and frozen at the masks of the unshifted images.
    """
    if model.purifier.straight_through:
        return None, FINITE_LIMIT, "a step of this purifier is piecewise constant and has a straight-through gradient"
    model = copy.deepcopy(model).double()
    samples = replace(samples, image=samples.image.double())
    mask = model.masked(samples.image, samples.noise)
    fixed = None if mask is None else mask.detach()
    function = AttackedFunction(lambda image, noise: model(image, noise, fixed))
    gradient, errors = samples.gradient(function), []
    for k in range(_DIRECTIONS):
        direction = samples.noise.runs([k]).normal(START_STEP, samples.image)
        derivative = (gradient * direction).flatten(1).sum(dim=1)
        error = torch.full_like(derivative, torch.inf)
        for step in _STEPS:
            with torch.no_grad():
                high, low = (samples.loss(function, sign * step * direction) for sign in (1.0, -1.0))
            difference = (high - low) / (2.0 * step)
            size = torch.maximum(difference.abs(), l2_norm(gradient)).clamp(min=torch.finfo(torch.float64).tiny)
            error = torch.minimum(error, (difference - derivative).abs() / size)
            if bool((error <= FINITE_LIMIT).all()):
                break
        errors.append(error)
    figure = float(torch.stack(errors).median(dim=0).values.max())
    frozen = "" if mask is None else ", mask frozen"
    how = f"relative error of directional derivatives, float64, best step, median of {_DIRECTIONS} directions{frozen}"
    return figure, FINITE_LIMIT, how


def replayed(model: DefendedClassifier, samples: Samples) -> Measured:
    """Checks that two forward passes with the same keys have the same bits."""
    with torch.no_grad():
        first, second = samples.loss(model), samples.loss(model)
    return int((first != second).sum()), 0.0, f"of {len(first)} outputs differ when they are computed again"


def nonzero(model: DefendedClassifier, samples: Samples) -> Measured:
    """Checks that the gradient is finite, and zero everywhere for no sample."""
    gradient = samples.gradient(model)
    useless = ~(linf_norm(gradient) > 0) | ~gradient.isfinite().flatten(1).all(dim=1)
    detail = f"of {len(gradient)} samples have a gradient of 0 everywhere, or one that is not finite"
    return int(useless.sum()), 0.0, detail


def zero_share(model: DefendedClassifier, samples: Samples) -> Measured:
    """Checks that few pixels have a gradient of exactly zero in all of several draws: saturation and quantization do.

    A sound defense may ignore most pixels in one draw.
    """
    draws = [replace(samples, noise=samples.noise.runs([k])).gradient(model) == 0 for k in range(_DRAWS)]
    share = float(torch.stack(draws).all(dim=0).double().mean())
    return share, ZERO_LIMIT, f"of all pixels' gradients are exactly 0 in each of {_DRAWS} draws"


Check = Callable[[DefendedClassifier, Samples], Measured]
CHECKS: list[Check] = [recomputed, finite_differences, replayed, nonzero, zero_share]
"""All checks of a defense's gradient, in order; each is reported by the name of its function."""


def check_gradient(
    name: str, model: DefendedClassifier, samples: Samples, further: Sequence[Check] = ()
) -> Iterator[Finding]:
    """Runs all ``CHECKS`` of one defense, and further ones."""
    for check in (*CHECKS, *further):
        figure, limit, reason = check(model, samples)
        # NaN fails.
        how: Verdict = "not applicable" if figure is None else "pass" if figure <= limit else "fail"
        yield Finding(name, check.__name__, figure or 0.0, limit, how, reason)


def check_gradients(
    defenses: Mapping[str, DefendedClassifier],
    data: ImageDataset,
    samples: int = 4,
    seed: int = 0,
    device: torch.device | None = None,
    say: Callable[[str], None] = lambda line: None,
    further: Sequence[Check] = (),
) -> Findings:
    """Checks at the first samples, slightly shifted, that attacks differentiate the defense.

    Arguments and errors are those of ``lit_purify.gradcheck``; ``say`` receives a line for each finding at once.
    """
    image, label, index = first_samples(data, samples, device)
    chosen = Samples.moved(image, label, KeyedNoise(seed, index, torch.zeros_like(index), ATTACK))
    findings = Findings()
    for name, defended in defenses.items():
        findings.take(check_gradient(name, defended, chosen, further), say)
    findings.facts = {"samples": index.tolist()}
    return findings


def first_samples(data: ImageDataset, count: int, device: torch.device | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns images (B, C, H, W), labels and positions (B,) of the first samples; raises if ``count`` is below 1."""
    if count < 1:
        raise InputError(f"samples = {count}: use at least 1")
    rows = [data[k] for k in range(min(count, len(data)))]
    label, index = (torch.tensor([row[key] for row in rows], device=device) for key in ("label", "index"))
    return torch.stack([row["image"] for row in rows]).to(device), label, index


def relative(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference, relative to the largest expected value; zero and zero are equal."""
    return float((found - expected).abs().max()) / (float(expected.abs().max()) or 1.0)
