"""Folders of images whose classes are known: ImageNet and CIFAR-10."""

from __future__ import annotations

from collections.abc import Sequence

from lit_purify.data.base import shuffled
from lit_purify.data.folder import ImageFolder
from lit_purify.data.subset import Indices
from lit_purify.data.torchvision_files import CIFAR10_CLASSES
from lit_purify.models.classifier import imagenet_synsets


class ImageNet(ImageFolder):
    """ImageNet-1k in the layout of ``ImageFolder``, or any part of it, with folders named by WordNet id.

    A label is the position of the id among all 1,000, also when only some classes are there. All else is as in
    ``ImageFolder``: a folder that holds ``val`` alone is enough for an evaluation; ``size: 224, resize: 256`` is how
    classifiers are mostly tested, ``size: 256`` what 256x256 diffusion networks take. Between the two stands
    ``ResizedPurifier``.
    """

    def known_classes(self) -> Sequence[str]:
        """The 1,000 WordNet ids in the order of labels, which is alphabetical."""
        return imagenet_synsets()


class CIFAR10Folder(ImageFolder):
    """CIFAR-10 as image files, in folders ``train`` and ``test`` with one subfolder a class.

    Class folders are named airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck. A tenth of the
    training images, drawn with ``RandomState(split_seed)``, is the validation split, unless there is a folder ``val``.
    """

    def known_classes(self) -> Sequence[str]:
        """The ten classes."""
        return CIFAR10_CLASSES

    def order(self, labels: Indices) -> Indices:
        """Not by class: the networks that ship were trained without the images that this keeps back."""
        return shuffled(len(labels), self.split_seed)
