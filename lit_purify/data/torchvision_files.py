"""CIFAR-10 (Krizhevsky 2009) and SVHN (Netzer et al. 2011), in torchvision's files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import datasets
from typing_extensions import override

from lit_purify.data.base import ImageDataModule, ImageDataset, shuffled
from lit_purify.data.subset import Subset
from lit_purify.errors import InputError

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
_VAL = 5000
"""Number of training images used for validation, drawn with ``RandomState(0)``."""


class TorchvisionFiles(ImageDataModule):
    """A dataset that torchvision reads from its own files.

    Args:
        root: Folder of the files.
        download: Download missing files.
        batch_size: See ``ImageDataModule``, as for all further arguments.
    """

    # The files of a version are always the same.
    irrelevant = ImageDataModule.irrelevant | {"root", "download"}

    def __init__(
        self,
        root: str | Path,
        download: bool = False,
        batch_size: int = 64,
        num_workers: int = 0,
        subset: Subset | None = None,
        evaluate_on: str = "test",
        seed: int = 0,
        val_subset: Subset | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, subset, evaluate_on, seed, val_subset)
        self.root, self.download = Path(root).expanduser(), download

    @abstractmethod
    def read(self, train: bool) -> ImageDataset:
        """Reads all training images or all test images."""

    def prepare_data(self) -> None:
        """Downloads in one process, before the others read."""
        if self.download:
            self.read(train=True)
            self.read(train=False)

    @override
    def split(self, name: str) -> ImageDataset:
        whole = self.read(train=name != "test")
        if name == "test":
            return whole
        order = shuffled(len(whole), 0)
        # For files with fewer images than the originals, a tenth is used for validation.
        val = min(_VAL, len(whole) // 10)
        return whole.part(np.sort(order[:val] if name == "val" else order[val:]))

    def open(self, make: Callable[..., Any], **options: Any) -> Any:  # noqa: ANN401
        """Opens a torchvision dataset, or raises an ``InputError`` with a remedy."""
        try:
            return make(self.root, download=self.download, **options)
        except (RuntimeError, OSError) as error:
            if not self.download and not self.root.is_dir():
                raise InputError(f"{self.root}: no such folder: check the root of the data") from error
            damaged = isinstance(error, RuntimeError)
            remedy = "remove its files and try again" if self.download else "set download: true to fetch them"
            raise InputError(
                f"{self.root}: files of {make.__name__} are missing or damaged{'' if damaged else f' ({error})'}; "
                f"{remedy}, or use ImageFolder for a root with folders train and test, one subfolder per class"
            ) from error


class CIFAR10(TorchvisionFiles):
    """CIFAR-10 from torchvision's files, in the folder ``cifar-10-batches-py`` of ``root``.

    5,000 of the training images, drawn with ``RandomState(0)``, are the validation split.
    """

    @override
    def read(self, train: bool) -> ImageDataset:
        found = self.open(datasets.CIFAR10, train=train)
        images = torch.from_numpy(found.data).movedim(-1, 1).contiguous()
        return ImageDataset.of(images, torch.tensor(found.targets), CIFAR10_CLASSES)


class SVHN(TorchvisionFiles):
    """Street View House Numbers, cropped digits, from torchvision's files ``train_32x32.mat`` and ``test_32x32.mat``.

    5,000 of the training images, drawn with ``RandomState(0)``, are the validation split.
    """

    @override
    def read(self, train: bool) -> ImageDataset:
        found = self.open(datasets.SVHN, split="train" if train else "test")
        return ImageDataset.of(
            torch.from_numpy(found.data), torch.from_numpy(found.labels), [str(c) for c in range(10)]
        )
