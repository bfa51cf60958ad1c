"""CIFAR-10 (Krizhevsky 2009)."""

from __future__ import annotations

from collections.abc import Sequence

from torchvision import datasets

from lit_purify.data.base import ImageDataset, shuffled
from lit_purify.data.folder import ImageFolder
from lit_purify.data.subset import Indices
from lit_purify.data.torchvision_files import TorchvisionFiles, from_arrays

_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class CIFAR10(TorchvisionFiles):
    """CIFAR-10 from torchvision's files, in the folder ``cifar-10-batches-py`` of ``root``.

    5,000 of the training images, drawn with ``RandomState(0)``, are the validation split.
    """

    def read(self, train: bool) -> ImageDataset:
        """All training images, or all test images."""
        found = self.open(datasets.CIFAR10, train=train)
        return from_arrays(found.data.transpose(0, 3, 1, 2), found.targets, _CLASSES)


class CIFAR10Folder(ImageFolder):
    """CIFAR-10 as image files, in folders ``train`` and ``test`` with one subfolder a class.

    Class folders are named airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck. A tenth of the
    training images, drawn with ``RandomState(split_seed)``, is the validation split, unless there is a folder ``val``.
    """

    def known_classes(self) -> Sequence[str]:
        """The ten classes."""
        return _CLASSES

    def order(self, labels: Indices) -> Indices:
        """Not by class: the networks that ship were trained without the images that this keeps back."""
        return shuffled(len(labels), self.split_seed)
