"""A classifier behind a purifier."""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_purify.defense.purifiers import NoPurifier, Purifier, Trace
from lit_purify.errors import InputError
from lit_purify.functional.chunks import AttackedFunction, chunks
from lit_purify.functional.images import check_unit_range
from lit_purify.functional.noise import EVALUATION, Noise, fresh_noise
from lit_purify.models import Classifier
from lit_purify.recorded import Recorded


class DefendedClassifier(Recorded, nn.Module):
    """A classifier behind a purifier, logits = classifier(purify(image)): a fixed function of image and noise.

    It stays in evaluation mode even if ``train()`` is called, because some attack libraries change the mode and batch
    normalization would then learn from the attack.

    Args:
        purifier: Applied first.
        classifier: Applied to the purified image; its attention gives the mask of purifiers with a mask.
    """

    def __init__(self, purifier: Purifier, classifier: Classifier) -> None:
        super().__init__()
        self.purifier, self.classifier = purifier, classifier
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, image: Tensor, noise: Noise | None = None, mask: Tensor | None = None) -> Tensor:
        """Returns logits (B, classes).

        Args:
            image: (B, C, H, W) in [0, 1].
            noise: Randomness of the rows. ``None`` draws a key from torch's global generator, so that other attack
                libraries see an ordinary randomized network.
            mask: Mask of these images (B, 1, H, W) if it is known already.
        """
        if noise is None:
            # A call from outside: libraries may leave [0, 1] slightly, and images of another scale leave it far.
            check_unit_range(image, slack=0.1)
            noise = fresh_noise(image, EVALUATION)
        return self.classifier(self.purified(image, noise, mask))

    def purified(self, image: Tensor, noise: Noise, mask: Tensor | None = None) -> Tensor:
        """Returns the purified image (B, C, H, W); arguments as in ``forward``."""
        return self.purifier(image, noise, self.masked(image, noise) if mask is None else mask)

    def masked(self, image: Tensor, noise: Noise) -> Tensor | None:
        """Returns the mask of the purifier's rule, (B, 1, H, W), or ``None`` without a rule."""
        rule = self.purifier.mask
        return None if rule is None else rule(self.classifier, image, noise)

    def trace(self, image: Tensor, noise: Noise) -> Trace:
        """Returns the purified image and its intermediate results."""
        return self.purifier.trace(image, noise, self.masked(image, noise))

    @torch.no_grad()
    def trace_in_chunks(self, image: Tensor, noise: Noise, size: int) -> Trace:
        """Returns ``trace`` without a gradient, computed in chunks of ``size`` rows."""
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
        """Whether there is no purifier."""
        return type(self.purifier) is NoPurifier

    def attacked(self, temperature: float = 0.1) -> AttackedFunction:
        """Returns the function that an attack sees.

        Args:
            temperature: Width of the relaxed mask's sigmoids, see ``Mask.relaxed``.
        """
        rule, classifier = self.purifier.mask, self.classifier
        if type(self).forward is not DefendedClassifier.forward:
            # A subclass with its own forward function may have other parts.
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
    """Another defense: any module from [0, 1] images to logits, which may be random.

    Its random numbers come from torch's global generator, which each call seeds by the key of the first row and then
    restores, so that calls can be repeated. The output of a random module for a sample depends on the other rows of the
    batch. Its records therefore depend on batch size and chunk size.

    Args:
        module: The defense.
        classifier: The module as a ``Classifier``, which gives size and classes.
    """

    def __init__(self, module: nn.Module, classifier: Classifier) -> None:
        super().__init__(NoPurifier(), classifier)
        self.title = type(module).__name__

    @override
    def forward(self, image: Tensor, noise: Noise | None = None, mask: Tensor | None = None) -> Tensor:
        if noise is None:
            return self.classifier(image)
        first = torch.zeros(1, dtype=torch.long, device=image.device)
        key = noise.rows(first).uniform(0, image.new_empty(1, 2, dtype=torch.float64))
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(int((key * 2**24).long().flatten()[0]) << 24 | int((key * 2**24).long().flatten()[1]))
            return self.classifier(image)

    @property
    def deterministic(self) -> bool:
        """Whether noise changes nothing; unknown here, hence ``False``."""
        return False

    @property
    @override
    def undefended(self) -> bool:
        return False


def defend(name: str, defense: Purifier | nn.Module, classifier: Classifier) -> DefendedClassifier:
    """Wraps a defense for evaluation: a purifier before ``classifier``, another classifier, or any module.

    Args:
        name: Name of the defense in error messages.
        defense: A ``Purifier``; a ``DefendedClassifier``; a ``Classifier``, such as an adversarially trained one; or a
            module from images (B, C, H, W) in [0, 1] to logits.
        classifier: The classifier behind purifiers.

    Raises:
        InputError: ``defense`` is none of these.
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
    raise InputError(f"defenses: {name} is a {type(defense).__name__}: use a purifier or a module that returns logits")
