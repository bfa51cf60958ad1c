"""Worker processes of loaders that survive signals to the process group and end with their process."""

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
    """Initializes a worker to ignore signals: the main process needs its workers to finish the step."""
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)


class Loader(DataLoader[dict[str, Any]]):
    """A loader that starts a pass at its first batch and kills its workers when the process exits.

    Workers would otherwise read ahead as soon as an iterator exists. Lightning creates it before it sets the epoch of a
    resumed training, and before a callback reads which samples are recorded already. At exit, Python would send SIGTERM
    to its children, which they ignore, and wait for them.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        global _prepared
        # A fork does not inherit the exit handlers of its parent.
        if _prepared != os.getpid():
            _prepared = os.getpid()
            Finalize(None, _kill, exitpriority=100)
        yield from super().__iter__()


def _kill() -> None:
    for child in active_children():
        if child.daemon:
            child.kill()
