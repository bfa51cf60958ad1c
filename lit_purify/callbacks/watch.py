"""Processes that watch each other: one that dies or hangs ends the run under its name, not in a silent wait."""

from __future__ import annotations

import atexit
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch._C._distributed_c10d import PrefixStore, TCPStore

from lit_purify.callbacks.roll import GRACE, VERDICT, Roll, Sign
from lit_purify.errors import INTERRUPTED, InputError
from lit_purify.models import Classifier, Denoiser

_FOREVER = timedelta(days=365)
_GONE = "by peer|remote process exited|Connection reset|Connection refused|Broken pipe|Failed to recv|remote server"


class Watch(Callback):
    """Each process gives signs of life through a store; rank zero heeds all, all heed rank zero.

    Collectives may then wait for as long as they must: the processes of an evaluation may finish hours apart.

    Args:
        silence: Seconds without a sign of life after which a process is lost (dead, stopped, unreachable).
        stall: Seconds after which a process hangs that is alive, but finishes no network call (evaluation) or step;
            or all hang, wherever they are.
        start: Seconds that all processes have to come and to connect; meanwhile rank zero may fetch the data.
    """

    def __init__(self, silence: float = 60.0, stall: float = 1800.0, start: float = 600.0) -> None:
        for name, value in (("silence", silence), ("stall", stall), ("start", start)):
            if value <= 0:
                raise InputError(f"watch.{name} = {value}: use more than 0 seconds")
        self.silence, self.stall, self.start = silence, stall, start
        # Often enough that one sign which comes late is no silence.
        self.interval = min(5.0, silence / 10.0, stall / 10.0, start / 4.0)
        self.done, self.state = 0, "connects"
        self.threads: list[threading.Thread] = []
        self.children: list[subprocess.Popen[bytes]] = []

    def attend(self, trainer: L.Trainer) -> None:
        """Watches the runs of a trainer, from when their processes begin to look for each other.

        Callbacks are told of a run only when all processes are connected.
        """
        strategy: Any = trainer.strategy
        connect = strategy.setup_environment

        def watched() -> None:
            if trainer.world_size > 1:
                self._begin(trainer, strategy)
            with _interruptible():
                connect()
            if self.threads:
                # Each has given a sign, and heard those it heeds, before anything else can go wrong.
                self._publish("waits", self.start)

        strategy.setup_environment = watched

    def _begin(self, trainer: L.Trainer, strategy: Any) -> None:  # noqa: ANN401
        self.rank, self.done, self.state = trainer.global_rank, 0, "connects"
        self.heeded = range(trainer.world_size) if self.rank == 0 else range(1)
        # Rank zero judges who stands still: it alone knows of all.
        self.roll = Roll(self.heeded, self.silence, self.stall if self.rank == 0 else math.inf, self.start)
        self.ended, self.news, self.published = threading.Event(), threading.Event(), threading.Event()
        # Who waits too long is ended from here, with more to say.
        strategy._timeout = _FOREVER
        if started := getattr(strategy.launcher, "procs", None):
            # Lightning's observer would kill this process as soon as one of them has failed, and nobody would say why.
            self.children = strategy.launcher.procs = [*started]
            started.clear()
        environment = strategy.cluster_environment
        # Two threads, because a store on a host that is gone lets who asks it wait.
        self.threads = [
            threading.Thread(target=work, args=arguments, daemon=True)
            for work, arguments in (
                (self._exchange, (environment.main_address, environment.main_port)),
                (self._judge, ()),
            )
        ]
        for thread in self.threads:
            thread.start()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Counts network calls: a batch may take hours."""
        if self.threads:
            self.state = "works"
            for network in pl_module.modules():
                if isinstance(network, (Classifier, Denoiser)):
                    network.register_forward_pre_hook(self._tick)

    on_predict_start = on_test_start

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Counts batches."""
        self.state = "works"

    on_validation_start = on_train_start

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """A batch."""
        self.done += 1

    on_validation_batch_start = on_predict_batch_start = on_train_batch_start

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From now on it waits for the others, or for rank zero."""
        self.state = "waits"

    on_train_end = on_predict_end = on_test_epoch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Likewise, unless the training goes on."""
        if trainer.state.fn == "validate":
            self.state = "waits"

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes leave of the others."""
        self._leave("ended")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Tells the others why; one that lost its connection waits to learn who is to blame."""
        if self.threads and lost_connection(exception):
            # Ended by the verdict, unless there is none.
            self.threads[1].join(self.silence + GRACE + 3.0 * self.interval)
        stopped = isinstance(exception, KeyboardInterrupt)
        reason = "" if stopped else f": {type(exception).__name__}: {' '.join(str(exception).split())[:300]}"
        self._leave("was stopped" if stopped else f"failed{reason}")

    def _tick(self, *_: object) -> None:
        self.done += 1

    def _leave(self, state: str) -> None:
        if self.threads:
            self._publish(state, 2.0 * self.interval if self.roll.signs else 0.0)
            if self.rank == 0 and state.startswith("failed"):
                # The store may go away with this process: the others ask as often as this one.
                self.ended.wait(2.0 * self.interval)
            self.ended.set()
            self.news.set()
            # Not amid a question to a store that goes away with this process.
            self.threads[0].join(1.0)
            self.threads = []

    def _publish(self, state: str, seconds: float) -> None:
        """Makes sure that the others can know."""
        self.state = state
        self.published.clear()
        self.news.set()
        self.published.wait(seconds)

    def _sign(self, beat: int) -> str:
        return json.dumps(Sign(beat, self.done, self.state, socket.gethostname(), os.getpid(), _place()))

    def _exchange(self, host: str, port: int) -> None:
        beat = 0
        try:
            # A connection of its own: one that waits in a collective must not silence it.
            server = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_FOREVER)
            store = PrefixStore("lit_purify/watch", server)
            while not self.ended.is_set():
                beat += 1
                sign = self._sign(beat)
                store.set(str(self.rank), sign)
                came = [rank for rank in self.heeded if rank in self.roll.signs or store.check([str(rank)])]
                for rank, said in zip(came, store.multi_get([str(rank) for rank in came]), strict=True):
                    self.roll.hear(rank, Sign(*json.loads(said)))
                # Of one that was never heard nobody could say that it fell silent.
                heard = len(self.roll.signs) == len(self.heeded)
                if heard and Sign(*json.loads(sign)).state == self.state:
                    self.published.set()
                self.news.wait(self.interval if heard else min(self.interval, 0.1))
                self.news.clear()
        except (RuntimeError, ValueError):
            # Who cannot be asked any more falls silent.
            return

    def _judge(self) -> None:
        fallen: set[int] = set()
        while not self.ended.wait(self.interval):
            for local, child in enumerate(self.children, 1):
                if child.poll() and child.pid in fallen:
                    status = child.returncode
                    killed = status < 0
                    how = f"was killed by {signal.Signals(-status).name}" if killed else f"ended with status {status}"
                    who = f"rank {self.rank + local} ({socket.gethostname()}, process {child.pid})"
                    self._end(f"{who} {how}", INTERRUPTED if killed else status)
                if child.returncode:
                    # This process may be about to fail alike, and to say so better.
                    fallen.add(child.pid)
            if verdict := self.roll.age(self.interval):
                self._end(verdict, INTERRUPTED)

    def _end(self, verdict: str, status: int) -> NoReturn:
        """Ends this process, whose main thread may wait in a collective for ever."""
        if self.rank == 0 or self.children or 0 not in self.roll.signs or "from rank 0 " in verdict:
            print(
                f"error: {verdict}; the run ends, the same command goes on from here",
                file=sys.stderr,
                flush=True,
            )
        if self.rank == 0:
            self._publish(VERDICT + verdict, 2.0 * self.interval)
            # The others ask as often as this one.
            self.ended.wait(2.0 * self.interval)
        for child in self.children:
            child.kill()
        sys.stdout.flush()
        os._exit(status)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lets Ctrl-C end the process at once where Python's handler is not heard: in torch's wait for the others."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _place() -> str:
    """What the main thread executes; empty while it waits for other processes."""
    stack = list(traceback.walk_stack(sys._current_frames()[threading.main_thread().ident or 0]))
    if any(str(frame.f_globals.get("__name__")).startswith("torch.distributed") for frame, _ in stack):
        return ""
    code = stack[0][0].f_code
    return f"{code.co_name} ({Path(code.co_filename).name}:{stack[0][1]})"


def leave(status: int) -> NoReturn:
    """As ``sys.exit``, except that the interpreter does not take apart what threads of a process group still use.

    That ends in a segmentation fault now and then.
    """
    if dist.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone."""
    return isinstance(error, RuntimeError) and re.search(_GONE, str(error)) is not None
