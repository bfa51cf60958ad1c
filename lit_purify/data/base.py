"""Base class of data modules: batches with image, label and index, and loaders that yield every sample once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from lit_purify.data.claims import Claims
from lit_purify.data.subset import Indices, Subset, random_state, subset_sha256
from lit_purify.data.workers import Loader, ignore_signals
from lit_purify.errors import InputError
from lit_purify.functional.images import check_unit_range
from lit_purify.functional.rows import Domain
from lit_purify.recorded import SHA256, Recorded, identity

Batch = dict[str, Tensor]
"""``image`` (B, C, H, W), or rows (B, F), float32 in [0, 1]; ``label`` and ``index`` (position), (B,) int64."""

_MOST_KEPT = 2**30
"""Largest size in bytes of training images that are kept in memory."""


@dataclass(frozen=True, eq=False)
class ImageDataset(Dataset[dict[str, Any]]):
    """A split: labels, and a function that reads one sample.

    Args:
        read: Position -> image (C, H, W) or row (F,), float32 in [0, 1]; picklable, for worker processes.
        labels: Label of every sample.
        classes: Names of the classes.
        positions: Positions to read, in order; a position identifies its sample.
        domain: Features and constraints of table rows; ``None`` for images.
        kinds: A finer class of every sample, reported separately; the first of ``classes`` is then the harmless one.
            ``None`` without finer classes.
    """

    read: Callable[[int], Tensor]
    labels: Indices
    classes: Sequence[str]
    positions: Indices
    domain: Domain | None = None
    kinds: NDArray[np.str_] | None = None

    @staticmethod
    def whole(read: Callable[[int], Tensor], labels: Sequence[int] | Indices, classes: Sequence[str]) -> ImageDataset:
        """Returns a split with all its samples.

        Raises:
            InputError: There are no samples, or a label is not the position of a class.
        """
        array = np.asarray(labels, dtype=np.int64)
        if not len(array):
            raise InputError("the split has no samples: check the folder and the fractions of the data")
        if array.min() < 0 or array.max() >= len(classes):
            bad = int(np.flatnonzero((array < 0) | (array >= len(classes)))[0])
            raise InputError(
                f"label {array[bad]} of sample {bad} is outside 0 .. {len(classes) - 1}: number classes from 0"
            )
        return ImageDataset(read, array, classes, np.arange(len(array)))

    @staticmethod
    def of(images: Tensor, labels: Tensor, classes: Sequence[str] | None = None) -> ImageDataset:
        """Returns a split of images in memory.

        Args:
            images: (N, C, H, W), or rows (N, F), floats in [0, 1] or bytes.
            labels: (N,), integers.
            classes: Names of the classes; ``None`` uses the numbers up to the largest label.

        Raises:
            InputError: Images are not in [0, 1], or the number of labels differs.
        """
        if images.dtype != torch.uint8:
            check_unit_range(images)
            images = images.float()
        found = np.asarray(labels.detach().cpu(), dtype=np.int64)
        if found.shape != (len(images),):
            raise InputError(f"labels have shape {found.shape}: give one for each of the {len(images)} images")
        names = classes or [str(k) for k in range(int(found.max(initial=0)) + 1)]
        return ImageDataset.whole(partial(_row, images.detach().cpu()), found, names)

    def choose(self, subset: Subset) -> ImageDataset:
        """Returns the samples of a subset; they keep their positions."""
        return replace(self, positions=subset.indices(self.labels))

    def part(self, positions: Indices) -> ImageDataset:
        """Returns a split of selected samples with new positions."""
        whole = ImageDataset.whole(partial(_read_at, self.read, positions), self.labels[positions], self.classes)
        return replace(whole, domain=self.domain, kinds=None if self.kinds is None else self.kinds[positions])

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, item: int) -> dict[str, Any]:
        position = int(self.positions[item])
        return {"image": self.read(position), "label": int(self.labels[position]), "index": position}


class _Shuffle(DistributedSampler[dict[str, Any]]):
    """The process's share of the shuffled positions, without the first ``taken()`` ones."""

    taken: Callable[[], int]

    def __iter__(self) -> Iterator[Any]:
        return islice(super().__iter__(), self.taken(), None)


