"""Purifiers: they map an image to the image that the classifier receives."""

from __future__ import annotations

import copy
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lit_purify.defense.masks import Mask
from lit_purify.errors import InputError
from lit_purify.functional.diffusion import euler_back, noised, step_back, to_diffusion, to_image
from lit_purify.functional.levels import LevelMap
from lit_purify.functional.noise import Noise
from lit_purify.functional.schedule import grid
from lit_purify.models import Denoiser
from lit_purify.recorded import Recorded

Sampler = Literal["ddim", "ddpm", "sde"]
Approximation = Literal["constant_projection", "identity_projection", "constant_moment"]
"""Approximate gradients of a part of a purifier, see ``Approximate``."""


@dataclass(frozen=True)
class Trace:
    """Purified image and intermediate results, (B, C, H, W) in [0, 1]; mask (B, 1, H, W) in {0, 1}, or ``None``.

    In a view of a defense with a relaxed mask, the mask is in [0, 1].
    """

    purified: Tensor
    noised: Tensor
    mask: Tensor | None = None


class Purifier(Recorded, nn.Module, ABC):
    """A differentiable function ``purify(image, noise) -> image`` without side effects, equal for attack and defense.

    Args:
        denoiser: Predicts noise; its schedule defines the levels. ``None`` for purifiers without one.
        recompute: Recompute the denoiser's activations in the backward pass instead of storing them (Chen et al. 2016).
            Keyed noise gives the same bits; each step but the last stores its input only.

    Attributes:
        mask: The mask rule, or ``None``.
        deterministic: Whether noise changes nothing.
        approximations: Approximate gradients that the purifier offers.
        straight_through: Whether one of its steps is differentiated as if it were the identity.
    """

    approximations: ClassVar[tuple[Approximation, ...]] = ()
    mask: Mask | None = None
    deterministic: bool = False
    straight_through: bool = False

    denoiser: Denoiser

    def __init__(self, denoiser: Denoiser | None = None, recompute: bool = True) -> None:
        super().__init__()
        if denoiser is not None:
            self.denoiser = denoiser
        self.recompute = recompute

    def forward(self, image: Tensor, noise: Noise, mask: Tensor | None = None) -> Tensor:
        """Returns the purified image.

        Args:
            image: (B, C, H, W) in [0, 1].
            noise: Randomness of the same rows.
            mask: Result of the rule ``mask`` for these images, (B, 1, H, W); ``None`` without a rule.

        Returns:
            (B, C, H, W) in [0, 1].
        """
        return self.trace(image, noise, mask).purified

    @abstractmethod
    def trace(self, image: Tensor, noise: Noise, mask: Tensor | None = None) -> Trace:
        """Returns the purified image and intermediate results; arguments as in ``forward``."""

    @property
    @abstractmethod
    def levels(self) -> list[int]:
        """Levels of the denoiser calls, strongest first, in noising steps after rounding."""

    @property
    @abstractmethod
    def nfe(self) -> int:
        """Number of function evaluations: denoiser calls in one purification."""

    @property
    def start(self) -> list[int]:
        """Levels to which the image is noised, strongest first, after rounding."""
        return self.levels[:1]

    def with_steps(self, steps: int) -> Self:
        """Returns this purifier, with the same networks, with another number of steps.

        Raises:
            InputError: It has no argument ``steps``.
        """
        if "steps" not in self.arguments:
            raise InputError(f"{type(self).__name__} has no version with other steps: use Exact or BPDA")
        # A view may have its own rule.
        kept: dict[str, Any] = {name: getattr(self, name) for name in ("mask", "recompute") if name in self.arguments}
        return type(self)(**{**self.arguments, **kept, "steps": steps})

    def with_mask(self, mask: Mask) -> Self:
        """Returns this purifier, with the same networks, with another mask rule."""
        return self._with(mask=mask)

    def approximated(self, how: Approximation) -> Self:
        """Returns this purifier, with equal outputs, with an approximate gradient of one part.

        Raises:
            InputError: It does not offer this approximation.
        """
        if how not in self.approximations:
            offered = ", ".join(self.approximations) or "none"
            raise InputError(f"{type(self).__name__} has no gradient {how!r} (it has: {offered}): use Exact or BPDA")
        return self

    def without_recomputation(self) -> Self:
        """Returns this purifier, with the same networks, differentiated by plain autograd."""
        return self._with(recompute=False)

    def _with(self, **attributes: object) -> Self:
        other = copy.copy(self)
        vars(other).update(attributes)
        return other

    def check_image(self, image: Tensor) -> None:
        """Raises an ``InputError`` if images do not fit the purifier."""
        if self.nfe:
            self.denoiser.check_image(image)

    def calling(self, last: bool) -> Self:
        """Returns this purifier for a denoiser call; the last call keeps its activations.

        The backward pass begins with that call, so recomputing its activations would save no memory.
        """
        return self.without_recomputation() if last and self.recompute else self

    def predict(self, x: Tensor, t: LevelMap | int) -> Tensor:
        """Predicts the noise in ``x`` at one level or a map of levels."""
        level = torch.full((len(x),), t, device=x.device) if isinstance(t, int) else t
        return self.recomputed(self.denoiser, x, level)

    def recomputed(self, function: Callable[..., Tensor], x: Tensor, *others: object) -> Tensor:
        """Returns ``function(x, *others)`` without storing its activations for the backward pass."""
        if self.recompute and torch.is_grad_enabled() and x.requires_grad:
            # Replays torch's random state too, for denoisers with dropout in training mode.
            found: Tensor = checkpoint(function, x, *others, use_reentrant=False)
            return found
        return function(x, *others)

    def ddim(self, x: Tensor, start: int, end: int) -> Tensor:
        """Takes one DDIM step to a weaker level, with one network call."""
        at = self.denoiser.schedule.at
        return step_back(x, self.predict(x, start), at(start), at(end))


