"""Rows of tables: fields of features, and the rows that an attacker can produce."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lit_purify.errors import InputError

_SIDE = re.compile(r"\s*([\w.-]+)\s*(?:([-+*/])\s*([\w.-]+)\s*)?")
_SLACK = 0.01
"""Tolerance of relations, in units of their columns: rates are often rounded to two decimals."""


def fields(features: int, onehot: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Returns the field number of each feature, (F,): one field per number and one per one-hot group.

    Args:
        features: F.
        onehot: Widths of the one-hot groups, which are the last features of a row.
        device: Device of the result.

    Raises:
        InputError: The groups are wider than the row.
    """
    numbers = features - sum(onehot)
    if numbers < 0:
        raise InputError(f"onehot: the groups have {sum(onehot)} features, a row has {features}: correct the widths")
    widths = torch.tensor([1] * numbers + list(onehot), device=device)
    return torch.arange(len(widths), device=device).repeat_interleave(widths)


def random_fields(like: Tensor, draws: Tensor, onehot: Sequence[int]) -> Tensor:
    """Returns a random subset of the fields of each row, (B, F) in {0, 1}, as masks for denoiser training.

    Args:
        like: (B, F).
        draws: Uniform in [0, 1), (B, F + 1): the size of the subset, then one number per feature.
        onehot: See ``fields``.
    """
    of = fields(like.shape[1], onehot, like.device)
    return (draws[:, 1:][:, of] < draws[:, :1]).to(like.dtype)


def one_hot(row: Tensor, onehot: Sequence[int]) -> Tensor:
    """Sets the largest value of each one-hot group to 1 and the others to 0, with a straight-through gradient.

    Args:
        row: (B, F).
        onehot: See ``fields``.
    """
    numbers = row.shape[1] - sum(onehot)
    groups = row.detach()[:, numbers:].split_with_sizes(list(onehot), dim=1) if onehot else []
    hard = [torch.zeros_like(group).scatter(1, group.argmax(dim=1, keepdim=True), 1.0) for group in groups]
    # The added term is 0 and carries the gradient.
    return torch.cat([row.detach()[:, :numbers], *hard], dim=1) + (row - row.detach())


class Relation(NamedTuple):
    """``left = right`` or ``left <= right``; each side is a column, a number, or two of them joined by + - * or /."""

    text: str
    left: tuple[str, ...]
    equal: bool
    right: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Relation:
        """Parses a relation.

        Raises:
            InputError: The text is not a relation.
        """
        left, sign, right = [*re.split(r"(<=|=)", text), "", ""][:3]
        sides = [_SIDE.fullmatch(side) for side in (left, right)]
        if sides[0] is None or sides[1] is None or text.count("=") != 1 or (sign == "=" and sides[0][2]):
            raise InputError(
                f"relations: {text!r} is not of the form 'a <= b', 'a + b <= 1' or 'a = b / c', with column names "
                "without spaces"
            )
        first, second = (tuple(part for part in side.groups() if part) for side in sides if side)
        relation = cls(text, first, sign == "=", second)
        if not relation.columns or (relation.equal and _is_number(first[0])):
            raise InputError(f"relations: {text!r} names no column, or none before '=': add it")
        return relation

    @property
    def columns(self) -> list[str]:
        """Names of the columns in the relation."""
        return [part for side in (self.left, self.right) for part in side[::2] if not _is_number(part)]