class ImageDataModule(Recorded, L.LightningDataModule, ABC):
    """Loads three splits of a dataset.

    Shuffling depends on ``seed`` and the epoch alone. Augmentation belongs to the training and is keyed by sample. A
    resumed training therefore sees the same batches as an uninterrupted one, even from the middle of an epoch.

    Args:
        batch_size: Samples per batch and process.
        num_workers: Processes that read samples; 0 reads in the main process and keeps up to 1 GiB of training images
            in memory. An evaluation on several processes uses no workers, because reading ahead would claim samples
            that another process is free for.
        subset: Samples of the evaluated split; ``None`` uses all.
        evaluate_on: The evaluated split: ``test``, ``val`` (to choose settings) or ``train``.
        seed: Seed of the shuffling.
        val_subset: Samples of the validation split used in a training; ``None`` uses all. Unlike ``limit_val_batches``,
            this selects the same samples for every batch size and process count.
    """

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        subset: Subset | None = None,
        evaluate_on: str = "test",
        seed: int = 0,
        val_subset: Subset | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise InputError(f"{name} = {value}: use at least {least}")
        if evaluate_on not in ("train", "val", "test"):
            raise InputError(f"evaluate_on = {evaluate_on!r}: use train, val or test")
        self.batch_size, self.num_workers, self.subset = batch_size, num_workers, subset
        self.evaluate_on, self.seed, self.val_subset = evaluate_on, seed, val_subset
        self._splits: dict[str, ImageDataset] = {}
        self.finished: Collection[int] = ()
        """Positions that an evaluation skips because they are recorded already; equal on all processes."""

    resize: int | None = None
    """Size of the shorter side before the center crop; ``None`` is the size of the crop."""
    # These do not change which images are evaluated.
    irrelevant = frozenset({"batch_size", "num_workers", "seed", "val_subset"})

    def identity(self) -> dict[str, Any]:
        """Returns the values that determine the evaluated images, see ``recorded.identity``."""
        names = self.names_sha256
        return identity(data=self) | ({f"data.names{SHA256}": names} if names else {})

    @abstractmethod
    def split(self, name: str) -> ImageDataset:
        """Reads the split ``train``, ``val`` or ``test``; raises an ``InputError`` that names missing files."""

    @property
    def name(self) -> str:  # type: ignore[override]  # Lightning declares an attribute that nothing sets
        """Name of the dataset in reports."""
        return type(self).__name__

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes."""
        return self.cached_split(self.evaluate_on).classes

    @property
    def domain(self) -> Domain | None:
        """Features and constraints of table rows, see ``ImageDataset``."""
        return self.cached_split("train").domain

    @property
    def evaluated(self) -> ImageDataset:
        """The evaluated samples."""
        split = self.cached_split(self.evaluate_on)
        return split if self.subset is None else split.choose(self.subset)

    @property
    def names_sha256(self) -> str | None:
        """Hash of the names that assign positions to images; ``None`` if they are fixed."""
        return None

    @property
    def subset_sha256(self) -> str:
        """Hash of the evaluated positions."""
        return subset_sha256(self.evaluated.positions)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Returns shuffled batches, in the same order for every process count; an incomplete last batch is dropped."""
        split = self.cached_split("train")
        world, rank = self._shard()
        # As many batches per epoch as one process would have with all samples; no sample is repeated as padding.
        enough = len(split) >= world * self.batch_size
        sampler = _Shuffle(split, world, rank, shuffle=True, seed=self.seed, drop_last=enough)
        # Lightning counts the batches of an epoch and restores the count on resuming, but the loader must skip them.
        sampler.taken = self._taken
        if self.num_workers == 0 and len(split) * split[0]["image"].nbytes <= _MOST_KEPT:
            split = replace(split, read=cache(split.read))
        return self._loader(split, batch_size=self.batch_size, sampler=sampler, drop_last=enough)

    def _taken(self) -> int:
        """Returns how many samples of this epoch and process have been trained on."""
        trainer: Any = self.trainer
        # Without a training the loader yields everything.
        return (trainer.fit_loop.batch_idx + 1) * self.batch_size if getattr(trainer, "training", False) else 0

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Returns the validation samples in order, each once."""
        split = self.cached_split("val")
        chosen = split if self.val_subset is None else split.choose(self.val_subset)
        world, rank = self._shard()
        if len(chosen) < world:
            raise InputError(f"{len(chosen)} samples are fewer than {world} processes: use fewer devices")
        exact = UnrepeatedDistributedSampler(chosen, num_replicas=world, rank=rank, shuffle=False)
        return self._loader(chosen, batch_size=self.batch_size, sampler=exact)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Returns the unfinished evaluated samples in order, each once over all processes."""
        chosen, (world, rank) = self.evaluated, self._shard()

        def items() -> Indices:
            return np.flatnonzero(~np.isin(chosen.positions, list(self.finished)))

        # Workers that read ahead would claim samples that another process is free for.
        workers, claims = self.num_workers if world == 1 else 0, Claims(items, self.batch_size, world, rank)
        return self._loader(chosen, batch_sampler=claims, num_workers=workers, persistent_workers=False)

    def cached_split(self, name: str) -> ImageDataset:
        """Returns ``split``, read once."""
        if name not in self._splits:
            self._splits[name] = self.split(name)
        return self._splits[name]

    def _shard(self) -> tuple[int, int]:
        if self.trainer is None:
            return 1, 0
        return self.trainer.world_size, self.trainer.global_rank

    def _loader(self, split: ImageDataset, **options: Any) -> DataLoader[dict[str, Any]]:  # noqa: ANN401
        usual: dict[str, Any] = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        usual |= {"worker_init_fn": ignore_signals, "collate_fn": _collate, "pin_memory": torch.cuda.is_available()}
        return Loader(split, **usual | options)


def _collate(samples: list[dict[str, Any]]) -> Batch:
    shapes = sorted({tuple(sample["image"].shape) for sample in samples})
    if len(shapes) > 1:
        raise InputError(f"images of shapes {shapes[0]} and {shapes[1]} cannot form a batch: set the size of the data")
    return default_collate(samples)


def _row(images: Tensor, item: int) -> Tensor:
    row = images[item]
    return row.float().div(255.0) if row.dtype == torch.uint8 else row


def _read_at(read: Callable[[int], Tensor], positions: Indices, item: int) -> Tensor:
    return read(int(positions[item]))


def shuffled(count: int, seed: int) -> Indices:
    """Returns a permutation of 0 .. count - 1 for cutting splits."""
    return random_state(seed).permutation(count)
