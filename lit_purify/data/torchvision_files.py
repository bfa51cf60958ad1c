"""Datasets in the files that torchvision reads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_purify.data.base import ImageDataModule, ImageDataset, shuffled
from lit_purify.data.subset import Subset
from lit_purify.errors import InputError

VAL = 5000
"""Training images kept back for validation, drawn with ``RandomState(0)``."""


class TorchvisionFiles(ImageDataModule):
    """A dataset whose training and test images torchvision reads from files of its own.

    Args:
        root: Folder that holds the files.
        download: Fetch them when they are missing (needs a network).
        batch_size: See ``ImageDataModule``, as for all that follow.
        num_workers: Processes that read images.
        subset: Which samples of the evaluated split count.
        evaluate_on: The split that is evaluated.
        seed: Of the shuffling.
        val_subset: Which samples a training is validated on.
    """

    def __init__(
        self,
        root: Path,
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
        """All training images, or all test images."""

    def prepare_data(self) -> None:
        """Downloads in one process, before the others look."""
        if self.download:
            self.read(train=True)
            self.read(train=False)

    def split(self, name: str) -> ImageDataset:
        """One of the three splits."""
        whole = self.read(train=name != "test")
        return whole if name == "test" else train_or_val(whole, name)

    def open(self, make: Callable[..., Any], **options: Any) -> Any:  # noqa: ANN401
        """A torchvision dataset, or an ``InputError`` that says what to do."""
        folders = "or use ImageFolder for a root with folders train and test of images, one subfolder a class"
        try:
            return make(self.root, download=self.download, **options)
        except RuntimeError as error:
            if not self.download and not self.root.is_dir():
                raise InputError(f"{self.root}: no such folder; check the root of the data") from error
            remedy = "remove its files and try again" if self.download else "set download: true to fetch them"
            raise InputError(
                f"{self.root}: files of {make.__name__} are missing or damaged; {remedy}, {folders}"
            ) from error
        except OSError as error:
            raise InputError(
                f"{self.root}: {make.__name__} cannot be fetched or read ({error}); try again, {folders}"
            ) from error


def from_arrays(images: np.ndarray[Any, Any], labels: Any, classes: list[str]) -> ImageDataset:  # noqa: ANN401
    """A split from uint8 images (n, C, H, W)."""
    return ImageDataset.whole(partial(_read_array, np.ascontiguousarray(images)), labels, classes)


def train_or_val(whole: ImageDataset, name: str) -> ImageDataset:
    """The training images without the validation images (``name`` = ``train``), or the latter (``val``)."""
    order = shuffled(len(whole), 0)
    # Files with fewer images than the originals keep a tenth back.
    val = min(VAL, len(whole) // 10)
    return whole.part(np.sort(order[:val] if name == "val" else order[val:]))


def _read_array(images: np.ndarray[Any, Any], item: int) -> Tensor:
    return torch.from_numpy(images[item]).float().div(255.0)
