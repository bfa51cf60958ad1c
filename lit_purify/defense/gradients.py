"""What an attack differentiates: a view of the defense, named in every result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lit_purify.defense.defended import DefendedClassifier
from lit_purify.defense.masks import Relaxed
from lit_purify.defense.purifiers import Approximation, Purifier
from lit_purify.errors import InputError
from lit_purify.functional.chunks import AttackedFunction
from lit_purify.functional.noise import Noise
from lit_purify.models import Denoiser
from lit_purify.recorded import Recorded

MaskGradient = Literal["frozen", "straight_through", "soft"]


@dataclass(frozen=True)
class Attacked:
    """What an attack is handed in place of the defense, and what is reported of it.

    Attributes:
        defended: The defense.
        function: What the attack sees.
        gradient: ``exact``: the defense itself, through all its steps. ``surrogate``: another function, cheaper or
            smoother. An ``Approximation``: the defense itself, with another gradient through a part of it. ``bpda``:
            the defense itself, with the identity for the gradient of the purifier; ``straight_through``: for that of a
            step that is constant almost everywhere.
        mask_gradient: What becomes of the mask's gradient; ``none`` where there is no mask, or no gradient reaches it.
        nfe: Calls of the denoiser in one evaluation of ``function``.
        levels: Levels that it walks, in noising steps after rounding.
        remark: What to warn of.
    """

    defended: DefendedClassifier
    function: AttackedFunction
    gradient: Literal["exact", "surrogate", "bpda", "straight_through"] | Approximation
    mask_gradient: Literal["frozen", "straight_through", "soft", "none"]
    nfe: int
    levels: list[int]
    remark: str | None = None

    def attacked(self) -> AttackedFunction:
        """See ``function``."""
        return self.function


class Gradient(Recorded, ABC):
    """From a defense to what an attack on it is handed."""

    @abstractmethod
    def attacked(self, defended: DefendedClassifier) -> Attacked:
        """The view of a defense, of the same networks.

        Raises:
            InputError: The defense has no such view.
        """


class Exact(Gradient):
    """The defense itself, differentiated through every step.

    Args:
        mask: What becomes of the mask's gradient. ``frozen``: the mask is a constant; this is the exact gradient almost
            everywhere, blind to what moving the mask would gain. ``straight_through``: the same outputs bit for bit,
            and added to the gradient that of a relaxed mask (sigmoids for thresholds), through the classifier's
            features. ``soft``: the relaxed mask in the forward pass too, which is another function: a surrogate.
        temperature: Width of the sigmoids, see ``Mask.relaxed``.
    """

    def __init__(self, mask: MaskGradient = "frozen", temperature: float = 0.1) -> None:
        if mask not in ("frozen", "straight_through", "soft"):
            raise InputError(f"mask = {mask!r}: use frozen, straight_through or soft")
        if not temperature > 0.0:
            raise InputError(f"temperature = {temperature}: use a number above 0")
        self.mask, self.temperature = mask, temperature

    def attacked(self, defended: DefendedClassifier) -> Attacked:
        """See ``Gradient``."""
        purifier, rule = defended.purifier, defended.purifier.mask
        exact: Literal["exact", "straight_through"] = "straight_through" if purifier.straight_through else "exact"
        if rule is None or not rule.relaxable or self.mask == "frozen":
            kind: Literal["none", "frozen"] = "none" if rule is None else "frozen"
            return Attacked(defended, defended.attacked(), exact, kind, purifier.nfe, purifier.levels)
        soft = self.mask == "soft"
        view = purifier.with_mask(Relaxed(rule, soft, self.temperature))
        relaxed = DefendedClassifier(view, defended.classifier).attacked()
        return Attacked(
            defended,
            replace(relaxed, relaxed=defended.attacked(self.temperature).relaxed),
            "surrogate" if soft else exact,
            self.mask,
            view.nfe,
            view.levels,
        )


class Surrogate(Gradient):
    """The same purifier with fewer steps (Lee & Kim, "Robust evaluation of diffusion-based purification", ICCV 2023).

    Cheaper, and as a rule the weaker attack: what survives it need not survive the exact gradient.

    Args:
        steps: Of the surrogate.
        mask: See ``Exact``.
        temperature: See ``Exact``.
    """

    def __init__(self, steps: int, mask: MaskGradient = "frozen", temperature: float = 0.1) -> None:
        self.steps, self.exact = steps, Exact(mask, temperature)

    def attacked(self, defended: DefendedClassifier) -> Attacked:
        """See ``Gradient``."""
        ours = defended.purifier
        theirs = ours.with_steps(self.steps)
        view = self.exact.attacked(DefendedClassifier(theirs, defended.classifier))
        remark = None
        if theirs.start != ours.start:
            # Rounding to another grid can change what is attacked.
            remark = f"the surrogate of {self.steps} steps noises to {theirs.start}, the defense to {ours.start}"
        return replace(view, defended=defended, gradient="surrogate", remark=remark)


class OtherPurifier(Gradient):
    """Another purifier of the same networks, cheaper as a rule, in place of the defense.

    Args:
        purifier: What is attacked: a purifier, or a function that makes one from the denoiser.
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

    def attacked(self, defended: DefendedClassifier) -> Attacked:
        """See ``Gradient``."""
        theirs = self.purifier
        if not isinstance(theirs, Purifier):
            theirs = theirs(defended.purifier.denoiser)
        view = self.exact.attacked(DefendedClassifier(theirs, defended.classifier))
        return replace(view, defended=defended, gradient="surrogate")


