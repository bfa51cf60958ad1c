"""Networks for table rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from lit_purify.functional.levels import LevelMap
from lit_purify.functional.rows import fields
from lit_purify.functional.schedule import Schedule
from lit_purify.models.classifier import Classifier
from lit_purify.models.denoiser import Denoiser
from lit_purify.models.layers import sinusoidal


class TableClassifier(Classifier):
    """A multilayer perceptron with ReLU.

    Args:
        features: Number of features of a row.
        num_classes: Number of classes.
        hidden: Widths of the hidden layers.
        dropout: Fraction of the hidden units that a training step drops.
        mean: Subtracted from each feature of a [0, 1] row (one value, or one per feature).
        std: Divisor of each feature.
        checkpoint: File with a state_dict; ``None`` leaves the network as initialized.
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        hidden: Sequence[int] = (256, 256),
        dropout: float = 0.0,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        checkpoint: str | Path | None = None,
    ) -> None:
        layers: list[nn.Module] = []
        for before, after in zip((features, *hidden), hidden, strict=False):
            layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(dropout)]
        network = nn.Sequential(*layers, nn.Linear((features, *hidden)[-1], num_classes))
        super().__init__(network, features, num_classes, 0, mean, std, (), checkpoint)


class _Block(nn.Module):
    """A residual block of two layers with the level embedding added between them; it starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.level = nn.LayerNorm(width), nn.Linear(width, width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, h: Tensor, embedded: Tensor) -> Tensor:
        """Maps (B, width) to (B, width); ``embedded`` is (B, width)."""
        return h + self.second(silu(self.first(self.norm(h)) + self.level(embedded)))


class TableDenoiser(Denoiser):
    """A residual multilayer perceptron with a noise level for each field of a row, which enters every block.

    A one-hot group is one field, with the strongest level of its features. One level and a constant map are equivalent.
    The network's output corrects the best estimate for independent Gaussian features with learned means m and standard
    deviations s: with a^2 = abar, d = x - a m and v = a^2 s^2 + 1 - abar, the noise is sqrt(1 - abar) d / v - a s /
    sqrt(v) times the output. The noise of nearly constant features is thus learned quickly, and errors do not grow at
    weak levels (as in Karras et al., NeurIPS 2022, table 1, for one s).

    Args:
        features: F.
        onehot: Widths of the one-hot groups, which are the last features of a row.
        width: Width of all layers.
        blocks: Residual blocks of two layers.
        sinusoids: Size of the sinusoidal embedding of each field's level.
        schedule: ``linear``, ``cosine`` or ``continuous``.
        steps: T of the schedule.
        beta_start: First beta.
        beta_end: Last beta.
    """

    channels = 0
    field: Tensor

    def __init__(
        self,
        features: int,
        onehot: Sequence[int] = (),
        width: int = 256,
        blocks: int = 3,
        sinusoids: int = 8,
        schedule: Literal["linear", "cosine", "continuous"] = "linear",
        steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 2e-2,
    ) -> None:
        super().__init__()
        self.size, self.onehot, self.sinusoids = features, list(onehot), sinusoids
        self.schedule = Schedule.named(schedule, steps, beta_start, beta_end)
        # A buffer outside the state_dict: it is configuration, not weights.
        self.register_buffer("field", fields(features, onehot), persistent=False)
        self.fields = features - sum(onehot) + len(onehot)
        self.embed = nn.Sequential(
            nn.Linear(self.fields * sinusoids, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.stem = nn.Linear(features, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, features)
        # Most features of a row are near 0, which is -1 in diffusion space.
        self.mean, self.log_std = (
            nn.Parameter(torch.full((features,), -0.8)),
            nn.Parameter(torch.full((features,), -1.5)),
        )
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.eval()

    def forward(self, x: Tensor, t: Tensor | LevelMap) -> Tensor:
        """Predicts the noise, see ``Denoiser``; ``t`` may also be the level of each feature, (B, F)."""
        level = t.dense if isinstance(t, LevelMap) else t
        level = level.reshape(len(x), -1).expand(-1, x.shape[1])
        by_field = level.new_zeros(len(x), self.fields).scatter_reduce(
            1, self.field.expand(len(x), -1), level, "amax", include_self=False
        )
        dtype, low = x.dtype, self.stem.weight.dtype
        embedded = self.embed(sinusoidal(by_field, self.sinusoids, low).flatten(1))
        abar, std = self.schedule.at(level), self.log_std.exp().to(dtype)
        a, sigma = abar.sqrt().to(dtype), (1.0 - abar).sqrt().to(dtype)
        deviation, total = x - a * self.mean.to(dtype), (a.square() * std.square() + sigma.square()).sqrt()
        h = self.stem((deviation / total).to(low))
        for block in self.blocks:
            h = block(h, embedded)
        return sigma * deviation / total.square() - a * std / total * self.head(silu(self.norm(h))).to(dtype)
