"""Processes that watch each other: one that dies or hangs ends the run under its name, not in a silent wait."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterable
from datetime import timedelta
from typing import NamedTuple, NoReturn

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from lit_purify.errors import INTERRUPTED, InputError
from lit_purify.tasks import RobustnessTask

_GRACE = 15.0
"""Seconds that a process which failed is given to say so itself, and launchers to end the run their way."""
_FOREVER = timedelta(days=365)
_GONE = "by peer|remote process exited|Connection reset|Connection refused|Broken pipe|Failed to recv|remote server"
_VERDICT = "verdict: "


class Sign(NamedTuple):
    """A sign of life.

    Attributes:
        beat: Another number in every sign.
        done: Network calls or steps so far.
        state: ``works``, ``waits`` (for others, or for what cannot be counted), ``ended``, the verdict of rank zero, or
            why the process fails.
        host: Where it runs.
        process: Its number there.
    """

    beat: int
    done: int
    state: str
    host: str
    process: int


class Roll:
    """Who has given which sign of life when.

    Time is what ``age`` is told, in steps of this process's own clock: when a job is suspended as a whole and goes on
    hours later, nobody is older for it.

    Args:
        silence: Seconds after which a process without a new sign is lost.
        stall: Seconds after which a process that works, but gets nothing done, hangs.
    """

    def __init__(self, silence: float, stall: float) -> None:
        self.silence, self.stall = silence, stall
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
        # Of what has ended, nothing more is expected.
        signs = {rank: sign for rank, sign in dict(self.signs).items() if sign.state != "ended"}
        for rank in signs:
            self.silent[rank] += seconds
            self.idle[rank] += seconds
        if lost := [rank for rank in signs if self.silent[rank] > self.silence]:
            return f"no sign of life for {self.silence:.0f} s from {self._named(lost)}"
        for rank, sign in signs.items():
            if sign.state.startswith(_VERDICT):
                return sign.state.removeprefix(_VERDICT)
            if sign.state not in ("works", "waits") and self.idle[rank] > _GRACE:
                return f"{self._named([rank])} {sign.state}"
        working = [rank for rank, sign in signs.items() if sign.state == "works"]
        if any(self.idle[rank] > self.stall for rank in working):
            # In a training all stand still, and those who wait for the others are ahead by a step.
            standing = [rank for rank in working if self.idle[rank] > 0.9 * self.stall]
            least = min(signs[rank].done for rank in standing)
            behind = [rank for rank in standing if signs[rank].done == least]
            return f"nothing done for {self.stall:.0f} s by {self._named(behind)}"
        return None

    def _named(self, ranks: Iterable[int]) -> str:
        names = [f"rank {rank} ({self.signs[rank].host}, process {self.signs[rank].process})" for rank in ranks]
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


class Watch(Callback):
    """Each process gives signs of life through the store of the process group; rank zero heeds all, all heed rank zero.

    Collectives may then wait for as long as they must: the processes of an evaluation may finish hours apart.

    Args:
        silence: Seconds without a sign of life after which a process is lost (dead, stopped, unreachable).
        stall: Seconds after which a process hangs that is alive, but finishes no network call (evaluation) or step.
    """

    def __init__(self, silence: float = 60.0, stall: float = 1800.0) -> None:
        for name, value in (("silence", silence), ("stall", stall)):
            if value <= 0:
                raise InputError(f"watch.{name} = {value}: use more than 0 seconds")
        self.silence, self.stall = silence, stall
        # Often enough that one sign which comes late is no silence.
        self.interval = min(5.0, silence / 10.0)
        self.done, self.state = 0, "waits"
        self.roll = Roll(silence, stall)
        self.ended = threading.Event()
        self.threads: list[threading.Thread] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Starts to give and to heed signs of life."""
        if trainer.world_size == 1 or not dist.is_initialized():
            return
        self.trainer, self.rank = trainer, trainer.global_rank
        self.done, self.state, self.roll = 0, "waits", Roll(self.silence, self.stall)
        self.ended = threading.Event()
        self.news, self.published = threading.Event(), threading.Event()
        # A connection of its own: one that waits in a collective must not silence it.
        store = PrefixStore("lit_purify/watch", _get_default_store().clone())
        store.set(str(self.rank), self._sign(0))
        trainer.strategy.barrier("watch")
        dist.set_timeout(_FOREVER)
        # Two threads, because a store on a host that is gone lets who asks it wait.
        self.threads = [
            threading.Thread(target=work, args=arguments, daemon=True)
            for work, arguments in ((self._exchange, (store,)), (self._judge, ()))
        ]
        for thread in self.threads:
            thread.start()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Counts network calls: a batch may take hours."""
        if self.threads and isinstance(pl_module, RobustnessTask):
            self.state = "works"
            for network in (pl_module.classifier, pl_module.denoiser):
                network.register_forward_pre_hook(self._tick)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From now on it waits for the others."""
        self.state = "waits"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Counts batches."""
        self.state = "works"

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """A batch."""
        self.done += 1

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A batch."""
        self.done += 1

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What comes now is rank zero's."""
        self.state = "waits"

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes leave of the others."""
        self._leave("ended")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Tells the others why; one that lost its connection waits to learn who is to blame."""
        if self.threads and lost_connection(exception):
            # Ended by the verdict, unless there is none.
            self.threads[1].join(self.silence + _GRACE + 3.0 * self.interval)
        stopped = isinstance(exception, KeyboardInterrupt)
        reason = "" if stopped else f": {type(exception).__name__}: {' '.join(str(exception).split())[:300]}"
        self._leave("was stopped" if stopped else f"failed{reason}")

    def _tick(self, *_: object) -> None:
        self.done += 1

    def _leave(self, state: str) -> None:
        if self.threads:
            self._publish(state)
            self.ended.set()
            self.news.set()
            self.threads = []

    def _publish(self, state: str) -> None:
        """Makes sure that the others can know."""
        self.state = state
        self.published.clear()
        self.news.set()
        self.published.wait(2.0 * self.interval)

    def _sign(self, beat: int) -> str:
        return json.dumps(Sign(beat, self.done, self.state, socket.gethostname(), os.getpid()))

    def _exchange(self, store: Store) -> None:
        heeded = [rank for rank in range(self.trainer.world_size) if rank != self.rank] if self.rank == 0 else [0]
        beat = 0
        while not self.ended.is_set():
            beat += 1
            sign = self._sign(beat)
            try:
                store.set(str(self.rank), sign)
                found = store.multi_get([str(rank) for rank in heeded])
            except (RuntimeError, ValueError):
                # Who cannot be asked any more falls silent.
                return
            for rank, said in zip(heeded, found, strict=True):
                self.roll.hear(rank, Sign(*json.loads(said)))
            if Sign(*json.loads(sign)).state == self.state:
                self.published.set()
            self.news.wait(self.interval)
            self.news.clear()

    def _judge(self) -> None:
        while not self.ended.wait(self.interval):
            if verdict := self.roll.age(self.interval):
                self._end(verdict)

    def _end(self, verdict: str) -> NoReturn:
        """Ends this process, whose main thread may wait in a collective for ever."""
        if self.rank == 0 or "from rank 0 " in verdict:
            print(f"error: {verdict}; the run ends, the same command goes on from here", file=sys.stderr, flush=True)
        if self.rank == 0:
            self._publish(_VERDICT + verdict)
            # The others ask as often as this one.
            self.ended.wait(2.0 * self.interval)
            if self.trainer.strategy.launcher is not None:
                self.trainer.strategy.launcher.kill(signal.SIGKILL)
        sys.stdout.flush()
        os._exit(INTERRUPTED)


def lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone."""
    return isinstance(error, RuntimeError) and re.search(_GONE, str(error)) is not None
