"""Gradients: which view of the defense an attack differentiates; every result names it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lit_purify.defense.defended import DefendedClassifier
from lit_purify.defense.masks import RelaxedMask
from lit_purify.defense.purifiers import Approximation, Purifier
from lit_purify.errors import InputError
from lit_purify.functional.chunks import AttackedFunction
from lit_purify.functional.noise import Noise
from lit_purify.models import Denoiser
from lit_purify.recorded import Recorded

MaskGradient = Literal["frozen", "straight_through", "soft"]


@dataclass(frozen=True)
class AttackView:
    """A view of the defense for an attack, and its description in results.

    Attributes:
        defended: The defense.
        function: The function that the attack sees.
        gradient: ``exact``: the defense itself, through all its steps. ``surrogate``: another function, cheaper or
            smoother. An ``Approximation``: the defense itself, with an approximate gradient of one part. ``bpda``: the
            defense itself, with the identity as the purifier's gradient. ``straight_through``: the same for a step that
            is piecewise constant.
        mask_gradient: Treatment of the mask's gradient; ``none`` if there is no mask or no gradient reaches it.
        nfe: Denoiser calls in one evaluation of ``function``.
        levels: Levels of ``function``, in noising steps after rounding.
        remark: A warning for the report, or ``None``.
    """

    defended: DefendedClassifier
    function: AttackedFunction
    gradient: Literal["exact", "surrogate", "bpda", "straight_through"] | Approximation
    mask_gradient: Literal["frozen", "straight_through", "soft", "none"]
    nfe: int
    levels: list[int]
    remark: str | None = None

    def attacked(self) -> AttackedFunction:
        """Returns ``function``."""
        return self.function


class Gradient(Recorded, ABC):
    """Chooses the view of a defense that an attack differentiates."""

    @abstractmethod
    def attacked(self, defended: DefendedClassifier) -> AttackView:
        """Returns a view of the defense with the same networks.

        Raises:
            InputError: The defense has no such view.
        """


class Exact(Gradient):
    """The defense itself, differentiated through every step.

    Args:
        mask: Treatment of the mask's gradient. ``frozen``: the mask is a constant. This is the exact gradient almost
            everywhere, but it ignores what moving the mask would gain. ``straight_through``: equal outputs bit for bit,
            with the gradient of a relaxed mask (sigmoids for thresholds) through the classifier's features. ``soft``:
            the relaxed mask in the forward pass too, hence a surrogate.
        temperature: Width of the sigmoids, see ``Mask.relaxed``.
    """

    def __init__(self, mask: MaskGradient = "frozen", temperature: float = 0.1) -> None:
        if not temperature > 0.0:
            raise InputError(f"temperature = {temperature}: use a number above 0")
        self.mask, self.temperature = mask, temperature

    @override
    def attacked(self, defended: DefendedClassifier) -> AttackView:
        purifier, rule = defended.purifier, defended.purifier.mask
        exact: Literal["exact", "straight_through"] = "straight_through" if purifier.straight_through else "exact"
        if rule is None or not rule.relaxable or self.mask == "frozen":
            kind: Literal["none", "frozen"] = "none" if rule is None else "frozen"
            return AttackView(defended, defended.attacked(), exact, kind, purifier.nfe, purifier.levels)
        soft = self.mask == "soft"
        view = purifier.with_mask(RelaxedMask(rule, soft, self.temperature))
        relaxed = DefendedClassifier(view, defended.classifier).attacked()
        return AttackView(
            defended,
            replace(relaxed, relaxed=defended.attacked(self.temperature).relaxed),
            "surrogate" if soft else exact,
            self.mask,
            view.nfe,
            view.levels,
        )


class Surrogate(Gradient):
    """The same purifier with fewer steps (Lee & Kim, "Robust evaluation of diffusion-based purification", ICCV 2023).

    It is cheaper and usually the weaker attack. Robustness against it does not imply robustness to the exact gradient.

    Args:
        steps: Number of steps of the surrogate.
        mask: See ``Exact``.
        temperature: See ``Exact``.
    """

    def __init__(self, steps: int, mask: MaskGradient = "frozen", temperature: float = 0.1) -> None:
        self.steps, self.exact = steps, Exact(mask, temperature)

    @override
    def attacked(self, defended: DefendedClassifier) -> AttackView:
        ours = defended.purifier
        theirs = ours.with_steps(self.steps)
        view = self.exact.attacked(DefendedClassifier(theirs, defended.classifier))
        remark = None
        if theirs.start != ours.start:
            # Rounding to another grid can change the starting level.
            remark = f"the surrogate with {self.steps} steps noises to {theirs.start}, the defense to {ours.start}"
        return replace(view, defended=defended, gradient="surrogate", remark=remark)


class SurrogatePurifier(Gradient):
    """Another purifier with the same networks, usually cheaper, as a surrogate of the defense.

    Args:
        purifier: The attacked purifier, or a function that builds one from the denoiser.
        mask: See ``Exact``.
        temperature: See ``Exact``.
    """

    def __init__(
        self,
        purifier: Callable[[Denoiser], Purifier],
        mask: MaskGradient = "frozen",
        temperature: float = 0.1,
    ) -> None:
        self.purifier, self.exact = purifier, Exact(mask, temperature)

    @override
    def attacked(self, defended: DefendedClassifier) -> AttackView:
        theirs = self.purifier
        if not isinstance(theirs, Purifier):
            theirs = theirs(defended.purifier.denoiser)
        view = self.exact.attacked(DefendedClassifier(theirs, defended.classifier))
        return replace(view, defended=defended, gradient="surrogate")


class Approximate(Gradient):
    """The defense itself, with an approximate gradient of one part of its purifier; results name the approximation.

    Args:
        how: An approximation that the purifier offers: ``constant_projection`` or ``identity_projection``
            (``LoRIDPurifier``), ``constant_moment`` (``LikelihoodPurifier``).
        mask: See ``Exact``.
        temperature: See ``Exact``.
    """

    def __init__(self, how: Approximation, mask: MaskGradient = "frozen", temperature: float = 0.1) -> None:
        self.how, self.exact = how, Exact(mask, temperature)

    @override
    def attacked(self, defended: DefendedClassifier) -> AttackView:
        theirs = defended.purifier.approximated(self.how)
        view = self.exact.attacked(DefendedClassifier(theirs, defended.classifier))
        return replace(view, defended=defended, gradient=self.how if view.gradient == "exact" else view.gradient)


class BPDA(Gradient):
    """The defense itself, with the identity as its purifier's gradient (Athalye et al., ICML 2018, section 4.1).

    The memory is that of one classifier, for any purifier.

    Args:
        steps: Steps of the purifier in the forward pass; ``None`` keeps the defense's.
    """

    def __init__(self, steps: int | None = None) -> None:
        self.steps = steps

    @override
    def attacked(self, defended: DefendedClassifier) -> AttackView:
        purifier = defended.purifier if self.steps is None else defended.purifier.with_steps(self.steps)

        forward = DefendedClassifier(purifier, defended.classifier)

        def purified(image: Tensor, noise: Noise, mask: Tensor | None) -> Tensor:
            with torch.no_grad():
                found = forward.purified(image, noise, mask)
            # The added term is 0 and carries the gradient.
            return found + (image - image.detach())

        function = replace(forward.attacked(), purified=purified)
        return AttackView(defended, function, "bpda", "none", purifier.nfe, purifier.levels)


class BareClassifier(Gradient):
    """The classifier without its purifier: the view for attacks whose ``target`` is the classifier."""

    @override
    def attacked(self, defended: DefendedClassifier) -> AttackView:
        bare = AttackedFunction(lambda image, noise: defended.classifier(image))
        return AttackView(defended, bare, "surrogate", "none", 0, [])