class NoPurifier(Purifier):
    """The classifier alone: the baseline of all defenses."""

    deterministic = True

    @override
    def trace(self, image: Tensor, noise: Noise, mask: Tensor | None = None) -> Trace:
        return Trace(image, image)

    @property
    @override
    def levels(self) -> list[int]:
        return []

    @property
    @override
    def nfe(self) -> int:
        return 0

    @override
    def with_steps(self, steps: int) -> Self:
        return self


class Step(NamedTuple):
    """A sampler step from level t to s.

    Attributes:
        x: The sample at t, (B, C, H, W) in diffusion space.
        eps: Predicted noise in ``x``.
        t: Current level, in noising steps.
        s: Next level.
        origin: Input of the round before noising.
        noise: Randomness of the rows.
        number: Number of the step among all draws of the purification.
    """

    x: Tensor
    eps: Tensor
    t: int
    s: int
    origin: Tensor
    noise: Noise
    number: int


class GradualPurifier(Purifier):
    """Uniform noise in several rounds (Lee & Kim, "Robust evaluation of diffusion-based purification", ICCV 2023).

    Each round noises the result of the previous one, without clipping, and denoises it to level 0. Subclasses override
    ``step``, ``entering`` (before the first round) and ``leaving`` (after the last).

    Args:
        denoiser: Predicts noise.
        level: t, the noise level of each round, in noising steps.
        steps: Network calls of each round.
        sampler: ``ddim`` is deterministic after the first noise of a round. ``ddpm`` draws new noise at every step, and
            so does ``sde`` (Euler-Maruyama steps of the reverse SDE).
        recompute: See ``Purifier``.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        level: Sequence[int],
        steps: Sequence[int],
        sampler: Sampler = "ddim",
        recompute: bool = True,
    ) -> None:
        super().__init__(denoiser, recompute)
        if not level or len(level) != len(steps):
            raise InputError(f"level has {len(level)} rounds, steps {len(steps)}: give each round its level and steps")
        self.grids = [
            grid(denoiser.schedule.check("level", t, low=1), 0, positive("steps", n))
            for t, n in zip(level, steps, strict=True)
        ]
        self.sampler = sampler

    def trace(self, image: Tensor, noise: Noise, mask: Tensor | None = None) -> Trace:
        """Runs all rounds. The trace's noised image is that of the last round."""
        x = start = self.entering(to_diffusion(image))
        numbers = itertools.count()
        for n, grid_ in enumerate(self.grids, start=1):
            origin = x
            x = start = noised(x, self.denoiser.schedule.at(grid_[0]), noise.normal(next(numbers), x))
            for t, s in itertools.pairwise(grid_):
                last = n == len(self.grids) and s == grid_[-1]
                x = self.step(Step(x, self.calling(last).predict(x, t), t, s, origin, noise, next(numbers)))
        x = self.leaving(x)
        return Trace(to_image(x), to_image(start))

    def entering(self, u: Tensor) -> Tensor:
        """Changes the image (diffusion space) before the first round; here the identity."""
        return u

    def leaving(self, x: Tensor) -> Tensor:
        """Changes the result of the last round; here the identity."""
        return x

    def step(self, at: Step) -> Tensor:
        """Returns the sample at the next level, (B, C, H, W) in diffusion space."""
        abar, weaker = self.denoiser.schedule.at(at.t), self.denoiser.schedule.at(at.s)
        if self.sampler == "ddim":
            return step_back(at.x, at.eps, abar, weaker)
        if self.sampler == "ddpm":
            # At level 0 the noise has the factor 0.
            drawn = at.noise.normal(at.number, at.x) if at.s else None
            return step_back(at.x, at.eps, abar, weaker, eta=1.0, noise=drawn)
        return euler_back(at.x, at.eps, abar, weaker, at.noise.normal(at.number, at.x))

    def with_steps(self, steps: int) -> Self:
        """Returns this purifier with ``steps`` steps in each round."""
        counts: Any = [steps] * len(self.grids) if isinstance(self.arguments["steps"], Sequence) else steps
        return super().with_steps(counts)

    @property
    @override
    def levels(self) -> list[int]:
        return [t for grid_ in self.grids for t in grid_[:-1]]

    @property
    @override
    def start(self) -> list[int]:
        return sorted({grid_[0] for grid_ in self.grids}, reverse=True)

    @property
    def nfe(self) -> int:
        """Denoiser calls, one per step."""
        return len(self.levels)


