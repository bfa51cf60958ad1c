"""The base of every datamodule: batches that name image, label and index, loaders that give every sample once."""

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
"""``image`` (B, C, H, W), or rows (B, F), float32 in [0, 1], ``label`` and ``index`` (B,) int64: place in a split."""

_MOST_KEPT = 2**30
"""Bytes of training images that stay in memory once they are read."""


@dataclass(frozen=True, eq=False)
class ImageDataset(Dataset[dict[str, Any]]):
    """A split: a function that reads one image, and the labels.

    Args:
        read: From a position to an image (C, H, W), or a row (F,), float32 in [0, 1]; picklable, for worker processes.
        labels: Label of every sample.
        classes: Names of the classes.
        positions: Positions to read, in order; each is its sample's identity.
        domain: Of rows of a table: what their features are, and which rows can be made of them; ``None`` of images.
        kinds: A finer class of every sample, which reports tell apart; the first of ``classes`` is then what is
            harmless. ``None`` where there is none.
    """

    read: Callable[[int], Tensor]
    labels: Indices
    classes: Sequence[str]
    positions: Indices
    domain: Domain | None = None
    kinds: NDArray[np.str_] | None = None

    @staticmethod
    def whole(read: Callable[[int], Tensor], labels: Sequence[int] | Indices, classes: Sequence[str]) -> ImageDataset:
        """A split with all its samples.

        Raises:
            InputError: There are no samples, or a label is not the position of a class.
        """
        array = np.asarray(labels, dtype=np.int64)
        if not len(array):
            raise InputError("the split has no images")
        if array.min() < 0 or array.max() >= len(classes):
            bad = int(np.flatnonzero((array < 0) | (array >= len(classes)))[0])
            raise InputError(f"label {array[bad]} of sample {bad} is outside 0 .. {len(classes) - 1}")
        return ImageDataset(read, array, classes, np.arange(len(array)))

    @staticmethod
    def of(images: Tensor, labels: Tensor, classes: Sequence[str] | None = None) -> ImageDataset:
        """A split of images that are in memory.

        Args:
            images: (N, C, H, W), or rows (N, F), floats in [0, 1] or bytes.
            labels: (N,), integers.
            classes: Names of the classes; ``None`` takes numbers, 0 up to the largest label.

        Raises:
            InputError: Images are not in [0, 1], or there are not as many labels.
        """
        if images.dtype != torch.uint8:
            check_unit_range(images)
            images = images.float()
        found = np.asarray(labels.detach().cpu(), dtype=np.int64)
        if found.shape != (len(images),):
            raise InputError(f"labels have shape {found.shape}, {len(images)} images need ({len(images)},)")
        names = classes or [str(k) for k in range(int(found.max(initial=0)) + 1)]
        return ImageDataset.whole(partial(_row, images.detach().cpu()), found, names)

    def choose(self, subset: Subset) -> ImageDataset:
        """The samples that a rule picks; they keep their positions."""
        return replace(self, positions=subset.indices(self.labels))

    def part(self, positions: Indices) -> ImageDataset:
        """A split of its own made of some samples, which are numbered anew."""
        return ImageDataset.whole(partial(_read_at, self.read, positions), self.labels[positions], self.classes)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, item: int) -> dict[str, Any]:
        position = int(self.positions[item])
        return {"image": self.read(position), "label": int(self.labels[position]), "index": position}


class _Shuffle(DistributedSampler[dict[str, Any]]):
    """A process's share of the shuffled positions, without the first ``taken()`` of them."""

    taken: Callable[[], int]

    def __iter__(self) -> Iterator[Any]:
        return islice(super().__iter__(), self.taken(), None)


