"""Findings of checks, and the test whether a second attack is significantly stronger than a first."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lit_purify.errors import notice

Verdict = Literal["pass", "fail", "note", "not applicable"]


@dataclass(frozen=True)
class Finding:
    """The result of one check of one defense.

    Attributes:
        defense: Name of the defense.
        check: Name of the check.
        figure: The measured value; for comparisons the overstatement of robust accuracy by the configured attack.
        limit: Largest value that passes; ``None`` if there is none.
        verdict: ``pass``, ``fail``, ``note`` (nothing to judge, or undecided) or ``not applicable``.
        reason: Explanation in words.
    """

    defense: str
    check: str
    figure: float
    limit: float | None
    verdict: Verdict
    reason: str

    @property
    def passed(self) -> bool:
        """Whether it did not fail."""
        return self.verdict != "fail"

    def json(self) -> dict[str, Any]:
        """Returns JSON values for ``audit.json`` and ``gradcheck.json``; values that are not finite become ``null``."""
        return {**asdict(self), "figure": self.figure if -torch.inf < self.figure < torch.inf else None}

    def __str__(self) -> str:
        """Returns a line of a table."""
        limit = "" if self.limit is None else f"{self.limit:.2g}"
        shown = {"fail": "FAIL", "not applicable": "n/a"}.get(self.verdict, self.verdict)
        return f"{shown:4}  {self.defense:14}  {self.check:18}  {self.figure:8.2g}  {limit:6}  {self.reason}"


class Findings(list[Finding]):
    """Findings of ``audit`` or ``gradcheck``, and the verdict over all of them.

    Attributes:
        undecided: Why the findings do not suffice for a verdict; empty if they do.
        facts: Settings of the checks (samples, runs, ...), as JSON values.
    """

    undecided: str = ""
    facts: Mapping[str, Any] = {}

    def take(self, findings: Iterable[Finding], say: Callable[[str], None]) -> None:
        """Adds findings and reports a line for each immediately."""
        for finding in findings:
            self.append(finding)
            say(str(finding))

    @property
    def failed(self) -> list[Finding]:
        """The failed findings."""
        return [finding for finding in self if not finding.passed]

    @property
    def verdict(self) -> Literal["passed", "failed", "undecided"]:
        """The verdict over all findings."""
        return "failed" if self.failed else "undecided" if self.undecided else "passed"

    @property
    def passed(self) -> bool:
        """Whether the verdict is ``passed``."""
        return self.verdict == "passed"

    def json(self) -> dict[str, Any]:
        """Returns the content of ``audit.json`` or ``gradcheck.json``."""
        state = {"schema": 1, "passed": self.passed, "undecided": self.verdict == "undecided"}
        return {**state, **self.facts, "checks": [finding.json() for finding in self]}

    @property
    def conclusion(self) -> str:
        """The last line of the report."""
        if self.verdict == "undecided":
            return f"UNDECIDED: {self.undecided}"
        if self.verdict == "passed":
            return f"passed, {len(self)} checks"
        blamed = dict.fromkeys(f"{finding.defense} ({finding.check})" for finding in self.failed)
        return f"FAILED: not to be believed: {', '.join(blamed)}"

    def __repr__(self) -> str:
        """Returns the findings, one per line, and the conclusion."""
        return "\n".join([*map(str, self), self.conclusion])


@dataclass(frozen=True)
class Comparison:
    """A comparison with another attack, judged together with the others.

    Attributes:
        excess: Outcomes under the configured attack minus those under the other, (B,); ``None``: not applicable.
        rule: Index of the accuracy.
        other: Description of the other attack, or the reason why there is none.
        meaning: Interpretation if the other attack is stronger.
    """

    check: str
    excess: Tensor | None
    rule: int
    other: str
    meaning: str


def sign_flip(excess: Tensor, runs: int) -> float:
    """Returns the exact one-sided p-value of paired differences, (B,) multiples of 1 / ``runs``.

    This is Fisher's randomization test (The Design of Experiments, 1935, section 21) of the hypothesis that the two
    attacks are interchangeable for each sample; it is conservative if the second is weaker. The runs of a sample are
    not independent and share one sign. For differences of -1, 0 and 1 it is McNemar's exact test.
    """
    counts = (excess.double().cpu() * runs).round().long()
    total = int(counts.abs().sum())
    chance = torch.zeros(2 * total + 1, dtype=torch.float64)
    chance[total] = 1.0
    for size in counts.abs().tolist():
        # The ends are reached only by the last sample, so nothing wraps around.
        chance = (chance.roll(size) + chance.roll(-size)) / 2.0
    return float(chance[total + int(counts.sum()) :].sum())


def holm(chances: Sequence[float]) -> list[float]:
    """Adjusts p-values for their number (Holm 1979); returns them in the same order.

    At any level, the probability of a false rejection is at most the level, for any dependence between the tests.
    """
    adjusted, highest = [0.0] * len(chances), 0.0
    for rank, k in enumerate(sorted(range(len(chances)), key=lambda k: chances[k])):
        highest = max(highest, min(1.0, (len(chances) - rank) * chances[k]))
        adjusted[k] = highest
    return adjusted


def least_samples(comparisons: int, level: float) -> int:
    """Returns the number of samples from which losing half of them in all runs is significant."""
    return 2 * math.ceil(math.log2(max(1, comparisons) / level))


class Memory:
    """Results of an interrupted audit: a file with a line of JSON for each comparison.

    Args:
        path: The file.
        about: Hash of everything that the results depend on; a file with another hash is discarded.
    """

    def __init__(self, path: Path, about: str) -> None:
        self.path = path
        self.known: dict[str, Tensor] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines[1:] if lines[:1] == [about] else ():
            # A killed audit may leave an incomplete line.
            with contextlib.suppress(ValueError):
                name, values = json.loads(line)
                self.known[name] = torch.tensor(values, dtype=torch.float64)
        if lines and lines[0] != about:
            notice(f"{path}: measured with other settings, starting over")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join([about + "\n", *map(self._line, self.known)]))

    def _line(self, name: str) -> str:
        return json.dumps([name, self.known[name].tolist()]) + "\n"

    def __call__(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Returns the outcomes of a comparison, (B, 3), from the file, or computed and written to it."""
        if name not in self.known:
            self.known[name] = compute()
            with self.path.open("a") as stream:
                stream.write(self._line(name))
        return self.known[name]
