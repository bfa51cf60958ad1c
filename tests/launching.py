"""Starting the processes of a run one by one, as a launcher on each host would: a test can lay hands on each."""

import os
import socket
import time
from multiprocessing import get_context

import torch

from lit_purify import cli


def launch(command, argv, world, log):
    """The processes of a run, one by one as a launcher on each host would start them; each writes ``log``.RANK."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # A server that has imported all forks them: a start takes no seconds.
    context = get_context("forkserver")
    context.set_forkserver_preload(["lit_purify.cli"])
    found = []
    for rank in range(world):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world, "LOCAL_RANK": rank}
        flags = ["--trainer.strategy=ddp", f"--trainer.devices={world}"]
        found.append(context.Process(target=_run, args=(command, [*argv, *flags], place, f"{log}.{rank}")))
        found[-1].start()
    return found


def _run(command, argv, place, log):
    os.environ.update({name: str(value) for name, value in place.items()})
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    getattr(cli, command)(argv)


def ends(processes, seconds=400):
    """Their exit statuses, once all have ended; none outlives the test."""
    until = time.monotonic() + seconds
    try:
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def until(condition, seconds=400):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)
