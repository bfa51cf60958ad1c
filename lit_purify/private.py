"""All uses of private parts of Python, torch, Lightning or wandb, each with its reason.

``tests/test_private.py`` fails if one is no longer needed or no longer works.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.callbacks import WeightAveraging


def settings_of(parser: ArgumentParser) -> dict[str, Any]:
    """Types of a parser's settings by name, for error messages.

    Neither argparse nor jsonargparse lists a parser's arguments publicly.
    """
    actions = [action for action in parser._actions if not action.dest.endswith(".help")]
    return {action.dest: getattr(action, "_typehint", None) or action.type for action in actions}


def perceptual_network(network: Literal["alex", "vgg"], weights: Mapping[str, Tensor]) -> nn.Module:
    """LPIPS with these weights of its backbone. torchmetrics' public class downloads them, and takes none.

    Raises:
        KeyError: One is missing.
    """
    from torchmetrics.functional.image.lpips import _LPIPS

    made = _LPIPS(net=network, pnet_rand=True)
    with torch.no_grad():
        for name, parameter in made.net.named_parameters():
            parameter.copy_(weights["features." + name.partition(".")[2]])
    return made.requires_grad_(False).eval()


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies many tensors with few kernels; torch offers operations on lists of tensors only to its optimizers."""
    return list(torch._foreach_mul(list(tensors), 1.0))


def average_in_few_kernels(callback: WeightAveraging, kept: Callable[[int], float]) -> None:
    """Makes a weight average update with few kernels and without waiting for the device.

    torch's AveragedModel reads its counter from the device at every step and averages one weight after the other.

    Args:
        callback: The callback, after its setup.
        kept: Maps the number of updates to the decay.
    """
    average, counted = callback._average_model, list[int]()
    assert average is not None

    def update(model: nn.Module) -> None:
        if not counted:
            # Read once: a checkpoint may set any value.
            counted.append(int(average.n_averaged))
        own, new = ([weight.detach() for weight in module.parameters()] for module in (average, model))
        torch._foreach_copy_(own, torch._foreach_lerp(new, own, kept(counted[0])) if counted[0] else new)
        for kept_buffer, buffer in zip(average.module.buffers(), model.buffers(), strict=True):
            kept_buffer.copy_(buffer)
        average.n_averaged += 1
        counted[0] += 1

    average.update_parameters = update  # type: ignore[method-assign]


def leave(status: int) -> NoReturn:
    """Exits like ``sys.exit``, but does not finalize the interpreter while threads of a process group run.

    Destroying a process group whose peer has died can hang. Not destroying it sometimes ends in a segmentation fault.
    """
    if dist.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def renew_store(rank: int) -> None:
    """After a restart by torchrun, gives the processes a new store.

    torchrun's agent keeps its store over restarts, with the addresses of dead processes
    (https://github.com/pytorch/pytorch/issues/135712). Rank 0 serves a new store on a free port.
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
    """Makes wandb stage tables and artifacts in the run folder: HOME may be full or read-only.

    wandb has environment variables for this, but no setting.
    """
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        os.environ.setdefault(name, str((folder / "wandb").resolve()))


def mend_resumed(trainer: L.Trainer) -> None:
    """Corrects the progress counters of a resumed training (Lightning 2.6)."""
    # Imported here, because networks use this file without Lightning.
    from lightning.pytorch.callbacks import ModelCheckpoint

    loop = trainer.fit_loop
    if loop.restarted_on_epoch_end:
        # With max_steps, the epoch would run and count again:
        # https://github.com/Lightning-AI/pytorch-lightning/issues/19617
        loop.epoch_progress.increment_completed()
        loop.epoch_loop.restarting = False
        loop.reset_restart_stage()
    elif loop.epoch_loop.restarted_on_train_batch_end and loop.epoch_loop.batch_progress.is_last_batch:
        # Saved after the last batch of an epoch: the next epoch would not count as started. The same bug.
        loop.reset_restart_stage()
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            # It counts batches as steps and would save while gradients accumulate, which no checkpoint stores: https://github.com/Lightning-AI/pytorch-lightning/issues/17903
            callback._last_global_step_saved = trainer.global_step
