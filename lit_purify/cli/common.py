"""What both command lines share: one line for what is wrong, the process's rank, a quiet start."""

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
"""Seconds that a launcher may take to notice that a process has died."""


_REMARKS = (
    "does not have many workers|deprecat|isinstance.*treespec|Checkpoint directory|using a `DistributedSampler`",
    "args parameter is intended|smaller than the logging interval",
    # Of it the loader knows: see data/base.py.
    "your dataloader is not resumable",
    # Of few samples a process may get none.
    "was called before the ``update`` method",
    # Metrics are summed over processes already.
    "sync_dist=True",
)
"""What libraries warn of and no user can act on."""


@dataclass
class State:
    """How far a command is.

    Attributes:
        folder: The run's folder, once it is known.
        running: Whether processes have data of their own, so that each says what is wrong.
    """

    folder: RunFolder | None = None
    running: bool = False


@contextmanager
def guarded() -> Iterator[State]:
    """Ends with one line and exit status 2 upon what a user can mend, and releases the run's folder."""
    quiet()
    state = State()
    try:
        yield state
    except SystemExit as stopped:
        # Lightning's for an interrupted run is that of a traceback.
        if isinstance(stopped.__context__, KeyboardInterrupt):
            leave(INTERRUPTED)
        raise
    except Exception as error:
        message = explanation(error, state.folder)
        if message is None:
            # Not the user's to mend: the traceback says more.
            raise
        if lost_connection(error):
            # Launchers look every five seconds: they end this process, and name the one that died.
            time.sleep(_LAUNCHER)
            fail(message, every_rank=True, status=INTERRUPTED)
        fail(message, every_rank=state.running)
    finally:
        if state.folder is not None:
            state.folder.release()


def fail(message: str, every_rank: bool = False, status: int = 2) -> NoReturn:
    """Ends with one line, and exit status 2 for wrong input."""
    own = rank()
    if own == 0 or every_rank:
        print(f"{Path(sys.argv[0]).name}: error: {message}" + (f" [rank {own}]" if own else ""), file=sys.stderr)
    leave(status)


def rank() -> int:
    """Of this process, before torch.distributed knows it."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_PROCID") or 0)


def quiet() -> None:
    """Keeps remarks that no user can act on off the screen, and of several processes all but the first one's."""
    errors.SPEAKING = rank() == 0
    os.environ.setdefault("WANDB_SILENT", "true")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names of files need not be text of the terminal's encoding.
            stream.reconfigure(errors="backslashreplace")
    for name in ("pytorch.utilities.rank_zero", "pytorch.trainer.connectors.checkpoint_connector", "fabric.utilities"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=f".*({'|'.join(_REMARKS)})")


def helped(given: list[str], program: str) -> list[str]:
    """The arguments; when they ask for help, a page that fits a screen is all there is."""
    if "-h" in given or "--help" in given:
        print(Path(__file__).with_name(f"{program}.txt").read_text(), end="")
        sys.exit(0)
    return ["--help" if word == "--help_all" else word for word in given]
