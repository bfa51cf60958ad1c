"""ImageNet: folders named by WordNet id."""

from __future__ import annotations

from collections.abc import Sequence

from lit_purify.data.folder import ImageFolder
from lit_purify.models.classifier import imagenet_synsets


class ImageNet(ImageFolder):
    """ImageNet-1k in the layout of ``ImageFolder``, or any part of it, with folders named by WordNet id.

    A label is the position of the id among all 1,000, also when only some classes are there. All else is as in
    ``ImageFolder``.
    """

    def known_classes(self) -> Sequence[str]:
        """The 1,000 WordNet ids in the order of labels, which is alphabetical."""
        return imagenet_synsets()
