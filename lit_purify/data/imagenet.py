"""ImageNet: folders named by WordNet id."""

from __future__ import annotations

from collections.abc import Sequence

from lit_purify.data.folder import ImageFolder
from lit_purify.errors import InputError
from lit_purify.models.classifier import imagenet_synsets


class ImageNet(ImageFolder):
    """ImageNet-1k in the ImageFolder layout, or any part of it, with folders named by WordNet id.

    A label is the position of the id among all 1,000, also when only some classes are there. All else as ``ImageFolder``.
    """

    def class_names(self, folders: Sequence[str]) -> Sequence[str]:
        """The 1,000 WordNet ids in the order of labels."""
        classes = imagenet_synsets()
        unknown = sorted(set(folders) - set(classes))
        if unknown:
            raise InputError(f"{self.root}: folder {unknown[0]!r} is not the WordNet id of an ImageNet class")
        return classes
