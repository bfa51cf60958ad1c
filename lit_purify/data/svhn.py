"""Street View House Numbers, cropped digits (Netzer et al. 2011)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchvision import datasets

from lit_purify.data.base import ImageDataModule, ImageDataset
from lit_purify.data.torchvision_files import from_arrays, open_torchvision, train_or_val


class SVHN(ImageDataModule):
    """SVHN from torchvision's files ``train_32x32.mat`` and ``test_32x32.mat``.

    5,000 of the training images, drawn with ``RandomState(0)``, are the validation split.

    Args:
        root: Folder that holds the files.
        download: Fetch them when they are missing (needs a network).
        loading: As for every datamodule: batch_size, num_workers, subset, evaluate_on, seed.
    """

    def __init__(
        self,
        root: Path,
        download: bool = False,
        **loading: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**loading)
        self.root, self.download = Path(root).expanduser(), download

    def prepare_data(self) -> None:
        """Downloads in one process, before the others look."""
        if self.download:
            self._open("train")
            self._open("test")

    def split(self, name: str) -> ImageDataset:
        """One of the three splits."""
        found = self._open("test" if name == "test" else "train")
        whole = from_arrays(found.data, found.labels, [str(c) for c in range(10)])
        return whole if name == "test" else train_or_val(whole, name)

    def _open(self, part: str) -> datasets.SVHN:
        return open_torchvision(datasets.SVHN, self.root, self.download, split=part)
