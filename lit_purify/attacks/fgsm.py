"""The fast gradient sign method."""

from __future__ import annotations

from typing_extensions import override

from lit_purify.attacks.pgd import PGD
from lit_purify.functional.losses import LossName
from lit_purify.functional.threat import Norm, pixels


class FGSM(PGD):
    """One step along the sign of the gradient (Goodfellow et al., ICLR 2015); for L2, along the gradient.

    The step length is ``eps`` from the image, and 1.25 ``eps`` with projection from a random point of the ball (Wong et
    al., "Fast is better than free", ICLR 2020).

    Args:
        norm: ``linf`` or ``l2``.
        eps: Radius, in pixels of [0, 1]; a number or a fraction such as ``8/255``.
        eot: Noise draws averaged in the gradient.
        loss: ``ce``, ``margin`` or ``dlr``, as in ``PGD``.
        random_start: Start at a uniform point of the ball instead of at the image.
    """

    scalable = frozenset({"eot", "loss", "eps"})

    def __init__(
        self,
        norm: Norm = "linf",
        eps: float | str = "8/255",
        eot: int = 1,
        loss: LossName = "margin",
        random_start: bool = False,
    ) -> None:
        length = pixels("eps", eps) * (1.25 if random_start else 1.0)
        super().__init__(norm, eps, 1, length, eot, loss, random_start=random_start)

    @property
    @override
    def title(self) -> str:
        return f"FGSM on the {self.loss} loss from {'a random point' if self.random_start else 'the image'}"
