"""CIFAR-10 (Krizhevsky 2009)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets

from lit_purify.data.base import ImageDataset
from lit_purify.data.folder import ImageFolder
from lit_purify.data.torchvision_files import from_arrays, open_torchvision, train_or_val

_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class CIFAR10(ImageFolder):
    """CIFAR-10 from torchvision's files, or from folders ``train`` and ``test`` with one subfolder a class.

    Folders are named airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck. A tenth of the training
    images (5,000 of 50,000), drawn with ``RandomState(0)``, is the validation split, unless there is a folder ``val``.

    Args:
        root: Folder that holds ``cifar-10-batches-py``, or ``train`` and ``test``.
        download: Fetch torchvision's files when they are missing (needs a network).
        loading: As for every datamodule: batch_size, num_workers, subset, evaluate_on, seed.
    """

    def __init__(
        self,
        root: Path,
        download: bool = False,
        **loading: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(root, size=32, val_fraction=0.1, **loading)
        self.download = download

    @property
    def name(self) -> str:  # type: ignore[override]
        """With the name of the folder when the images lie in folders: they may differ from the original ones."""
        return super().name if self._in_folders else "CIFAR10"

    def known_classes(self) -> Sequence[str]:
        """The ten classes."""
        return _CLASSES

    def prepare_data(self) -> None:
        """Downloads in one process, before the others look."""
        if self.download and not self._in_folders:
            self._open(train=False)

    def split(self, name: str) -> ImageDataset:
        """One of the three splits."""
        if self._in_folders:
            return super().split(name)
        found = self._open(train=name != "test")
        whole = from_arrays(np.ascontiguousarray(found.data.transpose(0, 3, 1, 2)), np.array(found.targets), _CLASSES)
        return whole if name == "test" else train_or_val(whole, name)

    @property
    def _in_folders(self) -> bool:
        return any((self.root / name).is_dir() for name in ("train", "test"))

    def _open(self, train: bool) -> datasets.CIFAR10:
        return open_torchvision(datasets.CIFAR10, self.root, self.download, train=train)
