"""The 1,797 handwritten digits (8x8) of scikit-learn."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from typing_extensions import override

from lit_purify.data.base import ImageDataModule, ImageDataset, shuffled

_TRAIN, _VAL = 1097, 300


class Digits(ImageDataModule):
    """UCI handwritten digits from scikit-learn (no download): 1,097 training, 300 validation and 400 test images.

    The splits are cut from a permutation with ``RandomState(0)``.
    """

    @override
    def split(self, name: str) -> ImageDataset:
        digits = load_digits()
        images = torch.from_numpy(digits.images).float().div(16.0).unsqueeze(1)
        whole = ImageDataset.of(images, torch.from_numpy(digits.target), [str(c) for c in digits.target_names])
        parts = np.split(shuffled(len(whole), 0), [_TRAIN, _TRAIN + _VAL])
        return whole.part(dict(zip(("train", "val", "test"), parts, strict=True))[name])
