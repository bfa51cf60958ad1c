"""An attack on the mask itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_purify.attacks.base import check_counts
from lit_purify.attacks.pgd import PGD
from lit_purify.functional.chunks import LogitsFunction, gradient_in_chunks, logits_in_chunks
from lit_purify.functional.noise import Noise
from lit_purify.functional.threat import Norm, project, steepest


class MaskShift(PGD):
    """First moves the strongly noised region off the image's own, then raises the loss from there.

    A mask is a threshold, through which no gradient leads: an attack that follows gradients alone never finds out what
    is gained where the noise falls on other pixels. So the first steps lower the overlap sum(m(x') m(x)) / sum(m(x)) of
    the relaxed mask m of the attacked image with that of the original one, in the same ball; the steps of ``PGD`` go on
    from the point that they reach. Without a mask that an image can move this is ``PGD``.

    Args:
        norm: As in ``PGD``.
        eps: As in ``PGD``.
        steps: Steps on the loss.
        step_size: Of both kinds of steps.
        shift_steps: Steps on the mask. Each costs a gradient of the classifier's features, and no network call.
        kwargs: As in ``PGD``.
    """

    def __init__(
        self,
        norm: Norm,
        eps: float | str,
        steps: int,
        step_size: float | str,
        shift_steps: int = 20,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(norm, eps, steps, step_size, **kwargs)
        check_counts(shift_steps=shift_steps)
        self.shift_steps = shift_steps

    @property
    def title(self) -> str:
        """What reports call it."""
        return f"{super().title}, after {self.shift_steps} steps that move the mask"

    def _begin(self, model: LogitsFunction, image: Tensor, noise: Noise, chunk: int) -> Tensor:
        attention: Callable[[Tensor, Noise], Tensor | None] | None = getattr(model, "attention", None)
        if attention is None:
            # Without this the mask would stay where it is, and nobody would know.
            raise RuntimeError("MaskShift must be handed a defense, or a view of one, which tells where it looks")

        def look(image: Tensor, noise: Noise) -> Tensor:
            mask = attention(image, noise)
            assert mask is not None
            return mask.flatten(1)

        def moved(mask: Tensor, original: Tensor) -> Tensor:
            return -(mask * original).sum(dim=1) / original.sum(dim=1).clamp(min=1.0)

        point = super()._begin(model, image, noise, chunk)
        first = torch.zeros(1, dtype=torch.long, device=image.device)
        with torch.no_grad():
            if attention(image[:1], noise.rows(first)) is None:
                return point
        original = logits_in_chunks(look, image, noise, [0], chunk)[:, 0]
        for _ in range(self.shift_steps):
            _, gradient = gradient_in_chunks(look, moved, point, original, noise, [0], chunk)
            point = project(point + self.step_size * steepest(gradient, self.norm), image, self.norm, self.eps)
        return point
