"""The contract of every denoiser."""

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
        channels: Channels of the images; 0 for rows of tables.
        size: Height and width of the images; number of features of the rows.
        schedule: The noise schedule it was trained with; ``t`` counts its noising steps.
        origin: The file that its weights come from.
        onehot: Widths of the one-hot groups of rows, see ``functional.rows.fields``.
        validation: Mean squared error of the predicted noise on validation images; ``None`` if no file states it.
        gradient_checkpointing: Whether it keeps few activations for a backward pass and recomputes the others.
        recordable: Whether each call of given shapes makes the same operations: a GPU can then replay them.
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
        """What reports call it."""
        count = sum(p.numel() for p in self.parameters())
        error = "" if self.validation is None else f", validation error {self.validation:.3f}"
        return f"{type(self).__name__}, {count / 1e6:.2f} M parameters, {self.origin}{error}"

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor | LevelMap) -> Tensor:
        """Predicted noise, same shape as ``x``.

        Args:
            x: (B, C, H, W), or rows (B, F), in diffusion space, [-1, 1] when clean.
            t: Level of each image (B,), in noising steps 1 .. T, fractions allowed; or those of its pixels, of which
                ``t.dense`` is (B, 1, H, W), or (B, F).
        """

    def check_image(self, image: Tensor) -> None:
        """Raises an ``InputError`` when an image batch does not fit this network."""
        check_shape("denoiser", image, sample_shape(self.channels, self.size))
