"""Purifiers: an image goes in, the image that the classifier sees comes out."""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
"""Gradients of a part of a purifier that stand in for its own, see ``Approximate``."""


@dataclass(frozen=True)
class Trace:
    """What happened on the way: all (B, C, H, W) in [0, 1]; mask (B, 1, H, W) in {0, 1}, or ``None`` without one.

    (In a view of a defense whose mask is relaxed, the mask is in [0, 1].)
    """

    purified: Tensor
    noised: Tensor
    mask: Tensor | None = None


class Purifier(Recorded, nn.Module, ABC):
    """``purify(image, noise) -> image``: differentiable, without side effects, the same for attack and defense.

    Args:
        denoiser: Predicts noise; its schedule gives levels their meaning. ``None`` for purifiers that call none.
        recompute: Keep no activations of the denoiser for the backward pass, but compute them anew (Chen et al. 2016).
            With keyed noise the gradient has the same bits; each step but the last then keeps its input alone.

    Attributes:
        mask: The rule that steers the noise, ``None`` without one.
        deterministic: Whether the noise changes nothing.
        approximations: Gradients that it offers in place of its own.
        straight_through: Whether a step of it is differentiated as if it were the identity.
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
        """The purified image.

        Args:
            image: (B, C, H, W) in [0, 1].
            noise: Randomness of the same rows.
            mask: What the rule ``mask`` gives for these images, (B, 1, H, W); ``None`` without a rule.

        Returns:
            (B, C, H, W) in [0, 1].
        """
        return self.trace(image, noise, mask).purified

    @abstractmethod
    def trace(self, image: Tensor, noise: Noise, mask: Tensor | None = None) -> Trace:
        """The purified image and what led to it; arguments as in ``forward``."""

    @property
    @abstractmethod
    def levels(self) -> list[int]:
        """The levels walked, strongest first, in noising steps after rounding."""

    @property
    @abstractmethod
    def nfe(self) -> int:
        """Network function evaluations: calls of the denoiser in one purification."""

    @property
    def start(self) -> list[int]:
        """The levels that the image is noised to, strongest first, after rounding."""
        return self.levels[:1]

    def with_steps(self, steps: int) -> Self:
        """The same purifier, of the same networks, in another number of steps.

        Raises:
            InputError: It has no argument ``steps``.
        """
        if "steps" not in self.arguments:
            raise InputError(f"{type(self).__name__} has no version with other steps: use Exact or BPDA")
        # A view may have a rule of its own.
        kept: dict[str, Any] = {name: getattr(self, name) for name in ("mask", "recompute") if name in self.arguments}
        return type(self)(**{**self.arguments, **kept, "steps": steps})

    def with_mask(self, mask: Mask) -> Self:
        """The same purifier, of the same networks, steered by another rule."""
        return self._with(mask=mask)

    def approximated(self, how: Approximation) -> Self:
        """The same purifier, of the same outputs, with another gradient through a part of it.

        Raises:
            InputError: It offers no such gradient.
        """
        if how not in self.approximations:
            offered = ", ".join(self.approximations) or "none"
            raise InputError(f"{type(self).__name__} has no gradient {how!r} (it has: {offered}): use Exact or BPDA")
        return self

    def without_recomputation(self) -> Self:
        """The same purifier, of the same networks, differentiated by plain autograd."""
        return self._with(recompute=False)

    def _with(self, **attributes: object) -> Self:
        other = copy.copy(self)
        vars(other).update(attributes)
        return other

    def check_image(self, image: Tensor) -> None:
        """Raises an ``InputError`` when an image batch does not fit."""
        self.denoiser.check_image(image)

    def calling(self, last: bool) -> Self:
        """Itself, for a call of the denoiser; for the last one with its activations kept.

        The backward pass begins with that call: to compute its activations anew would save no memory.
        """
        return self.without_recomputation() if last and self.recompute else self

    def predict(self, x: Tensor, t: LevelMap | int) -> Tensor:
        """Noise predicted in ``x`` at one level or at a map of levels."""
        level = torch.full((len(x),), t, device=x.device) if isinstance(t, int) else t
        return self.recomputed(self.denoiser, x, level)

    def recomputed(self, function: Callable[..., Tensor], x: Tensor, *others: object) -> Tensor:
        """``function(x, *others)``, whose activations are not kept for the backward pass."""
        if self.recompute and torch.is_grad_enabled() and x.requires_grad:
            # Also replays torch's random state: a denoiser in training mode has dropout.
            found: Tensor = checkpoint(function, x, *others, use_reentrant=False)
            return found
        return function(x, *others)

    def ddim(self, x: Tensor, start: int, end: int) -> Tensor:
        """One DDIM step from a level to a weaker one: one network call."""
        at = self.denoiser.schedule.at
        return step_back(x, self.predict(x, start), at(start), at(end))


class NoPurifier(Purifier):
    """The classifier alone: what the defenses are compared with."""

    deterministic = True

    def trace(self, image: Tensor, noise: Noise, mask: Tensor | None = None) -> Trace:
        """The image itself."""
        return Trace(image, image)

    @property
    def levels(self) -> list[int]:
        """None."""
        return []

    @property
    def nfe(self) -> int:
        """No network call."""
        return 0

    def with_steps(self, steps: int) -> Self:
        """Itself: there are no steps."""
        return self

    def check_image(self, image: Tensor) -> None:
        """The denoiser, which is not called, may take others."""


class Step(NamedTuple):
    """A step of a walk down, from level t to s.

    Attributes:
        x: The sample at t, (B, C, H, W) in diffusion space.
        eps: The noise that the denoiser predicts in it.
        t: Level that it comes from, in noising steps.
        s: Level that it goes to.
        given: What the round began with, before it was noised.
        noise: Randomness of the rows.
        number: The step's own number among all draws of the walk.
    """

    x: Tensor
    eps: Tensor
    t: int
    s: int
    given: Tensor
    noise: Noise
    number: int


class GradualPurifier(Purifier):
    """Uniform noise in several rounds (Lee & Kim, "Robust evaluation of diffusion-based purification", ICCV 2023).

    Each round noises what the one before has left, without clipping in between, and denoises it to 0. Purifiers of
    rounds that differ in a step, or before the first and after the last, replace ``step``, ``entering``, ``leaving``.

    Args:
        denoiser: Predicts noise.
        level: t of each round, how strongly is noised, in noising steps.
        steps: Network calls of each round.
        sampler: ``ddim`` is deterministic after the first noise of a round; ``ddpm`` draws fresh noise at every step,
            and so does ``sde``, Euler-Maruyama steps of the reverse SDE.
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
        """Noises to each round's level, and walks its grid down to 0; what is shown as noised is the last round's."""
        x = start = self.entering(to_diffusion(image))
        numbers = itertools.count()
        for n, grid_ in enumerate(self.grids, start=1):
            given = x
            x = start = noised(x, self.denoiser.schedule.at(grid_[0]), noise.normal(next(numbers), x))
            for t, s in itertools.pairwise(grid_):
                last = n == len(self.grids) and s == grid_[-1]
                x = self.step(Step(x, self.calling(last).predict(x, t), t, s, given, noise, next(numbers)))
        x = self.leaving(x)
        return Trace(to_image(x), to_image(start))

    def entering(self, u: Tensor) -> Tensor:
        """What the first round is given, of the image in diffusion space: itself."""
        return u

    def leaving(self, x: Tensor) -> Tensor:
        """What becomes of the result of the last round: nothing."""
        return x

    def step(self, at: Step) -> Tensor:
        """The sample one step further down: (B, C, H, W) in diffusion space."""
        abar, weaker = self.denoiser.schedule.at(at.t), self.denoiser.schedule.at(at.s)
        if self.sampler == "ddim":
            return step_back(at.x, at.eps, abar, weaker)
        if self.sampler == "ddpm":
            # At level 0 the noise would be multiplied by 0.
            drawn = at.noise.normal(at.number, at.x) if at.s else None
            return step_back(at.x, at.eps, abar, weaker, eta=1.0, noise=drawn)
        return euler_back(at.x, at.eps, abar, weaker, at.noise.normal(at.number, at.x))

    def with_steps(self, steps: int) -> Self:
        """See ``Purifier``; so many in each round."""
        counts: Any = [steps] * len(self.grids) if isinstance(self.arguments["steps"], Sequence) else steps
        return super().with_steps(counts)

    @property
    def levels(self) -> list[int]:
        """The grids without their ends, round by round."""
        return [t for grid_ in self.grids for t in grid_[:-1]]

    @property
    def start(self) -> list[int]:
        """Those of the rounds, strongest first."""
        return sorted({grid_[0] for grid_ in self.grids}, reverse=True)

    @property
    def nfe(self) -> int:
        """One call a step."""
        return len(self.levels)


