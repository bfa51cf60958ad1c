"""People's own images: any folder with one subfolder a class."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from lit_purify.data.base import ImageDataModule, ImageDataset, shuffled
from lit_purify.data.subset import Subset
from lit_purify.errors import InputError
from lit_purify.functional.images import resize


class ImageFolder(ImageDataModule):
    """Images in one subfolder a class.

    ``root`` holds folders ``train``, ``val`` (or ``valid``) and ``test``, each with one subfolder a class; or it holds
    the class folders itself and is split at random. A missing ``val`` is cut from ``train``; a missing ``test`` falls
    back on ``val`` when that exists.

    Args:
        root: The folder.
        size: Height and width: the shorter side is resized, the center cropped. ``None`` keeps images as they are.
        channels: 3 for color, 1 for gray.
        val_fraction: Part of the images cut off for validation where no folder gives it.
        test_fraction: Part of the images cut off for the test where no folder gives it.
        split_seed: Of the random split.
        batch_size: Samples a batch and process.
        num_workers: Processes that read images.
        subset: Which samples of the evaluated split count; ``None`` takes all.
        evaluate_on: The split that ``test`` reads.
        seed: Of the shuffling.
    """

    def __init__(
        self,
        root: Path,
        size: int | None = None,
        channels: int = 3,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        batch_size: int = 64,
        num_workers: int = 0,
        subset: Subset | None = None,
        evaluate_on: str = "test",
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, subset, evaluate_on, seed)
        if channels not in (1, 3):
            raise InputError(f"channels = {channels}: use 3 for color, 1 for gray")
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise InputError("val_fraction and test_fraction must not be negative and must leave images to train on")
        self.root, self.size, self.channels = Path(root), size, channels
        self.val_fraction, self.test_fraction, self.split_seed = val_fraction, test_fraction, split_seed

    @property
    def name(self) -> str:
        """Name of the folder."""
        return f"{type(self).__name__}({self.root.name})"

    def class_names(self, folders: Sequence[str]) -> Sequence[str]:
        """Names in the order of labels, given the class folders that exist."""
        return folders

    def split(self, name: str) -> ImageDataset:
        """One of the three splits."""
        if not self.root.is_dir():
            raise InputError(f"{self.root}: no such folder; give root a folder with one subfolder of images a class")
        named = {
            "train": self._first("train"),
            "val": self._first("val", "valid", "validation"),
            "test": self._first("test"),
        }
        if all(folder is None for folder in named.values()):
            return self._cut(self._scan(self.root), name, self.val_fraction, self.test_fraction)
        if named["test"] is None and name == "test":
            # As with ImageNet, whose test labels are not public.
            name = "val"
        folder = named[name]
        if folder is not None and (name != "train" or named["val"] is not None):
            return self._scan(folder)
        if named["train"] is None:
            raise InputError(f"{self.root}: has no folder {name}; it needs train, val and test, or class folders alone")
        return self._cut(self._scan(named["train"]), name, self.val_fraction, 0.0)

    def _first(self, *names: str) -> Path | None:
        return next((self.root / name for name in names if (self.root / name).is_dir()), None)

    def _cut(self, whole: ImageDataset, name: str, val: float, test: float) -> ImageDataset:
        order = shuffled(len(whole), self.split_seed)
        ends = np.cumsum([round(len(whole) * test), round(len(whole) * val)])
        part = dict(zip(("test", "val", "train"), np.split(order, ends), strict=True))[name]
        if not len(part):
            raise InputError(f"{self.root}: {len(whole)} images leave none for {name}; raise {name}_fraction")
        return whole.part(np.sort(part))

    def _scan(self, root: Path) -> ImageDataset:
        folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        classes = self.class_names(folders)
        files: list[Path] = []
        labels: list[int] = []
        for folder in folders:
            found = sorted(p for p in (root / folder).rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
            files += found
            labels += [classes.index(folder)] * len(found)
        if not files:
            raise InputError(f"{root}: no images in it; it needs one subfolder a class, with {', '.join(IMG_EXTENSIONS)}")
        return ImageDataset.whole(partial(_read_image, files, self.channels, self.size), labels, classes)


def _read_image(files: Sequence[Path], channels: int, size: int | None, item: int) -> Tensor:
    path = files[item]
    try:
        with Image.open(path) as file:
            pixels = np.array(file.convert("RGB" if channels == 3 else "L"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise InputError(f"{path}: cannot be read as an image; remove or replace it") from error
    image = torch.from_numpy(pixels).reshape(*pixels.shape[:2], channels).movedim(-1, 0).float().div(255.0)
    return image if size is None else resize(image[None], size)[0]
