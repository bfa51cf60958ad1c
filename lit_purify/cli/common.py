"""Shared by both command lines: errors in one line, the rank, fewer warnings."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from lit_purify import errors
from lit_purify.cli.messages import explanation, lost_connection
from lit_purify.errors import INTERRUPTED
from lit_purify.evaluation.folder import RunFolder
from lit_purify.private import leave

_LAUNCHER = 7.0
"""Seconds until a launcher notices a dead process."""


_REMARKS = (
    "does not have many workers|deprecat|isinstance.*treespec|Checkpoint directory|using a `DistributedSampler`",
    "args parameter is intended|smaller than the logging interval",
    # The loaders resume themselves: see data/base.py.
    "your dataloader is not resumable",
    # With few samples, a process may get none.
    "was called before the ``update`` method",
    # Metrics are already summed over processes.
    "sync_dist=True",
)
"""Warnings of libraries that users cannot act on."""


@dataclass
class State:
    """Progress of a command, for error messages.

    Attributes:
        folder: The run folder, once it is known.
        running: Whether processes have different data, so that each prints its own error.
    """

    folder: RunFolder | None = None
    running: bool = False


@contextmanager
def guarded() -> Iterator[State]:
    """Turns errors that users can fix into one line and exit status 2, and releases the run folder."""
    quiet()
    state = State()
    try:
        yield state
    except SystemExit as stopped:
        # Lightning exits with status 1 after an interruption.
        if isinstance(stopped.__context__, KeyboardInterrupt):
            leave(INTERRUPTED)
        raise
    except Exception as error:
        message = explanation(error, state.folder)
        if message is None:
            # Not an input error: show the traceback.
            raise
        if lost_connection(error):
            # Launchers check every five seconds. They name the dead process and end this one.
            time.sleep(_LAUNCHER)
            fail(message, every_rank=True, status=INTERRUPTED)
        fail(message, every_rank=state.running)
    finally:
        if state.folder is not None:
            state.folder.release()


def fail(message: str, every_rank: bool = False, status: int = 2) -> NoReturn:
    """Prints an error in one line and exits; the default status 2 means wrong input."""
    own = rank()
    if own == 0 or every_rank:
        print(f"{Path(sys.argv[0]).name}: error: {message}" + (f" [rank {own}]" if own else ""), file=sys.stderr)
    leave(status)


def rank() -> int:
    """Rank of this process, also before torch.distributed is initialized."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_PROCID") or 0)


def quiet() -> None:
    """Hides warnings that users cannot act on; of several processes, only rank 0 prints notices."""
    errors.SPEAKING = rank() == 0
    os.environ.setdefault("WANDB_SILENT", "true")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # The terminal's encoding may not cover all file names.
            stream.reconfigure(errors="backslashreplace")
    for name in ("pytorch.utilities.rank_zero", "pytorch.trainer.connectors.checkpoint_connector", "fabric.utilities"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=f".*({'|'.join(_REMARKS)})")


def helped(arguments: list[str], program: str) -> list[str]:
    """The arguments, with ``--help_all`` as jsonargparse's ``--help``; prints a short page and exits for ``--help``."""
    if "-h" in arguments or "--help" in arguments:
        if rank() == 0:
            print(Path(__file__).with_name(f"{program}.txt").read_text(), end="")
        sys.exit(0)
    return ["--help" if word == "--help_all" else word for word in arguments]
