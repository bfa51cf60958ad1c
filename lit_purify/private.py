"""Everything that needs private parts of Python, torch, Lightning or wandb, each with its reason."""

from __future__ import annotations

import atexit
import os
import socket
import sys
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist


def leave(status: int) -> NoReturn:
    """Ends as ``sys.exit`` does, without taking apart the interpreter under the threads of a process group.

    Destroying a group whose peer has died can hang, and not destroying it ends in a segmentation fault now and then.
    """
    if dist.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def renew_store(rank: int) -> None:
    """After a restart by torchrun, makes the processes meet in a store of their own.

    torchrun's agent keeps its store over restarts, with the addresses of the processes that have died
    (https://github.com/pytorch/pytorch/issues/135712). Rank zero serves another one on a free port.
    """
    attempt, shared = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), "TORCHELASTIC_USE_AGENT_STORE"
    if attempt == "0" or os.environ.get(shared) != "True":
        return
    agent = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # type: ignore[attr-defined]
    key = f"lit_purify/port/{attempt}"
    if rank == 0:
        with socket.create_server(("", 0)) as free:
            agent.set(key, str(free.getsockname()[1]))
    os.environ |= {"MASTER_PORT": agent.get(key).decode(), shared: "False"}


def stage_artifacts(folder: Path) -> None:
    """Lets wandb stage tables and artifacts in the run's folder: HOME may be full or read-only.

    No setting says where, only these variables.
    """
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        os.environ.setdefault(name, str((folder / "wandb").resolve()))
