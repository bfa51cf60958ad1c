"""Street View House Numbers, cropped digits (Netzer et al. 2011)."""

from __future__ import annotations

from torchvision import datasets

from lit_purify.data.base import ImageDataset
from lit_purify.data.torchvision_files import TorchvisionFiles, from_arrays


class SVHN(TorchvisionFiles):
    """SVHN from torchvision's files ``train_32x32.mat`` and ``test_32x32.mat``.

    5,000 of the training images, drawn with ``RandomState(0)``, are the validation split.
    """

    def read(self, train: bool) -> ImageDataset:
        """All training images, or all test images."""
        found = self.open(datasets.SVHN, split="train" if train else "test")
        return from_arrays(found.data, found.labels, [str(c) for c in range(10)])
