"""Likelihood maximization: purification by gradient steps on the denoising error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from lit_purify.defense.purifiers import Approximation, Purifier, Trace, nonnegative
from lit_purify.errors import InputError
from lit_purify.functional.diffusion import noised, to_diffusion, to_image
from lit_purify.functional.noise import Noise
from lit_purify.models import Denoiser, differentiable_twice

State = tuple[Tensor, Tensor, Tensor]
"""Image, first and second moment of Adam, each (B, C, H, W) in diffusion space."""
_BETAS, _TINY = (0.9, 0.999), 1e-8


class LikelihoodPurifier(Purifier):
    """Likelihood maximization (Chen et al., "Robust classification via a single diffusion model", ICML 2024).

    Adam minimizes the denoising error |D(x_t) - x|^2 = (1 - abar_t) / abar_t |n - eps(x_t, t)|^2 over the image x,
    starting from the input u, with x_t = sqrt(abar_t) x + sqrt(1 - abar_t) n. Each step draws its own n and, per image,
    its own t from ``low`` .. ``high``, and then projects x on an L2 ball around u. A step costs one forward and one
    backward pass of the denoiser.

    The exact gradient differentiates through the steps, so the denoiser is differentiated twice; with ``recompute`` the
    steps keep no activations. Adam's first step is nearly the sign of the gradient and has a derivative near 0, so the
    exact gradient can be a poor guide. ``Approximate`` with ``constant_moment`` holds Adam's second moment constant, as
    DiffHammer's evaluation does.

    Args:
        denoiser: Predicts noise.
        low: The weakest level drawn, in noising steps.
        high: The strongest level drawn. DiffHammer draws sigma from 0.4 to 0.6, about 118 .. 171 of the linear
            schedule.
        steps: Steps of Adam; 0 returns the image unchanged.
        rate: Adam's learning rate, in diffusion space (twice the scale of [0, 1]).
        radius: Largest root-mean-square change of a pixel in [0, 1]; ``None`` is unlimited.
        recompute: See ``Purifier``.
    """

    approximations = ("constant_moment",)

    def __init__(
        self,
        denoiser: Denoiser,
        low: int,
        high: int,
        steps: int,
        rate: float = 0.1,
        radius: float | None = None,
        recompute: bool = True,
    ) -> None:
        super().__init__(denoiser, recompute)
        self.low, self.high = denoiser.schedule.check("low", low, low=1), denoiser.schedule.check("high", high, low=1)
        if low > high:
            raise InputError(f"low = {low} is above high = {high}: swap them")
        self.steps, self.rate = int(nonnegative("steps", steps)), nonnegative("rate", rate)
        self.radius = None if radius is None else nonnegative("radius", radius)
        self.approximation: Approximation | None = None

    def trace(self, image: Tensor, noise: Noise, mask: Tensor | None = None) -> Trace:
        """Takes the steps. The trace's noised image is the input of the first denoiser call."""
        u = to_diffusion(image)
        state: State = (u, torch.zeros_like(u), torch.zeros_like(u))
        start = self.drawn(0, u, noise)[0] if self.steps else u
        for k in range(self.steps):

            def step(u: Tensor, *state: Tensor, k: int = k) -> State:
                return self.step(k, u, state, noise)

            if self.calling(last=k == self.steps - 1).recompute and torch.is_grad_enabled() and u.requires_grad:
                state = _Recomputed.apply(step, u, *state)
            else:
                state = step(u, *state)
        return Trace(to_image(state[0]), to_image(start))

    def drawn(self, k: int, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the noised images of step k, the noise, the levels (B,) and their abar (B, 1, ..)."""
        share = noise.uniform(2 * k, x.new_empty(len(x), 1)).flatten()
        t = self.low + (share.double() * (self.high - self.low + 1)).long()
        n, abar = noise.normal(2 * k + 1, x), self.denoiser.schedule.at(t).reshape(-1, *(1 for _ in x.shape[1:]))
        return noised(x, abar, n), n, t, abar

    def step(self, k: int, u: Tensor, state: Sequence[Tensor], noise: Noise) -> State:
        """Takes step k of Adam from the state of the previous step; ``u`` is the input in diffusion space."""
        x, first, second = state
        again = torch.is_grad_enabled() and x.requires_grad
        # Also inside inference mode, whose tensors take no gradient: a copy outside it does.
        with torch.inference_mode(False), torch.enable_grad(), differentiable_twice():
            leaf = x if again else x.detach().clone().requires_grad_()
            at, n, t, abar = self.drawn(k, leaf, noise)
            error = ((1.0 - abar) / abar).to(x.dtype) * (n - self.denoiser(at, t)).square()
            # Always with create_graph: differentiable gradients use operations that round differently.
            (slope,) = torch.autograd.grad(error.sum(), leaf, create_graph=True)
        slope = slope if again else slope.detach()
        first = _BETAS[0] * first + (1.0 - _BETAS[0]) * slope
        second = _BETAS[1] * second + (1.0 - _BETAS[1]) * slope.square()
        mean, square = first / (1.0 - _BETAS[0] ** (k + 1)), second / (1.0 - _BETAS[1] ** (k + 1))
        if self.approximation is not None:
            square = square.detach()
        # The root has no derivative at 0: a pixel with gradient 0 stays unchanged.
        root = torch.where(square > 0, square, 1.0).sqrt() * (square > 0)
        return self.near(x - self.rate * mean / (root + _TINY), u), first, second

    def near(self, x: Tensor, u: Tensor) -> Tensor:
        """Projects ``x`` on the ball around ``u``."""
        if self.radius is None:
            return x
        # Diffusion space has twice the scale of [0, 1].
        away, most = x - u, 2.0 * self.radius * u[0].numel() ** 0.5
        square = away.square().sum(dim=tuple(range(1, x.ndim)), keepdim=True)
        outside = square > most**2
        return torch.where(outside, u + away * most / torch.where(outside, square, 1.0).sqrt(), x)

    @override
    def approximated(self, how: Approximation) -> Self:
        super().approximated(how)
        return self._with(approximation=how)

    @property
    def levels(self) -> list[int]:
        """The strongest level that each step can draw."""
        return [self.high] * self.steps

    @property
    def start(self) -> list[int]:
        """The strongest and the weakest level that can be drawn."""
        return [self.high, self.low]

    @property
    def nfe(self) -> int:
        """Denoiser calls, one per step; each also has a backward pass, which costs about two more."""
        return self.steps


class _Recomputed(torch.autograd.Function):
    """A checkpointed function that takes gradients inside, which torch's own checkpoint does not support."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., State], *tensors: Tensor) -> State:  # noqa: ANN401
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            out = ctx.function(*leaves)
            found = torch.autograd.grad(out, leaves, slopes, allow_unused=True, materialize_grads=True)
        return None, *found