@dataclass(frozen=True, eq=False)
class Domain:
    """The features of a table row and the rows that an attacker can produce from it.

    Features lie in [0, 1]: first min-max scaled numbers, then one-hot groups. A relation applies to rows that satisfy
    it before the attack.

    Attributes:
        names: Name of each feature: column, or ``column=category``.
        low: Column value that is scaled to 0, (F,) float64.
        high: Column value that is scaled to 1, (F,) float64.
        onehot: Widths of the one-hot groups.
        fixed: Features that an attacker cannot change, (F,) bool.
        raised: Features that an attacker can only increase, (F,) bool.
        whole: Features with integer values, (F,) bool.
        relations: Relations between columns.
        constrained: Whether attacks must respect the domain.
    """

    names: Sequence[str]
    low: Tensor
    high: Tensor
    onehot: Sequence[int]
    fixed: Tensor
    raised: Tensor
    whole: Tensor
    relations: Sequence[Relation] = ()
    constrained: bool = True
    place: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "place", {name: k for k, name in enumerate(self.names)})

    @property
    def span(self) -> Tensor:
        """Range of the values, (F,); 1 for constant columns."""
        return torch.where(self.high > self.low, self.high - self.low, 1.0)

    def stated(self) -> list[list[str | float]]:
        """Returns name, minimum and maximum of each feature, for a summary."""
        return [list(each) for each in zip(self.names, self.low.tolist(), self.high.tolist(), strict=True)]

    def values(self, row: Tensor) -> Tensor:
        """Returns rows (B, F) in the units of their columns, float64."""
        return self.low.to(row.device) + self.span.to(row.device) * row.double()

    def project(self, point: Tensor, row: Tensor) -> Tensor:
        """Resets the features of a point that may not change, or not in this direction, to the row's; both (B, F)."""
        fixed, raised = self.fixed.to(row.device), self.raised.to(row.device)
        return torch.where(fixed | (raised & (point < row)), row, point)

    def repair(self, point: Tensor, row: Tensor, eps: float) -> Tensor:
        """Repairs a point to a row that an attacker could send; straight-through gradient where values are rounded.

        Integers are rounded towards the row, one-hot groups to one category, and dependent columns are recomputed.
        Columns of a relation that cannot hold are reset to the row's. A point that is beyond repair is reset as a
        whole.

        Args:
            point: (B, F) in [0, 1].
            row: The original row, (B, F).
            eps: Largest change of a feature.
        """
        point, span = self.project(point, row), self.span.to(row.device)
        steps = (point.detach() - row).double() * span
        # Integers up to rounding errors count as integers.
        rounded = (row + (steps + 1e-3 * steps.sign()).trunc() / span).to(row.dtype)
        point = torch.where(self.whole.to(row.device), rounded + (point - point.detach()), point)
        # Changing a category changes two features by 1, which needs eps >= 1.
        numbers = len(self.names) - sum(self.onehot)
        point = one_hot(point, self.onehot) if eps >= 1.0 else torch.cat([point[:, :numbers], row[:, numbers:]], dim=1)
        for relation in self.relations:
            point = self._kept(relation, point, row, eps)
        return torch.where(self.violations(point.detach(), row)[:, None], row, point)

    def violations(self, point: Tensor, row: Tensor) -> Tensor:
        """Marks points (B, F) that an attacker cannot produce from these rows, (B,) bool."""
        found = (self.project(point, row) != point).any(dim=1)
        off = (self.values(point) - self.values(row)).where(self.whole.to(row.device), 0.0)
        # Digits of a float32 in [0, 1].
        found |= ((off - off.round()).abs() > 2e-3 + 2.0**-22 * self.span.to(row.device)).any(dim=1)
        found |= (one_hot(point, self.onehot) != point).any(dim=1)
        for relation in self.relations:
            found |= self._binds(relation, row) & (self._excess(relation, point, row) > 1.01 * _SLACK)
        return found

    def penalty(self, point: Tensor, row: Tensor) -> Tensor:
        """Returns how far points break the relations of their rows, (B,), as a fraction of the columns' spans."""
        total = torch.zeros_like(point[:, 0])
        for relation in self.relations:
            scale = self.span[self.place[relation.columns[0]]]
            excess = self._excess(relation, point, row).clamp(min=0.0) / scale
            total = total + torch.where(self._binds(relation, row), excess, 0.0).to(point.dtype)
        return total

    def _kept(self, relation: Relation, point: Tensor, row: Tensor, eps: float) -> Tensor:
        """Enforces one relation."""
        place, binds = [self.place[name] for name in relation.columns], self._binds(relation, row)
        if relation.equal:
            first = place[0]
            moved = self._side(relation.right, point) - self._side(relation.right, row)
            value = (row[:, first] + moved / self.span[first].to(row.device)).to(point.dtype)
            point = point.index_copy(
                1, torch.tensor(place[:1], device=row.device), torch.where(binds, value, point[:, first])[:, None]
            )
            inside = (value >= 0.0) & (value <= 1.0) & ((value - row[:, first]).abs() <= eps)
            broken = binds & ~inside
        else:
            broken = binds & (self._excess(relation, point, row) > _SLACK)
        columns = torch.zeros_like(self.fixed).index_fill(0, torch.tensor(place), True).to(row.device)
        return torch.where(broken[:, None] & columns, row, point)

    def _side(self, side: tuple[str, ...], row: Tensor) -> Tensor:
        """Value of a side of a relation, (B,)."""

        def value(part: str) -> Tensor:
            if _is_number(part):
                return torch.full_like(row[:, 0], float(part), dtype=torch.float64)
            k = self.place[part]
            return self.low[k].to(row.device) + self.span[k].to(row.device) * row[:, k].double()

        if len(side) == 1:
            return value(side[0])
        a, b = value(side[0]), value(side[2])
        if side[1] == "/":
            return torch.where(b == 0.0, 0.0, a / torch.where(b == 0.0, 1.0, b))
        return a + b if side[1] == "+" else a - b if side[1] == "-" else a * b

    def _excess(self, relation: Relation, point: Tensor, row: Tensor) -> Tensor:
        """Returns the violation, (B,), in units of the columns; for an equation, relative to that of the row."""
        gap = self._gap(relation, point)
        return (gap - self._gap(relation, row)).abs() if relation.equal else gap

    def _binds(self, relation: Relation, row: Tensor) -> Tensor:
        """Marks the rows that satisfy the relation, (B,) bool."""
        gap = self._gap(relation, row)
        return (gap.abs() if relation.equal else gap) <= _SLACK

    def _gap(self, relation: Relation, row: Tensor) -> Tensor:
        """Returns left minus right, (B,), in units of the columns."""
        return self._side(relation.left, row) - self._side(relation.right, row)


def _is_number(part: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?", part) is not None
