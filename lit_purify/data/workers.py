"""Worker processes of loaders, which end when their main process says so and not before."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def heed_only_the_parent(worker: int) -> None:
    """Initializes a worker: a SIGTERM ends it if its parent sent it, and does nothing otherwise.

    Schedulers signal whole process groups; the main process then ends its step, and needs its workers for that. Its own
    SIGTERM has to be obeyed: at exit Python sends one to every daemonic child, and waits for it.
    """
    parent = multiprocessing.parent_process()  # a fork server's id is os.getppid()
    if parent is None or not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    # Threads inherit the mask: the signal stays pending until the one below takes it, with its sender.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_heed, args=(parent.pid,), daemon=True).start()


def _heed(parent: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
