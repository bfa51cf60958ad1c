"""Signs of life of processes, and what to conclude from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

GRACE = 15.0
"""Seconds that a process which failed is given to say so itself, and launchers to end the run their way."""
VERDICT = "verdict: "


class Sign(NamedTuple):
    """A sign of life.

    Attributes:
        beat: Another number in every sign.
        done: Network calls or steps so far.
        state: ``connects``, ``works``, ``waits`` (for others, or for what cannot be counted), ``ended``, the verdict of
            rank zero, or why the process fails.
        host: Where it runs.
        process: Its number there.
        place: Function, file and line that it executes; empty while it waits for other processes.
    """

    beat: int
    done: int
    state: str
    host: str
    process: int
    place: str = ""


class Roll:
    """Who has given which sign of life when.

    Time is what ``age`` is told, in steps of this process's own clock: when a job is suspended as a whole and goes on
    hours later, nobody is older for it.

    Args:
        expected: Processes that should give signs.
        silence: Seconds after which a process without a new sign is lost.
        stall: Seconds after which a process that works, but gets nothing done, hangs; or all do.
        start: Seconds that the processes have to come, and to connect.
    """

    def __init__(self, expected: Sequence[int], silence: float, stall: float, start: float) -> None:
        self.expected, self.silence, self.stall, self.start = expected, silence, stall, start
        self.seconds = 0.0
        self.signs: dict[int, Sign] = {}
        self.silent: dict[int, float] = {}
        self.idle: dict[int, float] = {}

    def hear(self, rank: int, sign: Sign) -> None:
        """Takes down the latest sign of a process."""
        before = self.signs.get(rank)
        if before is None or sign.beat != before.beat:
            self.silent[rank] = 0.0
        if before is None or (sign.done, sign.state) != (before.done, before.state):
            self.idle[rank] = 0.0
        self.signs[rank] = sign

    def age(self, seconds: float) -> str | None:
        """Lets time pass; returns what is wrong, if something is."""
        self.seconds += seconds
        # Of what has ended, nothing more is expected.
        signs = {rank: sign for rank, sign in dict(self.signs).items() if sign.state != "ended"}
        for rank in signs:
            self.silent[rank] += seconds
            self.idle[rank] += seconds
        if lost := [rank for rank in signs if self.silent[rank] > self.silence]:
            return f"no sign of life for {self.silence:.0f} s from {self._named(lost)}"
        for rank, sign in signs.items():
            if sign.state.startswith(VERDICT):
                return sign.state.removeprefix(VERDICT)
            if sign.state not in ("connects", "works", "waits") and self.idle[rank] > GRACE:
                return f"{self._named([rank])} {sign.state}"
        return self._not_started(signs) or self._standing(signs)

    def _not_started(self, signs: Mapping[int, Sign]) -> str | None:
        if self.seconds <= self.start:
            return None
        if absent := [rank for rank in self.expected if rank not in self.signs]:
            missing = _listed([f"rank {rank}" for rank in absent])
            came = f"{len(self.signs)} of {len(self.expected)} processes came" if self.signs else "nobody answered"
            return (
                f"{came} within {self.start:.0f} s, {missing} did not: see what it printed, and whether all were "
                "started with the same address, port and number of processes (--watch.start gives more time)"
            )
        if len(self.expected) > 1 and (left := [rank for rank, sign in signs.items() if sign.state == "connects"]):
            return (
                f"all {len(self.expected)} processes came, but within {self.start:.0f} s no connections stood between "
                f"{self._named(left)}: check firewall and interfaces (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
            )
        return None

    def _standing(self, signs: Mapping[int, Sign]) -> str | None:
        # Who waits in a collective is not to blame for it.
        working = [rank for rank, sign in signs.items() if sign.state == "works" and sign.place]
        if any(self.idle[rank] > self.stall for rank in working):
            # In a training all stand still, and those who wait for the others are ahead by a step.
            standing = [rank for rank in working if self.idle[rank] > 0.9 * self.stall]
            least = min(signs[rank].done for rank in standing)
            behind = [rank for rank in standing if signs[rank].done == least]
        elif signs and all(self.idle[rank] > self.stall for rank in signs):
            # All wait for one that does not wait for them.
            behind = [rank for rank, sign in signs.items() if sign.place] or list(signs)
        else:
            return None
        return f"nothing done for {self.stall:.0f} s by {self._named(behind, place=True)}"

    def _named(self, ranks: Sequence[int], place: bool = False) -> str:
        names = []
        for rank in ranks:
            sign = self.signs[rank]
            where = f", in {sign.place}" if place and sign.place else ""
            names.append(f"rank {rank} ({sign.host}, process {sign.process}{where})")
        return _listed(names)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