class Approximate(Gradient):
    """The defense itself, with a simpler gradient through a part of its purifier; results are named after it.

    Args:
        how: One that the purifier offers: ``constant_projection`` or ``identity_projection`` (``LoRIDPurifier``),
            ``constant_moment`` (``LikelihoodPurifier``).
        mask: See ``Exact``.
        temperature: See ``Exact``.
    """

    def __init__(self, how: Approximation, mask: MaskGradient = "frozen", temperature: float = 0.1) -> None:
        self.how, self.exact = how, Exact(mask, temperature)

    def attacked(self, defended: DefendedClassifier) -> Attacked:
        """See ``Gradient``."""
        theirs = defended.purifier.approximated(self.how)
        view = self.exact.attacked(DefendedClassifier(theirs, defended.classifier))
        return replace(view, defended=defended, gradient=self.how if view.gradient == "exact" else view.gradient)


class BPDA(Gradient):
    """Forward the defense itself, backward the identity through its purifier (Athalye et al., ICML 2018, section 4.1).

    Needs the memory of one classifier, whatever the purifier does.

    Args:
        steps: Of the purifier in the forward pass; ``None`` for the defense itself.
    """

    def __init__(self, steps: int | None = None) -> None:
        self.steps = steps

    def attacked(self, defended: DefendedClassifier) -> Attacked:
        """See ``Gradient``."""
        purifier = defended.purifier if self.steps is None else defended.purifier.with_steps(self.steps)

        forward = DefendedClassifier(purifier, defended.classifier)

        def purified(image: Tensor, noise: Noise, mask: Tensor | None) -> Tensor:
            with torch.no_grad():
                found = forward.purified(image, noise, mask)
            # What is added is 0, with a gradient.
            return found + (image - image.detach())

        function = replace(forward.attacked(), purified=purified)
        return Attacked(defended, function, "bpda", "none", purifier.nfe, purifier.levels)


class BareClassifier(Gradient):
    """The classifier without its purifier: what attacks are handed whose ``target`` is the classifier."""

    def attacked(self, defended: DefendedClassifier) -> Attacked:
        """See ``Gradient``."""
        bare = AttackedFunction(lambda image, noise: defended.classifier(image))
        return Attacked(defended, bare, "surrogate", "none", 0, [])
