"""A classifier behind a purifier: what is attacked and what is defended."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_purify.defense.masks import Seen
from lit_purify.defense.purifiers import Purifier
from lit_purify.functional.noise import EVALUATION, KeyedNoise, Noise
from lit_purify.models import Classifier


class DefendedClassifier(nn.Module):
    """logits = classifier(purify(image)).

    Args:
        purifier: Applied first.
        classifier: Applied to what comes out.
    """

    def __init__(self, purifier: Purifier, classifier: Classifier) -> None:
        super().__init__()
        self.purifier, self.classifier = purifier, classifier

    def forward(self, image: Tensor, noise: Noise | None = None) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1].

        Args:
            image: The images.
            noise: Randomness of the rows; ``None`` draws a fresh key from torch's global generator, so that an attack
                library that knows nothing of keys sees an ordinary randomized network.
        """
        if noise is None:
            seed, run = (int(word) for word in torch.randint(2**32, (2,)))
            index = torch.arange(len(image), device=image.device)
            noise = KeyedNoise(seed, index, torch.full_like(index, run), EVALUATION)
        return self.classifier(self.purifier(image, noise))

    @property
    def deterministic(self) -> bool:
        """Whether the purifier says that noise changes nothing."""
        return self.purifier.deterministic

    def look(self, image: Tensor, noise: Noise) -> Tensor | None:
        """Masks (B, 1, H, W) of images, where they are the same for all noise; ``None`` elsewhere."""
        rule = self.purifier.mask
        return rule(self.classifier, image, noise) if rule is not None and rule.of_image else None

    def seen(self, image: Tensor, mask: Tensor) -> DefendedClassifier:
        """The same defense, which need not ``look`` at these images again."""
        assert self.purifier.mask is not None
        return DefendedClassifier(self.purifier.with_mask(Seen(self.purifier.mask, image, mask)), self.classifier)

    def attention(self, image: Tensor, noise: Noise, temperature: float = 0.1) -> Tensor | None:
        """The mask as an attack on it may see it: ``Mask.relaxed``, (B, 1, H, W) in [0, 1], differentiable.

        ``None`` where no image can move the mask, or there is none.
        """
        rule = self.purifier.mask
        if rule is None or not rule.relaxable:
            return None
        return rule.relaxed(self.classifier, image, noise, temperature)
