"""An attack on the mask itself."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lit_purify.attacks.base import check_counts
from lit_purify.attacks.pgd import PGD, Aggregate
from lit_purify.functional.chunks import AttackedFunction, gradient_in_chunks, logits_in_chunks
from lit_purify.functional.losses import LossName
from lit_purify.functional.noise import Noise
from lit_purify.functional.threat import Norm, steepest


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
        eot: As in ``PGD``.
        loss: As in ``PGD``.
        select: As in ``PGD``.
        random_start: As in ``PGD``.
        restarts: As in ``PGD``.
        aggregate: As in ``PGD``.
    """

    def __init__(
        self,
        norm: Norm = "linf",
        eps: float | str = "8/255",
        steps: int = 20,
        step_size: float | str | None = None,
        shift_steps: int = 20,
        eot: int = 1,
        loss: LossName = "margin",
        select: Literal["best", "last"] = "last",
        random_start: bool = True,
        restarts: int = 1,
        aggregate: Aggregate = "mean",
    ) -> None:
        super().__init__(norm, eps, steps, step_size, eot, loss, select, random_start, restarts, aggregate)
        check_counts(shift_steps=shift_steps)
        self.shift_steps = shift_steps

    @property
    def title(self) -> str:
        """What reports call it."""
        return f"{super().title}, after {self.shift_steps} steps that move the mask"

    def _begin(self, model: AttackedFunction, image: Tensor, noise: Noise, chunk: int) -> Tensor:
        point, relaxed = super()._begin(model, image, noise, chunk), model.relaxed
        if relaxed is None:
            return point

        def moved(mask: Tensor, original: Tensor) -> Tensor:
            return -(mask * original).sum(dim=1) / original.sum(dim=1).clamp(min=1.0)

        look = AttackedFunction(lambda image, noise: relaxed(image, noise).flatten(1))
        original = logits_in_chunks(look, image, noise, [0], chunk)[:, 0]
        for _ in range(self.shift_steps):
            _, gradient = gradient_in_chunks(look, moved, point, original, noise, [0], chunk)
            point = self.inside(point + self.step_size * steepest(gradient, self.norm), image)
        return point
