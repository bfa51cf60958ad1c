"""Subsets: the evaluated samples of a split."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from lit_purify.errors import InputError
from lit_purify.recorded import Recorded

Indices = NDArray[np.int64]


class Subset(Recorded, ABC):
    """A rule that selects positions of a split."""

    @abstractmethod
    def indices(self, labels: Indices) -> Indices:
        """Returns positions in the split, in the order of evaluation.

        Args:
            labels: Label of every sample of the split.
        """


class First(Subset):
    """The first ``n`` samples.

    Args:
        n: Number of samples.
    """

    def __init__(self, n: int) -> None:
        self.n = n

    @override
    def indices(self, labels: Indices) -> Indices:
        return np.arange(_check_count(self.n, len(labels)))


class RandomChoice(Subset):
    """Samples drawn by ``RandomState(seed).choice(n_total, n, replace=False)``.

    n = 512 and seed = 0 on the 10,000 test images of CIFAR-10 give the subset of Lee & Kim (2023) and of Pei et al.
    (2025).

    Args:
        n: Number of samples.
        seed: Seed of numpy's legacy generator.
    """

    def __init__(self, n: int, seed: int = 0) -> None:
        self.n, self.seed = n, seed

    @override
    def indices(self, labels: Indices) -> Indices:
        return random_state(self.seed).choice(len(labels), _check_count(self.n, len(labels)), replace=False)


class RandomDraws(Subset):
    """``RandomChoice(n, seed)`` for the seeds 0 .. ``draws`` - 1 in turn, without repeated samples.

    The evaluation of DiffPure (Nie et al., ICML 2022) uses 8 draws of 64 on CIFAR-10 and 32 of 16 on ImageNet. It
    counts a sample twice if two draws contain it.

    Args:
        n: Samples of a draw.
        draws: Number of draws.
    """

    def __init__(self, n: int, draws: int) -> None:
        if draws < 1:
            raise InputError(f"draws = {draws}: use at least 1")
        self.n, self.draws = n, draws

    @override
    def indices(self, labels: Indices) -> Indices:
        drawn = np.concatenate([RandomChoice(self.n, seed).indices(labels) for seed in range(self.draws)])
        return drawn[np.sort(np.unique(drawn, return_index=True)[1])]


class Balanced(Subset):
    """``n`` random samples, equally many of every class (a remainder goes to the first classes).

    Args:
        n: Number of samples.
        seed: Seed of numpy's legacy generator.
    """

    def __init__(self, n: int, seed: int = 0) -> None:
        self.n, self.seed = n, seed

    def indices(self, labels: Indices) -> Indices:
        """Returns one sample of each class in turn, so that every prefix is balanced too."""
        order = random_state(self.seed).permutation(len(labels))
        classes, counts = np.unique(labels, return_counts=True)
        rarest = int(counts.argmin())
        most = int(counts[rarest]) * len(classes) + rarest
        if not 1 <= self.n <= most:
            raise InputError(
                f"subset: n = {self.n}: Balanced takes equally many of each of {len(classes)} classes, and class "
                f"{classes[rarest]} has {counts[rarest]} of the split's {len(labels)} samples: use n = 1 .. {most}"
            )
        groups = [order[labels[order] == c] for c in classes]
        wanted = [self.n // len(classes) + (i < self.n % len(classes)) for i in range(len(classes))]
        return np.array([g[k] for k in range(max(wanted)) for g, w in zip(groups, wanted, strict=True) if k < w])


class IndexFile(Subset):
    """Positions from a text file, one per line.

    Args:
        path: The file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @override
    def indices(self, labels: Indices) -> Indices:
        try:
            found = np.array([int(word) for word in self.path.read_text().split()], dtype=np.int64)
        except OSError as error:
            raise InputError(f"{self.path}: no such file of indices ({error.strerror}): check the path") from error
        except (ValueError, OverflowError) as error:
            raise InputError(f"{self.path}: not a file of indices ({error}): write one integer per line") from error
        if not len(found) or found.min() < 0 or found.max() >= len(labels):
            raise InputError(f"{self.path}: write at least one index, and only indices in 0 .. {len(labels) - 1}")
        if len(np.unique(found)) != len(found):
            raise InputError(f"{self.path}: has an index twice: write each once")
        return found


def subset_sha256(indices: Indices) -> str:
    """Hash of the chosen positions, decimal, one per line, in order: the ``sha256sum`` of an index file."""
    return hashlib.sha256("".join(f"{i}\n" for i in indices).encode()).hexdigest()


def random_state(seed: int) -> np.random.RandomState:
    """Returns numpy's legacy generator, whose draws never change between versions."""
    if not 0 <= seed < 2**32:
        raise InputError(f"seed = {seed}: use a number in 0 .. 2**32 - 1")
    return np.random.RandomState(seed)


def _check_count(n: int, available: int) -> int:
    if not 1 <= n <= available:
        raise InputError(
            f"n = {n} samples cannot be chosen from a split of {available}: set data.subset.n (in a training "
            f"data.val_subset.n) to 1 .. {available}"
        )
    return n
