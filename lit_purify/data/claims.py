"""Batches that are taken one after another by whichever process is free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import torch.distributed as dist
from torch.utils.data import Sampler

from lit_purify.data.subset import Indices

_PASSES = count()
"""Names each pass; all processes make the same passes."""


class Claims(Sampler[list[int]]):
    """Each batch goes to the process that asks first, and to no other.

    Processes then finish within one batch of each other, whatever single samples cost. The last samples, too few for a
    full batch each, are shared out equally; a process may get none.

    Args:
        items: What is to be dealt out, the same on all processes; asked at the beginning of a pass.
        batch_size: Items a batch, at most.
        world: Processes.
        rank: This process; decides only where no process group connects the processes.
    """

    def __init__(self, items: Callable[[], Indices], batch_size: int, world: int, rank: int) -> None:
        self.items, self.batch_size, self.world, self.rank = items, batch_size, world, rank

    def __len__(self) -> int:
        """Batches of all processes together: no process gets more."""
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
        # The processes' common counter: no collective, so none waits for another. A restart has a new store.
        store = dist.group.WORLD.get_group_store()
        return (store.add(key, 1) - 1 for _ in count())
