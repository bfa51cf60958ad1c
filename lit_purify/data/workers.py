"""Worker processes of loaders: signals to whole process groups do not end them, their process does."""

from __future__ import annotations

import os
import signal
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any
from weakref import WeakSet

from torch.utils.data import DataLoader

_workers: WeakSet[BaseProcess] = WeakSet()
_prepared = 0


def ignore_signals(worker: int) -> None:
    """Initializes a worker: the main process ends its step when it is signaled, and needs its workers for that."""
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)


class Loader(DataLoader[dict[str, Any]]):
    """A loader whose workers end when this process exits, also amid a batch.

    At exit Python asks daemonic children to end by a SIGTERM, and waits for them.
    """

    def _get_iterator(self) -> Any:  # noqa: ANN401
        global _prepared
        if _prepared != os.getpid():
            # Those of the process that this one was forked from are none of its children.
            _prepared = os.getpid()
            _workers.clear()
            Finalize(None, _kill, exitpriority=100)
        iterator = super()._get_iterator()
        _workers.update(getattr(iterator, "_workers", ()))
        return iterator


def _kill() -> None:
    for worker in _workers:
        if worker.is_alive():
            worker.kill()
