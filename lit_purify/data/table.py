"""Your own tables: rows of numbers and categories, and the changes that an attacker can make."""

from __future__ import annotations

import csv
import gzip
import lzma
import math
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import override

from lit_purify.data.base import ImageDataModule, ImageDataset, shuffled
from lit_purify.data.subset import Subset
from lit_purify.errors import InputError
from lit_purify.functional.rows import Domain, Relation
from lit_purify.recorded import path_sha256

Lines = dict[int, list[str]]
"""Rows of a file as text, by their line numbers."""
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

    source = ""
    """Name and web address of a public dataset, for the message about missing files."""

    def __init__(
        self,
        train: str | Path,
        label: str,
        test: str | Path | None = None,
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
        for name, ends in (bounds or {}).items():
            if len(ends) != 2 or not ends[0] < ends[1]:
                raise InputError(f"bounds: {name}: give two values, the minimum below the maximum, not {list(ends)}")
        if used := ({label} | set(categorical or ())) & set(drop):
            raise InputError(f"drop: {min(used)!r} is the label, or listed under categorical: do not drop it")
        self.train, self.test = Path(train), None if test is None else Path(test)
        self.label, self.normal = label, normal
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
        """Reads names of columns and rows of a file; datasets override it to correct or leave out rows."""
        path = existing(path)
        if not path.is_file():
            raise InputError(f"{path}: no such file: {f'download {self.source}' if self.source else 'check the path'}")
        if path.suffix == ".parquet":
            return _parquet(path)
        try:
            with _OPEN.get(path.suffix, open)(path, "rt", encoding="utf-8-sig", newline="") as stream:
                reader = csv.reader(stream, skipinitialspace=True)
                numbered = ((reader.line_num, line) for line in reader if line)
                lines = dict(numbered)
        except (OSError, UnicodeDecodeError, lzma.LZMAError, zlib.error, csv.Error, EOFError) as error:
            raise InputError(f"{path}: cannot be read as CSV ({error}): check that it is complete") from error
        names = list(self.columns or (lines.pop(min(lines)) if lines else []))
        return names, lines

    @cached_property
    def _splits_of_files(self) -> dict[str, ImageDataset]:
        file = self._columns(self.train)
        labels = file.words[self.label]
        order = shuffled(len(labels), self.split_seed)
        cuts = [max(1, round(self.val_fraction * len(order)))]
        cuts.append(cuts[0] + (0 if self.test else max(1, round(self.test_fraction * len(order)))))
        val, own_test, train = np.split(order, cuts)
        if not len(train):
            raise InputError(f"{file.path}: has {len(order)} rows, too few for validation and training: give more")
        known = set(file.words) - {self.label}
        raw = {name: self._numbers(file, name) for name in file.words if name in known - set(self.categorical)}
        low = {name: float(values[train].min()) for name, values in raw.items()}
        high = {name: float(values[train].max()) for name, values in raw.items()}
        for what in ("immutable", "increasing", "integer", "bounds", "categorical"):
            _check(what, getattr(self, what), known if what in ("immutable", "categorical") else raw)
        _check("relations", {column for each in self.relations for column in each.columns}, raw)
        for name, (least, largest) in self.bounds.items():
            low[name], high[name] = float(least), float(largest)
        # Of the validation rows as well, which may have rare ones.
        words = {name: stated or sorted(set(file.words[name])) for name, stated in self.categorical.items()}
        classes = sorted(set(labels))
        if self.normal and self.normal not in classes:
            some = ", ".join(classes[:6])
            raise InputError(f"{file.path}: normal = {self.normal!r}: no row has this label; there are {some} ...")
        domain = self._domain(low, high, words)

        def dataset(file: _Columns) -> ImageDataset:
            numbers = [(self._numbers(file, name) - low[name]) / (high[name] - low[name] or 1.0) for name in raw]
            groups = [np.eye(len(own))[file.places(name, own)] for name, own in words.items()]
            features = np.concatenate([*(each[:, None] for each in numbers), *groups], axis=1).clip(0.0, 1.0)
            kinds = np.array(file.words[self.label])
            codes = kinds != self.normal if self.normal else np.array(file.places(self.label, classes))
            names = [self.normal, "attack"] if self.normal else classes
            split = ImageDataset.of(torch.from_numpy(features).float(), torch.from_numpy(codes), names)
            return replace(split, domain=domain, kinds=kinds if self.normal else None)

        whole = dataset(file)
        parts = {name: whole.part(np.sort(rows)) for name, rows in (("train", train), ("val", val))}
        if self.test is None:
            return parts | {"test": whole.part(np.sort(own_test))}
        tested = self._columns(self.test)
        _check("columns of the training rows", file.words, tested.words, f"{self.test}: ")
        return parts | {"test": dataset(tested)}

    def _columns(self, path: Path) -> _Columns:
        names, lines = self.read(path)
        if not lines:
            raise InputError(f"{path}: has no rows: check that it is the right file")
        _check("label", {self.label}, names, f"{path}: ")
        _check("drop", self.drop, names, f"{path}: ")
        if len(names) > len(set(names)):
            twice = next(name for k, name in enumerate(names) if name in names[:k])
            raise InputError(f"{path}: two columns are called {twice!r}; rename one")
        kept = [k for k, name in enumerate(names) if name not in self.drop]
        if len(kept) < 2:
            raise InputError(f"{path}: has no column but the label: check that columns are separated by commas")
        for number, line in lines.items():
            if len(line) != len(names):
                raise InputError(f"{path}: row {number} has {len(line)} values for {len(names)} columns: correct it")
        file = _Columns(existing(path), list(lines), {names[k]: [line[k] for line in lines.values()] for k in kept})
        for name, words in file.words.items():
            file.check(name, [word not in _MISSING for word in words], "the value is missing: fill it, or drop it")
        return file

    def _numbers(self, file: _Columns, name: str) -> NDArray[np.float64]:
        whole = name in self.integer
        try:
            found = np.array(file.words[name], dtype=np.float64)
        except ValueError:
            found = np.array([_number(word) for word in file.words[name]])
        good = np.isfinite(found) & ((found == found.round()) | (not whole))
        remedy = "a whole number: remove the column from integer" if whole else "a number: list it under categorical"
        file.check(name, good, f"{{!r}} is not {remedy}")
        return found

    def _domain(
        self, low: Mapping[str, float], high: Mapping[str, float], words: Mapping[str, Sequence[str]]
    ) -> Domain:
        column = [*low, *(name for name, own in words.items() for _ in own)]
        names = [*low, *(f"{name}={word}" for name, own in words.items() for word in own)]
        least = torch.tensor([low.get(name, 0.0) for name in column], dtype=torch.float64)
        most = torch.tensor([high.get(name, 1.0) for name in column], dtype=torch.float64)
        kinds = (self.immutable, self.increasing, self.integer)
        fixed, raised, whole = (torch.tensor([name in chosen for name in column]) for chosen in kinds)
        groups = [len(own) for own in words.values()]
        return Domain(names, least, most, groups, fixed, raised, whole, self.relations, self.constrained)


@dataclass(frozen=True)
class _Columns:
    """The columns of a file as text, by name, and the line number of each row."""

    path: Path
    numbers: Sequence[int]
    words: Mapping[str, Sequence[str]]

    def check(self, name: str, good: Sequence[bool] | NDArray[np.bool_], problem: str) -> None:
        """Raises an ``InputError`` about the first row that is not good; ``problem`` may show its value as {!r}."""
        if not np.all(good):
            k = int(np.argmin(good))
            what = problem.format(self.words[name][k])
            raise InputError(f"{self.path}: row {self.numbers[k]}, column {name}: {what}")

    def places(self, name: str, known: Sequence[str]) -> list[int]:
        """Returns the position of each value among the known ones."""
        place = {word: k for k, word in enumerate(known)}
        problem = "{!r} is not among the values of the training rows: list all under categorical, or correct it"
        self.check(name, [word in place for word in self.words[name]], problem)
        return [place[word] for word in self.words[name]]


def _check(what: str, given: Collection[str], known: Collection[str], where: str = "") -> None:
    if strange := sorted(set(given) - set(known)):
        some = ", ".join(sorted(known)[:6])
        raise InputError(f"{where}{what}: there is no such column {strange[0]!r}; there are {some} ...")


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
    rows = frame.astype(str).where(frame.notna(), "").to_numpy().tolist()
    # As in a CSV file, where the first line holds the names.
    return [str(name) for name in frame.columns], dict(enumerate(rows, start=2))
