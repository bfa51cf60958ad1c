"""Batches that go to whichever process is free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import torch.distributed as dist
from torch.utils.data import Sampler

from lit_purify.data.subset import Indices

_PASSES = count()
"""Numbers the passes; all processes make the same passes."""


class Claims(Sampler[list[int]]):
    """Assigns each batch to the first process that asks for it.

    Processes then finish within one batch of each other, whatever single samples cost. The last samples, too few for a
    full batch per process, are split equally; a process may get none.

    Args:
        items: Returns the items to assign, equal on all processes; called at the beginning of a pass.
        batch_size: Items per batch, at most.
        world: Number of processes.
        rank: Rank of this process; used only without a process group.
    """

    def __init__(self, items: Callable[[], Indices], batch_size: int, world: int, rank: int) -> None:
        self.items, self.batch_size, self.world, self.rank = items, batch_size, world, rank

    def __len__(self) -> int:
        """Returns the number of batches of all processes together, an upper bound for each."""
        return len(self._batches())

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._batches()
        for ticket in self._tickets():
            if ticket >= len(batches):
                return
            yield batches[ticket]

    def _batches(self) -> list[list[int]]:
        items = self.items()
        full = len(items) - len(items) % (self.batch_size * self.world)
        cut = [*items[:full].reshape(-1, self.batch_size), *np.array_split(items[full:], self.world)]
        return [batch.tolist() for batch in cut if len(batch)]

    def _tickets(self) -> Iterator[int]:
        key = f"lit_purify/claims/{next(_PASSES)}"
        if self.world == 1 or not (dist.is_available() and dist.is_initialized()):
            return count(self.rank, self.world)
        assert dist.group.WORLD is not None
        # A counter shared through the store. It is no collective, so no process waits. A restart has a new store.
        store = dist.group.WORLD.get_group_store()
        return (store.add(key, 1) - 1 for _ in count())
