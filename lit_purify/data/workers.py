"""Worker processes of loaders: signals to whole process groups do not end them, their process does."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from multiprocessing import active_children
from multiprocessing.util import Finalize
from typing import Any

from torch.utils.data import DataLoader

_prepared = 0


def ignore_signals(worker: int) -> None:
    """Initializes a worker: the main process ends its step when it is signaled, and needs its workers for that."""
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)


class Loader(DataLoader[dict[str, Any]]):
    """Begins a pass when its first batch is due; its workers end when this process exits, also amid a batch.

    Workers would read ahead as soon as an iterator is made, and Lightning makes it before it says which epoch of a
    resumed training it is, or a callback which samples of an evaluation are recorded already. At exit Python asks
    daemonic children to end by a SIGTERM, and waits for them.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        global _prepared
        # A fork does not inherit what its parent has to do at exit.
        if _prepared != os.getpid():
            _prepared = os.getpid()
            Finalize(None, _kill, exitpriority=100)
        yield from super().__iter__()


def _kill() -> None:
    for child in active_children():
        if child.daemon:
            child.kill()
