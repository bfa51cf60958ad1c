"""The 1,797 handwritten digits, 8x8, that come with scikit-learn."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits

from lit_purify.data.base import ImageDataModule, ImageDataset, shuffled

_TRAIN, _VAL = 1097, 300


class Digits(ImageDataModule):
    """UCI handwritten digits as shipped by scikit-learn (no download): 1,097 training, 300 validation, 400 test images.

    The split is a permutation with ``RandomState(0)``.
    """

    def split(self, name: str) -> ImageDataset:
        """One of the three splits."""
        digits = load_digits()
        images = torch.from_numpy(digits.images).float().div(16.0).unsqueeze(1)
        whole = ImageDataset.of(images, torch.from_numpy(digits.target), [str(c) for c in digits.target_names])
        parts = np.split(shuffled(len(whole), 0), [_TRAIN, _TRAIN + _VAL])
        return whole.part(dict(zip(("train", "val", "test"), parts, strict=True))[name])
