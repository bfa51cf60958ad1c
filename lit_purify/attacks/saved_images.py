"""Precomputed adversarial images from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from typing_extensions import override

from lit_purify.attacks.base import Attack, Queries
from lit_purify.errors import InputError
from lit_purify.functional.chunks import AttackedFunction
from lit_purify.functional.noise import KeyedNoise, Noise
from lit_purify.functional.rows import Domain
from lit_purify.functional.threat import Norm, l2_norm, linf_norm, violations

_HALF_A_LEVEL = 0.5 / 255


class SavedImages(Attack):
    """Adversarial images from files instead of an attack.

    Args:
        norm: ``linf`` or ``l2``; the images are checked.
        eps: Radius, in pixels of [0, 1]; a number or a fraction such as ``8/255``.
        path: A folder of 8-bit PNGs named by sample index (``000123.png``: position in the evaluated split), or one
            array (N, C, H, W) of floats in [0, 1] in the order of the evaluated samples: ``.npy``, ``.npz`` with one
            array in it, or a tensor from ``torch.save`` (``.pt``, ``.pth``).
        rounded: The images were rounded to 256 levels. This changes a pixel by up to half a level (0.5/255), which is
            therefore allowed on top of ``eps``.

    Raises:
        InputError: The path has no such images. On use: an image is missing, has another shape than its original, or
            lies outside the threat model.
    """

    steps = eot = 0
    gradient = "none"

    def __init__(self, norm: Norm, eps: float | str, path: str | Path, rounded: bool = False) -> None:
        super().__init__(norm, eps)
        self.path, self.rounded = Path(path).expanduser(), rounded
        self.found: dict[int, Path] | Tensor = _png_files(self.path) if self.path.is_dir() else _read_array(self.path)
        self._row: dict[int, int] | None = None

    @property
    @override
    def title(self) -> str:
        return f"saved images {self.path.name}" + (", half a level above eps allowed" if self.rounded else "")

    @property
    @override
    def queries(self) -> Queries:
        return Queries(0, 0)

    def radius(self, image: Tensor) -> float:
        """Returns ``eps`` plus the rounding error if ``rounded``."""
        if not self.rounded:
            return self.eps
        return self.eps + _HALF_A_LEVEL * (1.0 if self.norm == "linf" else image[0].numel() ** 0.5)

    @override
    def prepare(self, positions: Sequence[int], domain: Domain | None = None) -> None:
        super().prepare(positions, domain)
        if isinstance(self.found, Tensor) and len(self.found) != len(positions):
            raise InputError(
                f"{self.path}: holds {len(self.found)} images for {len(positions)} evaluated samples: save one for each"
            )
        self._row = {int(position): row for row, position in enumerate(positions)}

    @override
    def perturb(self, model: AttackedFunction, image: Tensor, label: Tensor, noise: Noise, chunk: int) -> Tensor:
        assert isinstance(noise, KeyedNoise), "the index of the noise identifies samples"
        index = noise.index.tolist()
        saved = torch.stack([self._read(i, image[0]) for i in index]).to(image)
        norms = linf_norm(saved - image) if self.norm == "linf" else l2_norm(saved - image)
        for k in violations(saved, image, self.norm, self.radius(image)).nonzero().flatten().tolist():
            low, high = float(saved[k].min()), float(saved[k].max())
            if not 0.0 <= low <= high <= 1.0:
                raise InputError(f"{self.path}: sample {index[k]} has values in {low:.4g} .. {high:.4g}: save [0, 1]")
            raise InputError(
                f"{self.path}: sample {index[k]} is {float(norms[k]):.5g} from its original, more than "
                f"{self.radius(image):.5g} ({self.norm}): check the samples and eps, and set rounded: true if "
                "the images were rounded to bytes"
            )
        return saved

    def _read(self, index: int, like: Tensor) -> Tensor:
        if isinstance(self.found, Tensor):
            row = index if self._row is None else self._row[index]
            if row >= len(self.found):
                raise InputError(
                    f"{self.path}: holds {len(self.found)} images, none for sample {index}: save one for each"
                )
            saved = self.found[row]
        elif index in self.found:
            saved = _read_png(self.found[index])
        else:
            raise InputError(f"{self.path}: no image of sample {index}: add {index:06d}.png")
        if saved.shape != like.shape:
            raise InputError(
                f"{self.path}: the image of sample {index} has shape {tuple(saved.shape)}, its original "
                f"{tuple(like.shape)} (channels, height, width): save the same shape"
            )
        return saved


def _png_files(folder: Path) -> dict[int, Path]:
    """Maps sample indices to their files."""
    files = {int(path.stem): path for path in sorted(folder.glob("*.png")) if path.stem.isdecimal()}
    if not files:
        raise InputError(f"{folder}: no PNG files with sample indices as names: name them like 000123.png")
    return files


def _read_png(path: Path) -> Tensor:
    """Reads an image, (C, H, W) in [0, 1]."""
    try:
        with Image.open(path) as picture:
            mode, values = picture.mode, np.array(picture)
    except (OSError, SyntaxError) as error:
        raise InputError(f"{path}: cannot be read as a PNG: save it again") from error
    if mode not in ("L", "RGB"):
        raise InputError(f"{path}: its mode is {mode}: save 8-bit gray or RGB")
    return torch.from_numpy(values).reshape(*values.shape[:2], -1).permute(2, 0, 1).float() / 255.0


def _read_array(path: Path) -> Tensor:
    """Reads an array, (N, C, H, W)."""
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder: check the path")
    if path.suffix not in (".npy", ".npz", ".pt", ".pth"):
        raise InputError(f"{path}: use a folder of PNGs, or a .npy, .npz, .pt or .pth file")
    try:
        if path.suffix in (".npy", ".npz"):
            loaded = np.load(path, allow_pickle=False)
            arrays = [loaded] if path.suffix == ".npy" else list(loaded.values())
            found: Any = torch.from_numpy(arrays[0]) if len(arrays) == 1 else arrays
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly any exception
        raise InputError(f"{path}: cannot be read as an array of numbers: check that it is complete") from error
    if not isinstance(found, Tensor):
        raise InputError(f"{path}: holds something else than one array: save only the images (N, C, H, W)")
    if found.ndim != 4 or not found.is_floating_point():
        raise InputError(
            f"{path}: holds {found.dtype} of shape {tuple(found.shape)}: save floats in [0, 1] of shape (N, C, H, W)"
        )
    return found.float()