class ImageDataModule(Recorded, L.LightningDataModule, ABC):
    """Loads three splits of images.

    Shuffling depends on ``seed`` and the epoch alone; augmentation is the task's, keyed by sample. So an interrupted
    training that resumes, also in the middle of an epoch, sees the batches that it would have seen.

    Args:
        batch_size: Samples a batch and process.
        num_workers: Processes that read images; 0 reads in the main process, where training images up to 1 GiB then
            stay in memory. An evaluation on several processes reads in each of them: who reads ahead would claim
            samples that another process is free for.
        subset: Which samples of the evaluated split count; ``None`` takes all.
        evaluate_on: The split that ``test`` reads: ``test``, or ``val`` to choose settings on, or ``train``.
        seed: Of the shuffling.
        val_subset: Which samples of the validation split a training is validated on; ``None`` takes all. Unlike
            ``limit_val_batches``, it means the same samples for every batch size and process count.
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
        """Positions that an evaluation leaves out, as they are recorded already; the same on all processes."""

    resize: int | None = None
    """What the shorter side of an image is resized to before its center is cropped; ``None`` is the size."""
    # Which images are evaluated does not depend on these; where a folder lies does not count, its file names do.
    irrelevant = frozenset({"root", "batch_size", "num_workers", "download", "seed", "val_subset"})

    def identity(self) -> dict[str, Any]:
        """What says which images are evaluated, see ``recorded.identity``."""
        names = self.names_sha256
        return identity(data=self) | ({f"data.names{SHA256}": names} if names else {})

    @abstractmethod
    def split(self, name: str) -> ImageDataset:
        """Reads the split ``train``, ``val`` or ``test``; raises an ``InputError`` that names what is missing."""

    @property
    def name(self) -> str:  # type: ignore[override]  # Lightning declares an attribute that nothing sets
        """What reports call the dataset."""
        return type(self).__name__

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes."""
        return self.cached_split(self.evaluate_on).classes

    @property
    def domain(self) -> Domain | None:
        """Of rows of a table, see ``ImageDataset``."""
        return self.cached_split("train").domain

    @property
    def evaluated(self) -> ImageDataset:
        """The samples that an evaluation is about."""
        split = self.cached_split(self.evaluate_on)
        return split if self.subset is None else split.choose(self.subset)

    @property
    def names_sha256(self) -> str | None:
        """Hash of the names by which positions are given to images; ``None`` where nobody can change them."""
        return None

    @property
    def subset_sha256(self) -> str:
        """Hash of the evaluated positions."""
        return subset_sha256(self.evaluated.positions)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Shuffled, the same order for every process count up to sharding; an incomplete last batch is dropped."""
        split = self.cached_split("train")
        world, rank = self._shard()
        # As many batches an epoch as one process with all their samples: nobody is handed a sample twice to fill up.
        enough = len(split) >= world * self.batch_size
        sampler = _Shuffle(split, world, rank, shuffle=True, seed=self.seed, drop_last=enough)
        # Lightning counts the batches of an epoch, restores the count on resuming, and leaves it to the loader to skip.
        sampler.taken = self._taken
        if self.num_workers == 0 and len(split) * split[0]["image"].nbytes <= _MOST_KEPT:
            split = replace(split, read=cache(split.read))
        return self._loader(split, sampler, drop_last=enough)

    def _taken(self) -> int:
        """Samples of this epoch and process that are trained on already."""
        trainer: Any = self.trainer
        # Outside of a training, or without a trainer, a loader gives everything.
        return (trainer.fit_loop.batch_idx + 1) * self.batch_size if getattr(trainer, "training", False) else 0

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """In order, each sample once."""
        split = self.cached_split("val")
        chosen = split if self.val_subset is None else split.choose(self.val_subset)
        return self._loader(chosen, self._exact(chosen))

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The evaluated samples that are not finished, in order, each once over all processes."""
        chosen, (world, rank) = self.evaluated, self._shard()

        def items() -> Indices:
            return np.flatnonzero(~np.isin(chosen.positions, list(self.finished)))

        return Loader(
            chosen,
            batch_sampler=Claims(items, self.batch_size, world, rank),
            num_workers=self.num_workers if world == 1 else 0,
            worker_init_fn=ignore_signals,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
        )

    def cached_split(self, name: str) -> ImageDataset:
        """``split``, which is read once."""
        if name not in self._splits:
            self._splits[name] = self.split(name)
        return self._splits[name]

    def _shard(self) -> tuple[int, int]:
        if self.trainer is None:
            return 1, 0
        return self.trainer.world_size, self.trainer.global_rank

    def _exact(self, split: ImageDataset) -> Any:  # noqa: ANN401  (a sampler; torch's stubs differ between versions)
        world, rank = self._shard()
        if len(split) < world:
            raise InputError(f"{len(split)} samples are fewer than {world} processes: use fewer devices")
        return UnrepeatedDistributedSampler(split, num_replicas=world, rank=rank, shuffle=False)

    def _loader(
        self,
        split: ImageDataset,
        sampler: Any,  # noqa: ANN401
        drop_last: bool = False,
    ) -> DataLoader[dict[str, Any]]:
        return Loader(
            split,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            worker_init_fn=ignore_signals,
            drop_last=drop_last,
            collate_fn=_collate,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _collate(samples: list[dict[str, Any]]) -> Batch:
    shapes = sorted({tuple(sample["image"].shape) for sample in samples})
    if len(shapes) > 1:
        raise InputError(f"images of shapes {shapes[0]} and {shapes[1]} make no batch: give the data a size")
    return default_collate(samples)


def _row(images: Tensor, item: int) -> Tensor:
    row = images[item]
    return row.float().div(255.0) if row.dtype == torch.uint8 else row


def _read_at(read: Callable[[int], Tensor], positions: Indices, item: int) -> Tensor:
    return read(int(positions[item]))


def shuffled(count: int, seed: int) -> Indices:
    """A permutation of 0 .. count - 1 that splits are cut from."""
    return random_state(seed).permutation(count)
