"""Attacks of other libraries (torchattacks, foolbox, ART, the official AutoAttack) and your own functions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_purify.attacks.base import Attack, Queries
from lit_purify.errors import InputError
from lit_purify.functional.chunks import AttackedFunction
from lit_purify.functional.noise import START_STEP, Noise
from lit_purify.functional.threat import Norm, violations


class ForeignAttack(Attack):
    """Runs a function ``(model, images, labels) -> adversarial images`` on the defense.

    The function receives a differentiable ``nn.Module`` in evaluation mode, from images (B, C, H, W) in [0, 1] to
    logits (B, classes), with new keyed noise at every call. The global random states of torch, numpy and Python are
    seeded by the samples' keys, so that equal batches give equal images. The result may depend on the composition of
    the batch, because most libraries draw random numbers for a whole batch.

    Args:
        function: The attack, for example
            ``lambda model, x, y: torchattacks.PGD(model, eps=8 / 255)(x, y)``.
        norm: ``linf`` or ``l2``; every result is checked.
        eps: Radius, in pixels of [0, 1]; a number or a fraction such as ``8/255``.
        name: Name in reports; ``None`` uses the function's name.

    Raises:
        InputError: On use, the function returns images of another shape or outside the threat model.
    """

    steps = eot = 0
    gradient = "theirs"
    stopping = "the other library's"

    def __init__(
        self,
        function: Callable[[nn.Module, Tensor, Tensor], Any],
        norm: Norm = "linf",
        eps: float | str = "8/255",
        name: str | None = None,
    ) -> None:
        super().__init__(norm, eps)
        if not callable(function):
            raise InputError(f"function is a {type(function).__name__}: give a function (model, images, labels)")
        self.function, self.name = function, name or getattr(function, "__name__", type(function).__name__)

    @property
    @override
    def title(self) -> str:
        return f"{self.name} (another library)"

    @property
    def queries(self) -> Queries:
        """Query cost; unknown, hence 0."""
        return Queries(0, 0)

    @override
    def perturb(self, model: AttackedFunction, image: Tensor, label: Tensor, noise: Noise, chunk: int) -> Tensor:
        rows = min(len(image), chunk)
        key = int(noise.uniform(START_STEP, image.flatten(1)[:, 0].double()).sum() * 2**20) % 2**32
        with _seeded(key), torch.enable_grad():
            found = self.function(_Module(model, noise, rows, image.device), image.clone(), label.clone())
        if not isinstance(found, (Tensor, np.ndarray)):
            raise InputError(f"{self.name} returned a {type(found).__name__}: return images as a tensor (B, C, H, W)")
        adversarial = torch.as_tensor(found).detach().to(image)
        if adversarial.shape != image.shape:
            raise InputError(f"{self.name} returned {tuple(adversarial.shape)}: return {tuple(image.shape)}, as given")
        bad = violations(adversarial, image, self.norm, self.eps).nonzero().flatten().tolist()
        if bad:
            raise InputError(
                f"{self.name} left the threat model ({self.norm} <= {self.eps:.4g}, pixels in [0, 1]) in rows {bad}: "
                "give the other library the same norm and eps"
            )
        return adversarial


class _Module(nn.Module):
    """The attacked function as a network with new noise at every call."""

    def __init__(self, model: AttackedFunction, noise: Noise, rows: int, device: torch.device) -> None:
        super().__init__()
        self.model, self.noise, self.rows, self.draw = model, noise, rows, 0
        # Some libraries read the device from a parameter.
        self.place = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        """Returns logits (B, classes)."""
        logits = []
        for part in torch.split(image, self.rows):
            which = torch.arange(len(part), device=part.device)
            logits.append(self.model(part, self.noise.rows(which).runs([self.draw])))
            self.draw += 1
        return torch.cat(logits)


@contextmanager
def _seeded(key: int) -> Iterator[None]:
    """Seeds the global random states and restores them afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices):
        torch.manual_seed(key)
        random.seed(key)
        np.random.seed(key)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
