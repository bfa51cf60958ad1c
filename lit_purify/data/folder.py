"""People's own images: any folder with one subfolder a class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from lit_purify.data.base import ImageDataModule, ImageDataset, shuffled
from lit_purify.errors import InputError
from lit_purify.functional.images import resize

_FOLDERS = {"train": ["train"], "val": ["val", "valid", "validation"], "test": ["test"]}


class ImageFolder(ImageDataModule):
    """Images in one subfolder a class.

    ``root`` holds folders ``train``, ``val`` (or ``valid``, ``validation``) and ``test``, each with one subfolder a
    class; or it holds the class folders itself. What is missing is made thus:

    - class folders alone, or ``train`` alone: ``test_fraction`` and ``val_fraction`` of the images, drawn with
      ``RandomState(split_seed)``, are the test and the validation split, the rest is the training split;
    - ``train`` and ``test``: the validation split is cut from ``train`` in the same way;
    - ``train`` and ``val``: the test reads ``val``.

    Labels count the class folders of all splits together, sorted by name. Images may lie deeper inside a class folder;
    hidden files and folders are ignored. Images are read as torchvision reads them, not turned as their EXIF says, but
    that what is transparent shows white.

    Args:
        root: The folder.
        size: Height and width: the shorter side is resized, the center cropped. ``None`` keeps images as they are; they
            must then have one size.
        resize: What the shorter side is resized to before the center is cropped, at least ``size``; ``None`` is
            ``size``. Classifiers of ImageNet are mostly tested with ``size: 224, resize: 256``.
        channels: 3 for color, 1 for gray.
        val_fraction: Part of the images cut off for validation where no folder gives it.
        test_fraction: Part of the images cut off for the test where no folder gives it; 1 (with val_fraction 0) tests
            on all.
        split_seed: Of the random split.
        loading: As for every datamodule: batch_size, num_workers, subset, evaluate_on, seed.
    """

    def __init__(
        self,
        root: Path,
        size: int | None = None,
        channels: int = 3,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        resize: int | None = None,
        **loading: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**loading)
        if channels not in (1, 3):
            raise InputError(f"channels = {channels}: use 3 for color, 1 for gray")
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction > 1:
            raise InputError(
                f"val_fraction = {val_fraction}, test_fraction = {test_fraction}: use parts of 1 that add to at most 1"
            )
        if resize is not None and (size is None or resize < size):
            raise InputError(
                f"resize = {resize}, size = {size}: the center of size is cropped: give size, at most resize"
            )
        self.root, self.size, self.channels, self.resize = Path(root).expanduser(), size, channels, resize
        self.val_fraction, self.test_fraction, self.split_seed = val_fraction, test_fraction, split_seed

    @property
    def name(self) -> str:  # type: ignore[override]
        """With the name of the folder."""
        return f"{type(self).__name__}({self.root.resolve().name})"

    @property
    def names_sha256(self) -> str:
        """Of the images that the evaluated split is read from: one more or less gives others to all positions.

        What is in the files is not looked at: a damaged one may be replaced.
        """
        folder = self._first([*_FOLDERS[self.evaluate_on], *(_FOLDERS["val"] if self.evaluate_on == "test" else [])])
        root = folder or self.root
        listing = "".join(f"{file.relative_to(root)}\n" for file in find_files(root, IMG_EXTENSIONS))
        return hashlib.sha256(listing.encode()).hexdigest()

    def known_classes(self) -> Sequence[str] | None:
        """Classes in the order of labels where the dataset fixes them; ``None`` takes the folders, sorted by name."""
        return None

    def split(self, name: str) -> ImageDataset:
        """One of the three splits."""
        if not self.root.is_dir():
            raise InputError(f"{self.root}: no such folder; give root a folder with one subfolder of images a class")
        folders = {key: found for key, names in _FOLDERS.items() if (found := self._first(names))}
        folders = folders or {"train": self.root}
        classes = self._classes(folders.values())
        if name == "test" and "test" not in folders and "val" in folders:
            # As with ImageNet, whose test labels are not public.
            name = "val"
        if name in folders and name != "train":
            return self._scan(folders[name], classes)
        if "train" not in folders:
            raise InputError(f"{self.root}: has no folder {name}; it needs train, val and test, or class folders alone")
        val = 0.0 if "val" in folders else self.val_fraction
        test = 0.0 if "val" in folders or "test" in folders else self.test_fraction
        return self._cut(self._scan(folders["train"], classes), name, val, test)

    def _first(self, names: Sequence[str]) -> Path | None:
        return next((self.root / name for name in names if (self.root / name).is_dir()), None)

    def _classes(self, folders: Iterable[Path]) -> Sequence[str]:
        """Of all splits together, so that a label means the same in each."""
        present = sorted({entry.name for folder in folders for entry in folder.iterdir() if _is_class(entry)})
        known = self.known_classes()
        unknown = [name for name in present if known is not None and name not in known]
        if unknown:
            raise InputError(f"{self.root}: folder {unknown[0]!r} is not a class of {type(self).__name__}")
        return present if known is None else known

    def _cut(self, whole: ImageDataset, name: str, val: float, test: float) -> ImageDataset:
        ends = np.cumsum([round(len(whole) * test), round(len(whole) * val)])
        parts = np.split(shuffled(len(whole), self.split_seed), ends)
        part = dict(zip(("test", "val", "train"), parts, strict=True))[name]
        if not len(part):
            raise InputError(
                f"{self.root}: of {len(whole)} images none are left for {name}; change val_fraction = "
                f"{self.val_fraction} or test_fraction = {self.test_fraction}"
            )
        return whole.part(np.sort(part))

    def _scan(self, folder: Path, classes: Sequence[str]) -> ImageDataset:
        found = [
            (file, label) for label, name in enumerate(classes) for file in find_files(folder / name, IMG_EXTENSIONS)
        ]
        if not found:
            if any(file.parent == folder for file in find_files(folder, IMG_EXTENSIONS)):
                raise InputError(
                    f"{folder}: its images lie in no class folders; move those of each class into a subfolder"
                )
            kinds = ", ".join(IMG_EXTENSIONS)
            raise InputError(f"{folder}: no images in it; it needs one subfolder a class, with {kinds}")
        files, labels = zip(*found, strict=True)
        return ImageDataset.whole(partial(_read_item, files, self.channels, self.size, self.resize), labels, classes)


def _is_class(entry: Path) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def find_files(folder: Path, extensions: tuple[str, ...] = ("",)) -> list[Path]:
    """Files at any depth, in the same order on every file system; hidden files and folders do not count."""
    found: list[Path] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        # A link to a folder above would be followed for ever.
        above = {Path(parent).resolve(), *Path(parent).resolve().parents}
        folders[:] = [name for name in folders if name[0] != "." and Path(parent, name).resolve() not in above]
        found += [Path(parent, name) for name in files if name.lower().endswith(extensions) and name[0] != "."]
    return sorted(found)


def _read_item(files: Sequence[Path], channels: int, size: int | None, shorter: int | None, item: int) -> Tensor:
    # As torchvision reads them, and so what published classifiers were trained on.
    return read_image(files[item], channels, size, shorter, turn=False)


def read_image(
    path: Path, channels: int, size: int | None = None, shorter: int | None = None, turn: bool = True
) -> Tensor:
    """An image (C, H, W) in [0, 1], what is transparent on white.

    With ``turn``, turned upright as its EXIF says; with a ``size``, resized to that (``functional.images.resize``).

    Raises:
        InputError: The file is not an image, is damaged, or has more than 8 bits.
    """
    with open_image(path) as file:
        try:
            shown = ImageOps.exif_transpose(file) if turn else file
            if shown.has_transparency_data:
                white = Image.new("RGBA", shown.size, "white")
                shown = Image.alpha_composite(white, shown.convert("RGBA"))
            pixels = np.array(shown.convert("RGB" if channels == 3 else "L"))
        except _UNREADABLE as error:
            raise _unreadable(path) from error
    image = torch.from_numpy(pixels).reshape(*pixels.shape[:2], channels).movedim(-1, 0).float().div(255.0)
    return image if size is None else resize(image[None], size, shorter)[0]


def open_image(path: Path) -> Image.Image:
    """An image whose pixels are not read yet.

    Raises:
        InputError: Its beginning says that ``read_image`` would refuse it.
    """
    try:
        file = Image.open(path)
    except _UNREADABLE as error:
        raise _unreadable(path) from error
    if file.mode.startswith(("I", "F")):
        file.close()
        raise InputError(f"{path}: gray with more than 8 bits, which would be clipped; save it with 8 bits")
    return file


_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def _unreadable(path: Path) -> InputError:
    return InputError(f"{path}: cannot be read as an image; remove or replace it")
