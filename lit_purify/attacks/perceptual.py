"""Perceptual distances between images, which bound perceptual threat models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_purify.errors import InputError
from lit_purify.private import perceptual_network
from lit_purify.recorded import Recorded

_FROM = {
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
}
"""Sources of the weights of LPIPS's backbones: torchvision's, trained on ImageNet."""


class Distance(Recorded, ABC):
    """A perceptual distance between two images.

    Attributes:
        name: Name in reports. Results under distances of the same name form one threat model.
    """

    name: str

    @abstractmethod
    def __call__(self, point: Tensor, image: Tensor) -> Tensor:
        """Returns distances (B,), differentiable, 0 for equal images; arguments (B, C, H, W) in [0, 1]."""

    def check(self, image: Tensor) -> None:
        """Raises an ``InputError`` if the images cannot be compared."""


class SSIM(Distance):
    """1 - SSIM (Wang et al. 2004), by torchmetrics; it needs no weights.

    Args:
        sigma: Standard deviation of the Gaussian window, in pixels; ``None`` is 1.5, or a sixteenth of smaller images.
    """

    def __init__(self, sigma: float | None = None) -> None:
        if sigma is not None and not sigma > 0.0:
            raise InputError(f"sigma = {sigma}: use a number above 0")
        self.sigma, self.name = sigma, "1 - SSIM" + ("" if sigma is None else f" (sigma {sigma:g})")

    @override
    def __call__(self, point: Tensor, image: Tensor) -> Tensor:
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim

        sigma = min(1.5, min(image.shape[2:]) / 16.0) if self.sigma is None else self.sigma
        found = ssim(point, image, sigma=sigma, reduction="none", data_range=1.0)
        assert isinstance(found, Tensor)
        return 1.0 - found.reshape(len(image))

    def check(self, image: Tensor) -> None:
        """Raises an ``InputError`` if the window, of 3.5 sigma to each side, is larger than the image."""
        if self.sigma is not None and int(3.5 * self.sigma + 0.5) * 2 >= min(image.shape[2:]):
            raise InputError(f"sigma = {self.sigma}: the window is larger than {tuple(image.shape[2:])}: use less")


class LPIPS(Distance):
    """LPIPS (Zhang et al., CVPR 2018), by torchmetrics.

    Args:
        weights: File of the backbone's weights, a state dictionary of torchvision's AlexNet or VGG16.
        network: ``alex`` or ``vgg``.

    Raises:
        InputError: The file is missing, or has other weights.
    """

    def __init__(self, weights: str | Path, network: Literal["alex", "vgg"] = "alex") -> None:
        self.name = f"LPIPS ({network})"
        path = Path(weights).expanduser()
        if not path.is_file():
            raise InputError(f"{path}: no such file; LPIPS needs the weights of {_FROM[network]}, or use SSIM")
        try:
            self.network: nn.Module = perceptual_network(network, torch.load(path, "cpu", weights_only=True))
        except Exception as error:  # a damaged file can raise nearly any exception
            raise InputError(f"{path}: not the weights of {_FROM[network]}; fetch them again") from error

    @override
    def __call__(self, point: Tensor, image: Tensor) -> Tensor:
        three = [x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x for x in (point, image)]
        return self.network.to(image.device, image.dtype)(*three, normalize=True).reshape(len(image))

    def check(self, image: Tensor) -> None:
        """Raises an ``InputError`` for images smaller than 32 pixels, which the backbone cannot take."""
        if min(image.shape[2:]) < 32:
            raise InputError(f"LPIPS takes images of 32 pixels and more, these have {tuple(image.shape[2:])}: use SSIM")