class UniformPurifier(GradualPurifier):
    """The same noise level everywhere, removed in ``steps`` steps (Nie et al., "DiffPure", ICML 2022).

    Args:
        denoiser: Predicts noise.
        level: t, the noise level, in noising steps.
        steps: Network calls.
        sampler: ``ddim`` is deterministic after the first noise. ``ddpm`` draws new noise at every step, and so does
            ``sde`` (Euler-Maruyama steps of the reverse SDE, DiffPure's own).
        recompute: See ``Purifier``.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        level: int,
        steps: int,
        sampler: Sampler = "ddim",
        recompute: bool = True,
    ) -> None:
        super().__init__(denoiser, [level], [steps], sampler, recompute)


def positive(name: str, value: int) -> int:
    """Returns ``value``, or raises an ``InputError`` if it is below 1."""
    if value < 1:
        raise InputError(f"{name} = {value}: use at least 1")
    return value


def required_mask(mask: Tensor | None) -> Tensor:
    """Returns the mask, or raises an ``InputError`` if it is missing."""
    if mask is None:
        raise InputError("this purifier needs a mask: call it through DefendedClassifier, or give mask=...")
    return mask


def nonnegative(name: str, value: float) -> float:
    """Returns ``value``, or raises an ``InputError`` if it is negative, infinite or NaN."""
    if not 0.0 <= value < math.inf:
        raise InputError(f"{name} = {value}: use a finite number, 0 or more")
    return value


def require_images(purifier: Purifier) -> None:
    """Raises an ``InputError`` if the denoiser is one for table rows."""
    if not purifier.denoiser.channels:
        raise InputError(
            f"{type(purifier).__name__} purifies images, not table rows: use UniformPurifier or GuidedPurifier"
        )
