"""Your own tables: rows of numbers and categories, and the changes that an attacker can make."""

from __future__ import annotations

import csv
import gzip
import lzma
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from lit_purify.data.base import ImageDataModule, ImageDataset, shuffled
from lit_purify.data.subset import Indices, Subset
from lit_purify.errors import InputError
from lit_purify.functional.rows import Domain, Relation
from lit_purify.recorded import path_sha256

Lines = list[list[str]]
_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_MISSING = ("", "?", "nan", "NaN", "NA", "null")


class Table(ImageDataModule):
    """Rows of a CSV or Parquet file: numbers scaled to [0, 1], then one-hot categories.

    Numbers are min-max scaled by the training rows and clipped. A fraction of the rows of ``train``, drawn with
    ``RandomState(split_seed)``, is the validation split, and another the test split if there is no ``test``.

    The data defines what an attacker can change. Every attack of an evaluation or adversarial training respects it.

    Args:
        train: File of the training rows: ``.csv`` or ``.txt``, also packed as ``.gz`` or ``.xz``, or ``.parquet``.
        label: Column of the class.
        test: File of the test rows.
        normal: Label of harmless rows. The classes are then this one and ``attack``, and reports distinguish the labels
            as kinds of attacks; ``None`` uses the labels as classes.
        columns: Names of the columns of a file without a header; ``None`` reads the first line.
        drop: Columns to drop.
        categorical: Columns of categories with all their values; an empty list uses those of the training rows.
        bounds: Minimum and maximum of numeric columns, instead of those of the training rows.
        immutable: Columns that an attacker cannot change.
        increasing: Numeric columns that an attacker can only increase.
        integer: Columns of integers.
        relations: Relations between columns, such as ``total = sent + received`` or ``errors <= total``. A column
            before ``=`` is computed from the others. A relation applies to rows that satisfy it, up to 0.01.
        constrained: Whether attacks respect these constraints; ``False``: only norm and [0, 1].
        val_fraction: Fraction of the rows of ``train`` for validation.
        test_fraction: Fraction of the rows of ``train`` for the test if there is no file ``test``.
        split_seed: Seed of the random splits.
        batch_size: See ``ImageDataModule``, as for all further arguments.
    """

    def __init__(
        self,
        train: Path,
        label: str,
        test: Path | None = None,
        normal: str | None = None,
        columns: Sequence[str] | None = None,
        drop: Sequence[str] = (),
        categorical: Mapping[str, Sequence[str]] | None = None,
        bounds: Mapping[str, Sequence[float]] | None = None,
        immutable: Sequence[str] = (),
        increasing: Sequence[str] = (),
        integer: Sequence[str] = (),
        relations: Sequence[str] = (),
        constrained: bool = True,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        batch_size: int = 256,
        num_workers: int = 0,
        subset: Subset | None = None,
        evaluate_on: str = "test",
        seed: int = 0,
        val_subset: Subset | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, subset, evaluate_on, seed, val_subset)
        for name, part in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not 0.0 < part < 0.5:
                raise InputError(f"{name} = {part}: use a number above 0 and below 0.5")
        if used := ({label} | set(categorical or ())) & set(drop):
            raise InputError(f"drop: {min(used)!r} is needed: it is the label, or listed under categorical")
        self.train, self.test, self.label, self.normal = Path(train), test and Path(test), label, normal
        self.columns, self.drop, self.bounds = columns, set(drop), dict(bounds or {})
        self.categorical = {name: list(values or ()) for name, values in (categorical or {}).items()}
        self.immutable, self.increasing, self.integer = set(immutable), set(increasing), set(integer)
        self.relations, self.constrained = [Relation.parse(text) for text in relations], constrained
        self.val_fraction, self.test_fraction, self.split_seed = val_fraction, test_fraction, split_seed

    @property
    def name(self) -> str:  # type: ignore[override]  # as in the base
        """Class and file name, for reports."""
        return f"{type(self).__name__}({self.train.name.partition('.')[0]})"

    @property
    def names_sha256(self) -> str | None:
        """Hash of the files, whose rows define the positions."""
        files = [self.train] if self.test is None else [self.train, self.test]
        return "".join(path_sha256(found)[:32] for file in files if (found := existing(file)).exists())

    @override
    def split(self, name: str) -> ImageDataset:
        return self._splits_of_files[name]

    def read(self, path: Path) -> tuple[list[str], Lines]:
        """Reads columns and rows of a file; datasets override it to correct rows."""
        path = existing(path)
        if path.suffix == ".parquet":
            return _parquet(path)
        try:
            with _OPEN.get(path.suffix, open)(path, "rt", encoding="utf-8-sig", newline="") as stream:
                lines = [line for line in csv.reader(stream, skipinitialspace=True) if line]
        except (OSError, UnicodeDecodeError, lzma.LZMAError, zlib.error, csv.Error, EOFError) as error:
            raise InputError(f"{path}: cannot be read as CSV ({error}): check that it is complete") from error
        names = list(self.columns or (lines.pop(0) if lines else []))
        return names, lines

    @cached_property
    def _splits_of_files(self) -> dict[str, ImageDataset]:
        lines = self._lines(self.train)
        order = shuffled(len(lines[self.label]), self.split_seed)
        cuts = [max(1, round(self.val_fraction * len(order)))]
        cuts.append(cuts[0] + (0 if self.test else max(1, round(self.test_fraction * len(order)))))
        val, own_test, train = np.split(order, cuts)
        if not len(train):
            raise InputError(f"{self.train}: has {len(order)} rows, too few for a validation and a training split")
        raw = {name: self._numbers(self.train, name, values) for name, values in lines.items() if self._numeric(name)}
        low, high = ({name: self._bound(name, k, raw[name][train]) for name in raw} for k in (0, 1))
        known = {name for name in lines if name != self.label}
        for what in ("immutable", "increasing", "integer", "bounds", "categorical"):
            self._check(what, set(getattr(self, what)), known if what in ("immutable", "categorical") else set(raw))
        self._check("relations", {column for each in self.relations for column in each.columns}, set(raw))
        # Of the validation rows as well, which may have rare ones.
        words = {name: stated or sorted(set(lines[name])) for name, stated in self.categorical.items()}
        domain = self._domain(low, high, words)
        labels = sorted(set(lines[self.label]))
        if self.normal and self.normal not in labels:
            some = ", ".join(labels[:6])
            raise InputError(f"{self.train}: normal = {self.normal!r}: no row has this label; there are {some} ...")
        classes = [self.normal, "attack"] if self.normal else labels

        def dataset(path: Path, lines: Mapping[str, Sequence[str]], rows: Indices) -> ImageDataset:
            """Builds the split of some rows of a file."""
            numbers = [
                (self._numbers(path, name, lines[name])[rows] - low[name]) / (high[name] - low[name] or 1.0)
                for name in raw
            ]
            groups = [self._one_hot(path, name, lines[name], words[name])[rows] for name in words]
            features = np.concatenate(
                [np.stack(numbers, axis=1).clip(0.0, 1.0) if numbers else np.empty((len(rows), 0)), *groups], axis=1
            )
            found = np.array(lines[self.label])[rows]
            codes = [
                int(lines[self.label][k] != self.normal) if self.normal else self._code(path, k, lines, classes)
                for k in rows
            ]
            split = ImageDataset.of(torch.from_numpy(features).float(), torch.tensor(codes), classes)
            return replace(split, domain=domain, kinds=found if self.normal else None)

        found = {"train": dataset(self.train, lines, np.sort(train)), "val": dataset(self.train, lines, np.sort(val))}
        if self.test is None:
            return found | {"test": dataset(self.train, lines, np.sort(own_test))}
        tested = self._lines(self.test)
        self._check("columns of the training rows", set(lines), set(tested), f"{self.test}: ")
        return found | {"test": dataset(self.test, tested, np.arange(len(tested[self.label])))}

    def _lines(self, path: Path) -> dict[str, list[str]]:
        """Returns the columns of a file as text."""
        names, lines = self.read(path)
        if not lines:
            raise InputError(f"{path}: has no rows: check that it is the right file")
        self._check("label", {self.label}, set(names), f"{path}: ")
        self._check("drop", self.drop, set(names), f"{path}: ")
        if len(names) > len(set(names)):
            twice = next(name for k, name in enumerate(names) if name in names[:k])
            raise InputError(f"{path}: two columns are called {twice!r}; rename one")
        for number, line in enumerate(lines, start=1 if self.columns else 2):
            if len(line) != len(names):
                raise InputError(f"{path}: row {number} has {len(line)} values for {len(names)} columns: correct it")
            for name, value in zip(names, line, strict=True):
                if name not in self.drop and value in _MISSING:
                    raise InputError(f"{path}: row {number}, column {name}: the value is missing: fill it, or drop it")
        kept = [k for k, name in enumerate(names) if name not in self.drop]
        return {names[k]: [line[k] for line in lines] for k in kept}

    def _numeric(self, name: str) -> bool:
        return name != self.label and name not in self.categorical

    def _numbers(self, path: Path, name: str, values: Sequence[str]) -> NDArray[np.float64]:
        try:
            found = np.array(values, dtype=np.float64)
        except ValueError:
            found = np.array([_number(value) for value in values])
        bad = ~np.isfinite(found) | ((found != found.round()) if name in self.integer else False)
        if bad.any():
            k = int(bad.argmax())
            kind = "a whole number" if name in self.integer else "a number"
            remedy = "list the column under categorical" if name not in self.integer else "remove it from integer"
            raise self._wrong(path, k, name, f"{values[k]!r} is not {kind}: {remedy}")
        return found

    def _one_hot(self, path: Path, name: str, values: Sequence[str], words: Sequence[str]) -> NDArray[np.float64]:
        place = {word: k for k, word in enumerate(words)}
        for k, value in enumerate(values):
            if value not in place:
                raise self._wrong(path, k, name, f"unknown category {value!r}: list all categories under categorical")
        return np.eye(len(words))[[place[value] for value in values]]

    def _code(self, path: Path, k: int, lines: Mapping[str, Sequence[str]], classes: Sequence[str]) -> int:
        if (label := lines[self.label][k]) not in classes:
            raise self._wrong(path, int(k), self.label, f"{label!r} is not a class of the training rows")
        return classes.index(label)

    def _wrong(self, path: Path, k: int, name: str, what: str) -> InputError:
        return InputError(f"{existing(path)}: row {k + (1 if self.columns else 2)}, column {name}: {what}")

    def _bound(self, name: str, end: int, values: NDArray[np.float64]) -> float:
        if name in self.bounds:
            if len(self.bounds[name]) != 2:
                raise InputError(f"bounds: {name}: give two values, the least and the largest")
            low, high = self.bounds[name]
            if not low < high:
                raise InputError(f"bounds: {name}: the minimum {low} is not below the maximum {high}: correct them")
            return float((low, high)[end])
        return float(values.max() if end else values.min())

    def _check(self, what: str, given: set[str], known: set[str], where: str = "") -> None:
        if strange := sorted(given - known):
            some = ", ".join(sorted(known)[:6])
            raise InputError(f"{where}{what}: there is no such column {strange[0]!r}; there are {some} ...")

    def _domain(
        self, low: Mapping[str, float], high: Mapping[str, float], words: Mapping[str, Sequence[str]]
    ) -> Domain:
        column = [*low, *(name for name, own in words.items() for _ in own)]
        names = [*low, *(f"{name}={word}" for name, own in words.items() for word in own)]

        def among(chosen: set[str]) -> Tensor:
            return torch.tensor([name in chosen for name in column])

        ends = (
            torch.tensor([end.get(name, k) for name in column], dtype=torch.float64)
            for k, end in ((0.0, low), (1.0, high))
        )
        marks = (among(chosen) for chosen in (self.immutable, self.increasing, self.integer))
        (least, most), (fixed, raised, whole) = ends, marks
        groups = [len(own) for own in words.values()]
        return Domain(names, least, most, groups, fixed, raised, whole, self.relations, self.constrained)


def existing(path: Path) -> Path:
    """Returns the file itself, or the one packed as ``.xz`` or ``.gz``."""
    packed = (path.with_name(path.name + ending) for ending in ("", *_OPEN))
    return next((file for file in packed if file.is_file()), path)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _parquet(path: Path) -> tuple[list[str], Lines]:
    try:
        import pandas

        frame = pandas.read_parquet(path)
    except ImportError as error:
        raise InputError(f"{path}: Parquet needs pandas and pyarrow: install them, or save it as CSV") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({error}): check that it is complete") from error
    return [str(name) for name in frame.columns], frame.astype(str).where(frame.notna(), "").to_numpy().tolist()
