"""The base class of denoisers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from lit_purify.functional.images import check_shape, sample_shape
from lit_purify.functional.levels import LevelMap
from lit_purify.functional.schedule import Schedule
from lit_purify.recorded import Recorded


class Denoiser(Recorded, nn.Module, ABC):
    """Predicts the noise in a noised image: ``eps = denoiser(x_t, t)``.

    Attributes:
        channels: Channels of the images; 0 for table rows.
        size: Height and width of the images, or number of features of the rows.
        schedule: The noise schedule of the training; ``t`` counts its noising steps.
        origin: The file of its weights.
        onehot: Widths of the one-hot groups of rows, see ``functional.rows.fields``.
        validation: Mean squared error of the predicted noise on validation images; ``None`` if unknown.
        gradient_checkpointing: Whether it recomputes activations in the backward pass to save memory.
        recordable: Whether all calls of equal shapes run the same operations, so that a GPU can replay them.
    """

    channels: int
    size: int
    schedule: Schedule
    onehot: Sequence[int] = ()
    origin: str = "not loaded from a file"
    validation: float | None = None
    gradient_checkpointing: bool = False
    recordable: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """Name, size and origin for reports."""
        count = sum(p.numel() for p in self.parameters())
        error = "" if self.validation is None else f", validation error {self.validation:.3f}"
        return f"{type(self).__name__}, {count / 1e6:.2f} M parameters, {self.origin}{error}"

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor | LevelMap) -> Tensor:
        """Predicts the noise in ``x``, with the shape of ``x``.

        Args:
            x: (B, C, H, W), or rows (B, F), in diffusion space, [-1, 1] when clean.
            t: Level of each image (B,), in noising steps 1 .. T, fractions allowed; or a level map, whose ``t.dense``
                is (B, 1, H, W) or (B, F).
        """

    def check_image(self, image: Tensor) -> None:
        """Raises an ``InputError`` if images do not fit this network."""
        check_shape("denoiser", image, sample_shape(self.channels, self.size))
