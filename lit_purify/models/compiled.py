"""A denoiser whose calls are compiled."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_purify.errors import InputError
from lit_purify.functional.levels import LevelMap
from lit_purify.models.denoiser import Denoiser


class Compiled(Denoiser):
    """The same denoiser, each call one graph (``torch.compile``), for evaluations on GPUs.

    Costs a minute or more at the start, for every new number of rows again. Results differ from those of the bare
    network by rounding.

    Args:
        denoiser: The denoiser.
        backend: Of ``torch.compile``.

    Raises:
        InputError: ``denoiser`` wraps another one.
    """

    def __init__(self, denoiser: Denoiser, backend: str = "inductor") -> None:
        super().__init__()
        if any(isinstance(module, Denoiser) for module in denoiser.modules() if module is not denoiser):
            raise InputError(f"denoiser: {type(denoiser).__name__} wraps another one; compile that one")
        self.denoiser: Denoiser = denoiser
        self.channels, self.size, self.schedule = denoiser.channels, denoiser.size, denoiser.schedule
        self.origin = denoiser.origin
        # The function and not the module: what hooks the module has are no part of the graph, and copies stay copies.
        self._call = torch.compile(type(denoiser).forward, fullgraph=True, dynamic=False, backend=backend)

    @property
    def title(self) -> str:
        """What reports call it."""
        return f"{self.denoiser.title}, compiled"

    def forward(self, x: Tensor, t: Tensor | LevelMap) -> Tensor:
        """Predicted noise; see ``Denoiser``."""
        # A graph for each number of rows, with a gradient and without, for levels of images and of pixels.
        with torch.compiler.config.patch(recompile_limit=64):  # type: ignore[attr-defined]
            return self._call(self.denoiser, x, t)