class UniformPurifier(GradualPurifier):
    """The same noise everywhere, removed in ``steps`` steps (Nie et al., "DiffPure", ICML 2022).

    Args:
        denoiser: Predicts noise.
        level: t, how strongly is noised, in noising steps.
        steps: Network calls.
        sampler: ``ddim`` is deterministic after the first noise; ``ddpm`` draws fresh noise at every step, and so does
            ``sde``, Euler-Maruyama steps of the reverse SDE (DiffPure's own).
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
    """``value`` itself when it is at least 1; an ``InputError`` that names it otherwise."""
    if value < 1:
        raise InputError(f"{name} = {value}: use at least 1")
    return value


def needed(mask: Tensor | None) -> Tensor:
    """The mask that a purifier with a rule is called with; an ``InputError`` where it was left out."""
    if mask is None:
        raise InputError("this purifier needs a mask: call it through DefendedClassifier, or give mask=...")
    return mask


def not_negative(name: str, value: float) -> float:
    """``value`` itself when it is at least 0; an ``InputError`` that names it otherwise."""
    if not value >= 0.0:
        raise InputError(f"{name} = {value}: use 0 or more")
    return value


def pictures_only(purifier: Purifier) -> None:
    """Raises an ``InputError`` where the denoiser is one of rows of a table."""
    if not purifier.denoiser.channels:
        raise InputError(
            f"{type(purifier).__name__} purifies pictures, not rows: use UniformPurifier or GuidedPurifier"
        )
