"""A classifier behind a purifier: the function that is attacked and defended."""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from lit_purify.defense.purifiers import NoPurifier, Purifier, Trace
from lit_purify.errors import InputError
from lit_purify.functional.chunks import AttackedFunction, chunks
from lit_purify.functional.images import check_unit_range
from lit_purify.functional.noise import EVALUATION, Noise, fresh_noise
from lit_purify.models import Classifier
from lit_purify.recorded import Recorded


class DefendedClassifier(Recorded, nn.Module):
    """logits = classifier(purify(image)): a fixed function of image and noise.

    It stays in evaluation mode, whatever ``train()`` is called from outside: some attack libraries set the mode that
    they found, and batch normalization would learn from the attack.

    Args:
        purifier: Applied first.
        classifier: Applied to what comes out; its attention makes the mask of a purifier that has one.
    """

    def __init__(self, purifier: Purifier, classifier: Classifier) -> None:
        super().__init__()
        self.purifier, self.classifier = purifier, classifier
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, image: Tensor, noise: Noise | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1].

        Args:
            image: The images.
            noise: Randomness of the rows; ``None`` draws a fresh key from torch's global generator, so that an attack
                library that knows nothing of keys sees an ordinary randomized network.
            mask: The mask of these images (B, 1, H, W), where it is known already.
        """
        if noise is None:
            # Somebody's call. Libraries may step a little outside; images of another scale are far outside.
            check_unit_range(image, slack=0.1)
            noise = fresh_noise(image, EVALUATION)
        return self.classifier(self.purified(image, noise, mask))

    def purified(self, image: Tensor, noise: Noise, mask: Tensor | None = None) -> Tensor:
        """The image (B, C, H, W) that the classifier is shown; arguments as in ``forward``."""
        return self.purifier(image, noise, self.masked(image, noise) if mask is None else mask)

    def masked(self, image: Tensor, noise: Noise) -> Tensor | None:
        """The mask of the purifier's rule, (B, 1, H, W); ``None`` without one."""
        rule = self.purifier.mask
        return None if rule is None else rule(self.classifier, image, noise)

    def trace(self, image: Tensor, noise: Noise) -> Trace:
        """What becomes of images on the way to the classifier."""
        return self.purifier.trace(image, noise, self.masked(image, noise))

    @torch.no_grad()
    def trace_in_chunks(self, image: Tensor, noise: Noise, size: int) -> Trace:
        """As ``trace``, without a gradient, in chunks of ``size`` rows."""
        traces = []
        for rows, real in chunks(len(image), size, image.device):
            trace = self.trace(image[rows], noise.rows(rows))
            mask = None if trace.mask is None else trace.mask[:real]
            traces.append(Trace(trace.purified[:real], trace.noised[:real], mask))
        masks = [trace.mask for trace in traces if trace.mask is not None]
        purified, noised = (torch.cat([getattr(t, name) for t in traces]) for name in ("purified", "noised"))
        return Trace(purified, noised, torch.cat(masks) if masks else None)

    @property
    def deterministic(self) -> bool:
        """Whether the purifier claims that noise changes nothing."""
        return self.purifier.deterministic

    @property
    def undefended(self) -> bool:
        """Whether this is a classifier alone."""
        return type(self.purifier) is NoPurifier

    def attacked(self, temperature: float = 0.1) -> AttackedFunction:
        """The function that an attack sees.

        Args:
            temperature: Width of the relaxed mask's sigmoids, see ``Mask.relaxed``.
        """
        rule, classifier = self.purifier.mask, self.classifier
        if type(self).forward is not DefendedClassifier.forward:
            # A class with a function of its own may have other parts, or none.
            return AttackedFunction(self, deterministic=self.deterministic)
        head = AttackedFunction(lambda purified, noise: classifier(purified), self.purified)
        if rule is None:
            return replace(head, deterministic=self.deterministic)
        return replace(
            head,
            mask=(lambda image, noise: rule(classifier, image, noise)) if rule.of_image else None,
            relaxed=(lambda image, noise: rule.relaxed(classifier, image, noise, temperature))
            if rule.relaxable
            else None,
            deterministic=self.deterministic,
        )


class ForeignDefense(DefendedClassifier):
    """Somebody else's defense: any module from [0, 1] images to logits, which may draw random numbers.

    Its random numbers come from torch's global generator, which is seeded by the key of the first row before each
    call, and restored: so a call can be repeated. What a random module puts out for a sample then depends on the rows
    beside it, and so do its records on batch size and chunk.

    Args:
        module: The defense.
        classifier: The module as a classifier, for its size and classes.
    """

    def __init__(self, module: nn.Module, classifier: Classifier) -> None:
        super().__init__(NoPurifier(), classifier)
        self.title = type(module).__name__

    def forward(self, image: Tensor, noise: Noise | None = None, mask: Tensor | None = None) -> Tensor:
        """See ``DefendedClassifier``."""
        if noise is None:
            return self.classifier(image)
        first = torch.zeros(1, dtype=torch.long, device=image.device)
        key = noise.rows(first).uniform(0, image.new_empty(1, 2, dtype=torch.float64))
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(int((key * 2**24).long().flatten()[0]) << 24 | int((key * 2**24).long().flatten()[1]))
            return self.classifier(image)

    @property
    def deterministic(self) -> bool:
        """Unknown."""
        return False

    @property
    def undefended(self) -> bool:
        """It is a defense."""
        return False


def defend(name: str, defense: Purifier | nn.Module, classifier: Classifier) -> DefendedClassifier:
    """A defense as it is evaluated: a purifier before ``classifier``, another classifier, or a module of any kind.

    Args:
        name: What error messages call it.
        defense: A ``Purifier``; a ``DefendedClassifier``; a ``Classifier``, such as one trained adversarially; or a
            module from images (B, C, H, W) in [0, 1] to logits.
        classifier: The classifier that purifiers defend.

    Raises:
        InputError: It is none of these.
    """
    if isinstance(defense, DefendedClassifier):
        return defense
    if isinstance(defense, Purifier):
        return DefendedClassifier(defense, classifier)
    if isinstance(defense, Classifier):
        return DefendedClassifier(NoPurifier(), defense)
    if isinstance(defense, nn.Module):
        of = classifier
        return ForeignDefense(defense, Classifier(defense, of.size, of.num_classes, of.channels))
    raise InputError(f"defenses: {name} is a {type(defense).__name__}: give a purifier, or a module that gives logits")
