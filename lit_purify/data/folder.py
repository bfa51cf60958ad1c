"""People's own images: any folder with one subfolder a class."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from lit_purify.data.base import ImageDataModule, ImageDataset, shuffled
from lit_purify.data.subset import Indices, Subset
from lit_purify.errors import InputError, notice
from lit_purify.functional.images import resize

IMAGE_KINDS = (*IMG_EXTENSIONS, ".gif", ".jfif", ".avif")
"""Endings of the files that are images. Pillow also opens .mpg, .h5 and .pdf, but not to give their pixels."""
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_UPRIGHT = dict(enumerate((*(Image.Transpose(k) for k in (0, 3, 1, 5, 4, 6, 2)),), start=2))
"""What turns an image upright, by the orientation in its EXIF."""


class ImageFolder(ImageDataModule):
    """Images in one subfolder a class.

    ``root`` holds folders ``train`` (or ``training``), ``val`` (``valid``, ``validation``) and ``test`` (``testing``),
    in capitals or not, each with one subfolder a class; or it holds the class folders itself. Missing splits are made
    like this:

    - class folders alone, or ``train`` alone: ``test_fraction`` and ``val_fraction`` of the images of each class, drawn
      with ``RandomState(split_seed)``, are the test and the validation split, the rest is the training split;
    - ``train`` and ``test``: the validation split is cut from ``train`` in the same way;
    - ``train`` and ``val``: the test reads ``val``.

    Labels count the class folders of all splits together, sorted by name. Images may lie deeper inside a class folder;
    hidden files and folders are ignored. Images are read as torchvision reads them: EXIF does not turn them.
    Transparent pixels become white.

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
        splits: Whether folders named like splits are splits, or classes; ``None`` decides where only one is possible.
        batch_size: See ``ImageDataModule``, as for all that follow.
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
                f"val_fraction = {val_fraction}, test_fraction = {test_fraction}: use parts of 1 that add to at most 1"
            )
        if resize is not None and (size is None or resize < size):
            raise InputError(
                f"resize = {resize}, size = {size}: the center of size is cropped: give size, at most resize"
            )
        self.root, self.size, self.channels, self.resize = Path(root).expanduser(), size, channels, resize
        self.val_fraction, self.test_fraction, self.split_seed = val_fraction, test_fraction, split_seed
        self.splits = splits

    @property
    def name(self) -> str:  # type: ignore[override]
        """With the name of the folder."""
        return f"{type(self).__name__}({_shown(self.root.resolve().name)})"

    @property
    def names_sha256(self) -> str:
        """Of the images that the evaluated split is read from: one more or less gives others to all positions.

        What is in the files is not looked at: a damaged one may be replaced.
        """
        folder = self._read_for(self.evaluate_on)[0]
        listing = b"".join(os.fsencode(file.relative_to(folder)) + b"\n" for file in find_files(folder, IMAGE_KINDS))
        return hashlib.sha256(listing).hexdigest()

    def known_classes(self) -> Sequence[str] | None:
        """Classes in the order of labels where the dataset fixes them; ``None`` takes the folders, sorted by name."""
        return None

    def order(self, labels: Indices) -> Indices:
        """The order from which test, validation and training images are cut: each cut has its share of every class."""
        drawn = shuffled(len(labels), self.split_seed)
        by_class = drawn[np.argsort(labels[drawn], kind="stable")]
        counts = np.unique(labels, return_counts=True)[1]
        place = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
        # Where images of several classes have the same place, they are in the order drawn.
        return by_class[np.lexsort((np.argsort(drawn)[by_class], place))]

    def split(self, name: str) -> ImageDataset:
        """One of the three splits."""
        folder, part = self._read_for(name)
        whole = self._scan(folder, self._classes())
        if part is None:
            return whole
        folders = self._folders()
        val = 0.0 if "val" in folders else self.val_fraction
        test = 0.0 if "val" in folders or "test" in folders else self.test_fraction
        ends = np.cumsum([round(len(whole) * test), round(len(whole) * val)])
        cut = dict(zip(("test", "val", "train"), np.split(self.order(whole.labels), ends), strict=True))[part]
        if not len(cut):
            raise InputError(
                f"{self.root}: of {len(whole)} images none are left for {part}; change val_fraction = "
                f"{self.val_fraction} or test_fraction = {self.test_fraction}"
            )
        return whole.part(np.sort(cut))

    def _folders(self) -> dict[str, Path]:
        """The folder of each split; class folders alone are ``train``.

        Raises:
            InputError: There is no such folder, or one folder may be a split as well as a class.
        """
        if not self.root.is_dir():
            raise InputError(f"{self.root}: no such folder; give root a folder with one subfolder of images a class")
        if self.splits is False:
            return {"train": self.root}
        found: dict[str, Path] = {}
        for entry in sorted(filter(_is_class, self.root.iterdir())):
            key = next((key for key, names in _SPLITS.items() if entry.name.lower() in names), entry.name)
            if key in found:
                raise InputError(
                    f"{self.root}: {found[key].name} and {entry.name} may both be the {key} split; rename one, or give "
                    "splits: false if they are classes"
                )
            found[key] = entry
        splits = {key: entry for key, entry in found.items() if key in _SPLITS}
        others = [key for key, entry in found.items() if key not in splits and any(_walk(entry, IMAGE_KINDS))]
        if splits and others and self.splits is None and self.known_classes() is None:
            raise InputError(
                f"{self.root}: is {next(iter(splits.values())).name} a split or, as {others[0]} beside it, a class? "
                "give splits: true or splits: false"
            )
        return splits or {"train": self.root}

    def _read_for(self, name: str) -> tuple[Path, str | None]:
        """The folder that a split is read from, and which part of it the split is (``None``: all)."""
        folders = self._folders()
        if name == "test" and "test" not in folders and "val" in folders:
            # As with ImageNet, whose test labels are not public.
            name = "val"
        if name in folders and name != "train":
            return folders[name], None
        if "train" not in folders:
            raise InputError(f"{self.root}: has no folder {name}; it needs train, val and test, or class folders alone")
        return folders["train"], name

    def _classes(self) -> Sequence[str]:
        """Of all splits together, so that a label means the same in each."""
        folders = self._folders().values()
        present = sorted({entry.name for folder in folders for entry in folder.iterdir() if _is_class(entry)})
        known = self.known_classes()
        unknown = [name for name in present if known is not None and name not in known]
        if unknown:
            raise InputError(f"{self.root}: folder {unknown[0]!r} is not a class of {type(self).__name__}")
        return present if known is None else known

    def _scan(self, folder: Path, classes: Sequence[str]) -> ImageDataset:
        files = {name: find_files(folder / name) for name in classes}
        images = {name: [file for file in found if _is_image(file)] for name, found in files.items()}
        if not any(images.values()):
            if any(file.parent == folder for file in find_files(folder, IMAGE_KINDS)):
                raise InputError(
                    f"{folder}: its images lie in no class folders; move those of each class into a subfolder"
                    + ("" if folder == self.root else f", or give splits: false if {folder.name} is a class")
                )
            kinds = ", ".join(IMAGE_KINDS)
            raise InputError(f"{folder}: no images in it; it needs one subfolder a class, with {kinds}")
        others = Counter(file.suffix for name in classes for file in files[name] if not _is_image(file))
        if others:
            kinds = ", ".join(f"{count} {suffix or 'without ending'}" for suffix, count in others.most_common(5))
            notice(f"{folder}: files that are no images are left out: {kinds}")
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
    """A name that can be written, where its bytes are no UTF-8."""
    return os.fsencode(name).decode(errors="replace")


