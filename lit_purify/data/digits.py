"""The 1,797 handwritten digits, 8x8, that come with scikit-learn."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from lit_purify.data.base import ImageDataModule, ImageDataset, shuffled
from lit_purify.data.subset import Subset
from lit_purify.functional.images import resize

_TRAIN, _VAL = 1097, 300


class Digits(ImageDataModule):
    """UCI handwritten digits as shipped by scikit-learn (no download): 1,097 training, 300 validation, 400 test images.

    The split is a permutation with ``RandomState(0)``.

    Args:
        size: Height and width; 8 is the original, larger ones are resized bilinearly.
        batch_size: See ``ImageDataModule``, as for all that follow.
    """

    def __init__(
        self,
        size: int = 8,
        batch_size: int = 64,
        num_workers: int = 0,
        subset: Subset | None = None,
        evaluate_on: str = "test",
        seed: int = 0,
        val_subset: Subset | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, subset, evaluate_on, seed, val_subset)
        self.size = size

    def split(self, name: str) -> ImageDataset:
        """One of the three splits."""
        digits = load_digits()
        images = torch.from_numpy(digits.images).float().div(16.0).unsqueeze(1)
        if self.size != images.shape[-1]:
            images = resize(images, self.size)
        whole = ImageDataset.whole(partial(_read, images), digits.target, [str(c) for c in digits.target_names])
        parts = np.split(shuffled(len(whole), 0), [_TRAIN, _TRAIN + _VAL])
        return whole.part(dict(zip(("train", "val", "test"), parts, strict=True))[name])


def _read(images: Tensor, item: int) -> Tensor:
    return images[item]
