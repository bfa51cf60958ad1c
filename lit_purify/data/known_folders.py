"""Image folders with known classes: ImageNet and CIFAR-10."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from lit_purify.data.base import shuffled
from lit_purify.data.folder import ImageFolder
from lit_purify.data.subset import Indices
from lit_purify.data.torchvision_files import CIFAR10_CLASSES
from lit_purify.models.classifier import imagenet_synsets


class ImageNet(ImageFolder):
    """ImageNet-1k in the layout of ``ImageFolder``, or any part of it, with folders named by WordNet id.

    A label is the position of the id among all 1,000, even if only some classes are present. A folder with ``val``
    alone suffices for an evaluation. Classifiers are usually tested with ``size: 224, resize: 256``, while 256x256
    diffusion networks take ``size: 256``; ``ResizedPurifier`` connects the two.
    """

    def known_classes(self) -> Sequence[str]:
        """Returns the 1,000 WordNet ids in label order, which is alphabetical."""
        return imagenet_synsets()


class CIFAR10Folder(ImageFolder):
    """CIFAR-10 as image files, in folders ``train`` and ``test`` with one subfolder per class.

    Class folders are airplane, automobile, bird, cat, deer, dog, frog, horse, ship and truck. Without a folder ``val``,
    a tenth of the training images, drawn with ``RandomState(split_seed)``, is the validation split.
    """

    @override
    def known_classes(self) -> Sequence[str]:
        return CIFAR10_CLASSES

    def order(self, labels: Indices) -> Indices:
        """Returns a plain permutation: the shipped networks were trained without the images that it holds out."""
        return shuffled(len(labels), self.split_seed)