def find_files(folder: Path, kinds: tuple[str, ...] = ("",)) -> list[Path]:
    """Files at any depth, in the same order on every file system; hidden files and folders do not count."""
    return sorted(_walk(folder, kinds))


def _walk(folder: Path, kinds: tuple[str, ...]) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, followlinks=True):
        # A link to a folder above would be followed for ever.
        above = {Path(parent).resolve(), *Path(parent).resolve().parents}
        folders[:] = [name for name in folders if name[0] != "." and Path(parent, name).resolve() not in above]
        yield from (Path(parent, name) for name in files if name.lower().endswith(kinds) and name[0] != ".")


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
            file.load()
            turned = _UPRIGHT.get(file.getexif().get(274)) if turn else None  # type: ignore[arg-type]
            shown = file if turned is None else file.transpose(turned)
            if shown.has_transparency_data:
                white = Image.new("RGBA", shown.size, "white")
                shown = Image.alpha_composite(white, shown.convert("RGBA"))
            pixels = np.array(shown.convert("RGB" if channels == 3 else "L"))
        except Exception as error:  # a damaged file makes Pillow raise nearly anything
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
    except Exception as error:  # see ``read_image``
        raise _unreadable(path) from error
    if file.mode.startswith(("I", "F")):
        file.close()
        raise InputError(f"{path}: gray with more than 8 bits, which would be clipped; save it with 8 bits")
    return file


def _unreadable(path: Path) -> InputError:
    return InputError(f"{path}: cannot be read as an image; remove or replace it")
