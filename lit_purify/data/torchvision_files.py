"""Datasets in the files that torchvision reads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_purify.data.base import ImageDataset, shuffled
from lit_purify.data.subset import Indices
from lit_purify.errors import InputError

VAL = 5000
"""Training images kept back for validation, drawn with ``RandomState(0)``."""


def open_torchvision(make: Callable[..., Any], root: Path, download: bool, **options: Any) -> Any:  # noqa: ANN401
    """A torchvision dataset, or an ``InputError`` that says what to do."""
    folders = "or give a root with folders train and test of images, one subfolder a class, and download: false"
    try:
        return make(root, download=download, **options)
    except RuntimeError as error:
        if not download and not root.is_dir():
            raise InputError(f"{root}: no such folder; check data.init_args.root") from error
        remedy = "remove its files and try again" if download else "set download: true to fetch them"
        raise InputError(f"{root}: files of {make.__name__} are missing or damaged; {remedy}, {folders}") from error
    except OSError as error:
        raise InputError(
            f"{root}: {make.__name__} cannot be fetched or read ({error}); try again, {folders}"
        ) from error


def from_arrays(images: np.ndarray[Any, Any], labels: Indices, classes: list[str]) -> ImageDataset:
    """A split from uint8 images (n, C, H, W)."""
    return ImageDataset.whole(partial(_read_array, images), labels, classes)


def train_or_val(whole: ImageDataset, name: str) -> ImageDataset:
    """The training images without the validation images (``name`` = ``train``), or the latter (``val``)."""
    order = shuffled(len(whole), 0)
    # Files with fewer images than the originals keep a tenth back.
    val = min(VAL, len(whole) // 10)
    return whole.part(np.sort(order[:val] if name == "val" else order[val:]))


def _read_array(images: np.ndarray[Any, Any], item: int) -> Tensor:
    return torch.from_numpy(images[item]).float().div(255.0)
