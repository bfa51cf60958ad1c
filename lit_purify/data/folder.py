"""Your own images: a folder with one subfolder per class."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from typing_extensions import override

from lit_purify.data.base import ImageDataModule, ImageDataset, shuffled
from lit_purify.data.subset import Indices, Subset
from lit_purify.errors import InputError, notice
from lit_purify.functional.images import resize

IMAGE_KINDS = (*IMG_EXTENSIONS, ".gif", ".jfif", ".avif")
"""File name extensions of images. Pillow also opens .mpg, .h5 and .pdf, but does not return their pixels."""
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


class ImageFolder(ImageDataModule):
    """Images in one subfolder per class.

    ``root`` has folders ``train`` (or ``training``), ``val`` (``valid``, ``validation``) and ``test`` (``testing``), in
    any case, each with one subfolder per class; or it has the class folders itself. Missing splits are made as follows:

    - Class folders alone, or ``train`` alone: ``test_fraction`` and ``val_fraction`` of the images of each class, drawn
      with ``RandomState(split_seed)``, become the test and the validation split. The rest is the training split.
    - ``train`` and ``test``: the validation split is cut from ``train`` in the same way.
    - ``train`` and ``val``: the test reads ``val``.

    Labels number the class folders of all splits together, sorted by name. Images may be nested inside a class folder;
    hidden files and folders are ignored. As in torchvision, EXIF orientation is ignored. Transparent pixels become
    white.

    Args:
        root: The folder.
        size: Height and width: the shorter side is resized and the center cropped. ``None`` keeps images unchanged;
            they must then have one size.
        resize: Size of the shorter side before the center crop, at least ``size``; ``None`` is ``size``. ImageNet
            classifiers are usually tested with ``size: 224, resize: 256``.
        channels: 3 for color, 1 for gray.
        val_fraction: Fraction of the images for validation if there is no such folder.
        test_fraction: Fraction of the images for the test if there is no such folder; 1 (with val_fraction 0) tests on
            all.
        split_seed: Seed of the random split.
        splits: Whether folders named like splits are splits (true) or classes (false); ``None`` decides if only one is
            possible.
        batch_size: See ``ImageDataModule``, as for all further arguments.
    """

    # A folder counts by its file names.
    irrelevant = ImageDataModule.irrelevant | {"root"}

    def __init__(
        self,
        root: str | Path,
        size: int | None = None,
        channels: int = 3,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        resize: int | None = None,
        splits: bool | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        subset: Subset | None = None,
        evaluate_on: str = "test",
        seed: int = 0,
        val_subset: Subset | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, subset, evaluate_on, seed, val_subset)
        if channels not in (1, 3):
            raise InputError(f"channels = {channels}: use 3 for color, 1 for gray")
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction > 1:
            raise InputError(
                f"val_fraction = {val_fraction}, test_fraction = {test_fraction}: use fractions that sum to at most 1"
            )
        if resize is not None and (size is None or resize < size):
            raise InputError(f"resize = {resize}, size = {size}: resize needs a size, which is at most resize")
        self.root, self.size, self.channels, self.resize = Path(root).expanduser(), size, channels, resize
        self.val_fraction, self.test_fraction, self.split_seed = val_fraction, test_fraction, split_seed
        self.splits = splits

    @property
    def name(self) -> str:  # type: ignore[override]
        """Class and name of the folder, for reports."""
        return f"{type(self).__name__}({_shown(self.root.resolve().name)})"

    @property
    def names_sha256(self) -> str:
        """Hash of the file names of the evaluated split: one file more or less changes all positions.

        Contents do not count, so a damaged file may be replaced.
        """
        folder = self._folder(self.evaluate_on)
        listing = b"".join(os.fsencode(file.relative_to(folder)) + b"\n" for file in find_files(folder, IMAGE_KINDS))
        return hashlib.sha256(listing).hexdigest()

    def known_classes(self) -> Sequence[str] | None:
        """Returns the classes in label order if the dataset defines them; ``None`` uses the folders, sorted by name."""
        return None

    def order(self, labels: Indices) -> Indices:
        """Returns the order from which splits are cut, so that each cut has its share of every class."""
        drawn = shuffled(len(labels), self.split_seed)
        by_class = drawn[np.argsort(labels[drawn], kind="stable")]
        counts = np.unique(labels, return_counts=True)[1]
        place = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
        # Images of several classes with the same place are in random order.
        return by_class[np.lexsort((np.argsort(drawn)[by_class], place))]

    @override
    def split(self, name: str) -> ImageDataset:
        folders, whole = self._folders(), self._scan(self._folder(name))
        if name != "train" and name in folders:
            return whole
        shares = {"test": self.test_fraction, "val": self.val_fraction}
        ends = np.cumsum([0 if part in folders else round(len(whole) * share) for part, share in shares.items()])
        cut = dict(zip((*shares, "train"), np.split(self.order(whole.labels), ends), strict=True))[name]
        if not len(cut):
            raise InputError(
                f"{self.root}: of {len(whole)} images none are left for {name}: change val_fraction = "
                f"{self.val_fraction} or test_fraction = {self.test_fraction}"
            )
        return whole.part(np.sort(cut))

    def _folders(self) -> dict[str, Path]:
        """Returns the folder of each split; class folders alone are ``train``.

        Raises:
            InputError: There is no such folder, or a folder could be a split as well as a class.
        """
        if not self.root.is_dir():
            raise InputError(f"{self.root}: no such folder: set root to a folder with one subfolder per class")
        if self.splits is False:
            return {"train": self.root}
        found: dict[str, Path] = {}
        for entry in sorted(filter(_is_class, self.root.iterdir())):
            key = next((key for key, names in _SPLITS.items() if entry.name.lower() in names), entry.name)
            if key in found:
                raise InputError(
                    f"{self.root}: {found[key].name} and {entry.name} may both be the {key} split: rename one, or set "
                    "splits: false if they are classes"
                )
            found[key] = entry
        splits = {key: entry for key, entry in found.items() if key in _SPLITS}
        others = [key for key, entry in found.items() if key not in splits and any(_walk(entry, IMAGE_KINDS))]
        if splits and others and self.splits is None and self.known_classes() is None:
            raise InputError(
                f"{self.root}: {next(iter(splits.values())).name} may be a split or, like {others[0]}, a class: "
                "set splits: true or splits: false"
            )
        if "val" in splits:
            # As with ImageNet, whose test labels are not public.
            splits.setdefault("test", splits["val"])
        return splits or {"train": self.root}

    def _folder(self, name: str) -> Path:
        """Returns the folder that a split is, or is cut from."""
        folders = self._folders()
        if name not in folders and "train" not in folders:
            raise InputError(f"{self.root}: has no folder {name}: add train, val and test, or use class folders alone")
        return folders.get(name, folders.get("train", self.root))

    def _classes(self) -> Sequence[str]:
        """Returns the classes of all splits together, so that labels agree between splits."""
        folders = self._folders().values()
        present = sorted({entry.name for folder in folders for entry in folder.iterdir() if _is_class(entry)})
        known = self.known_classes()
        unknown = [name for name in present if known is not None and name not in known]
        if unknown:
            raise InputError(f"{self.root}: folder {unknown[0]!r} is not a class of {type(self).__name__}: rename it")
        return present if known is None else known

    def _scan(self, folder: Path) -> ImageDataset:
        classes = self._classes()
        files = {name: find_files(folder / name) for name in classes}
        images = {name: [file for file in found if _is_image(file)] for name, found in files.items()}
        if not any(images.values()):
            if any(file.parent == folder for file in find_files(folder, IMAGE_KINDS)):
                raise InputError(
                    f"{folder}: its images are in no class folders: move the images of each class into a subfolder"
                    + ("" if folder == self.root else f", or set splits: false if {folder.name} is a class")
                )
            kinds = ", ".join(IMAGE_KINDS)
            raise InputError(f"{folder}: has no images: give it one subfolder per class, with {kinds}")
        others = Counter(file.suffix for name in classes for file in files[name] if not _is_image(file))
        if others:
            kinds = ", ".join(f"{count} {suffix or 'without extension'}" for suffix, count in others.most_common(5))
            notice(f"{folder}: ignored files that are not images: {kinds}")
        if empty := [name for name in classes if not images[name] and (folder / name).is_dir()]:
            notice(f"{folder}: class folders without images: {', '.join(map(_shown, empty[:5]))}")
        paths = [file for found in images.values() for file in found]
        labels = [label for label, found in enumerate(images.values()) for _ in found]
        read = partial(_read_item, paths, self.channels, self.size, self.resize)
        return ImageDataset.whole(read, labels, [_shown(name) for name in classes])


def _is_class(entry: Path) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _is_image(file: Path) -> bool:
    return file.name.lower().endswith(IMAGE_KINDS)


def _shown(name: str) -> str:
    """Replaces bytes of a name that are not UTF-8, for output."""
    return os.fsencode(name).decode(errors="replace")


def find_files(folder: Path, kinds: tuple[str, ...] = ("",)) -> list[Path]:
    """Returns files at any depth, in the same order on every file system, without hidden files and folders."""
    return sorted(_walk(folder, kinds))


def _walk(folder: Path, kinds: tuple[str, ...]) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, followlinks=True):
        # Links to a parent folder are skipped, since following them would not end.
        above = {Path(parent).resolve(), *Path(parent).resolve().parents}
        folders[:] = [name for name in folders if name[0] != "." and Path(parent, name).resolve() not in above]
        yield from (Path(parent, name) for name in files if name.lower().endswith(kinds) and name[0] != ".")


def _read_item(files: Sequence[Path], channels: int, size: int | None, shorter: int | None, item: int) -> Tensor:
    # Without EXIF orientation, as in torchvision and hence in the training of published classifiers.
    return read_image(files[item], channels, size, shorter, turn=False)


def read_image(
    path: Path, channels: int, size: int | None = None, shorter: int | None = None, turn: bool = True
) -> Tensor:
    """Reads an image (C, H, W) in [0, 1], with transparent pixels on white.

    ``turn`` applies the EXIF orientation; ``size`` resizes the image (``functional.images.resize``).

    Raises:
        InputError: The file is not an image, is damaged, or has more than 8 bits.
    """
    with open_image(path) as file:
        try:
            file.load()
            shown = ImageOps.exif_transpose(file) if turn else file
            if shown.has_transparency_data:
                white = Image.new("RGBA", shown.size, "white")
                shown = Image.alpha_composite(white, shown.convert("RGBA"))
            pixels = np.array(shown.convert("RGB" if channels == 3 else "L"))
        except Exception as error:  # a damaged file can make Pillow raise nearly any exception
            raise _unreadable(path) from error
    image = torch.from_numpy(pixels).reshape(*pixels.shape[:2], channels).movedim(-1, 0).float().div(255.0)
    return image if size is None else resize(image[None], size, shorter)[0]


def open_image(path: Path) -> Image.Image:
    """Opens an image without reading its pixels.

    Raises:
        InputError: ``read_image`` cannot read this kind of file.
    """
    try:
        file = Image.open(path)
    except Exception as error:  # see ``read_image``
        raise _unreadable(path) from error
    if file.mode.startswith(("I", "F")):
        file.close()
        raise InputError(f"{path}: gray with more than 8 bits, which would be clipped: save it with 8 bits")
    return file


def _unreadable(path: Path) -> InputError:
    return InputError(f"{path}: cannot be read as an image: remove or replace it")
