"""ResNets for small images (He et al., "Deep residual learning", CVPR 2016, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad, relu

from lit_purify.errors import InputError
from lit_purify.models.classifier import Classifier
from lit_purify.models.weights import Which


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut subsamples and pads channels with zeros (option A, without parameters)."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.stride, self.extra = stride, width_out - width_in

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, width_in, H, W) to (B, width_out, H / stride, W / stride)."""
        h = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        if self.extra:
            before = self.extra // 2
            x = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))
        return relu(h + x)


class ResNet(nn.Module):
    """Depth 6 n + 2, with three stages of n blocks; module names conv1, bn1, layer1 .. layer3, linear."""

    def __init__(self, depth: int, width: int, channels: int, num_classes: int) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise InputError(f"depth = {depth} is not 6 n + 2: use 8, 14, 20, 32, 44, 56 or 110")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks, 1)
        self.layer2 = self._stage(width, 2 * width, blocks, 2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, 2)
        self.linear = nn.Linear(4 * width, num_classes)

    @staticmethod
    def _stage(width_in: int, width_out: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(width_in, width_out, stride)
        return nn.Sequential(first, *(BasicBlock(width_out, width_out, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits (B, num_classes) of normalized images (B, C, H, H)."""
        h = self.layer3(self.layer2(self.layer1(relu(self.bn1(self.conv1(x))))))
        return self.linear(avg_pool2d(h, h.shape[-1]).flatten(1))


class ResNetClassifier(Classifier):
    """A ResNet for small images; its state_dict layout is that of common CIFAR-10 ResNet-20 .. 110 weights.

    Args:
        depth: 6 n + 2.
        size: Height and width of the images.
        num_classes: Number of classes.
        channels: Channels of the images.
        width: Channels of the first stage.
        mean: Subtracted from each channel of a [0, 1] image.
        std: Divisor of each channel.
        checkpoint: File with a state_dict; ``None`` leaves the network as initialized.
        which: Weights to read from a checkpoint with a network and its average: ``average`` or ``last``.
    """

    recordable = True

    def __init__(
        self,
        depth: int,
        size: int,
        num_classes: int,
        channels: int = 3,
        width: int = 16,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        checkpoint: str | Path | None = None,
        which: Which = "average",
    ) -> None:
        network, blocks = ResNet(depth, width, channels, num_classes), ("layer1", "layer2", "layer3")
        super().__init__(network, size, num_classes, channels, mean, std, blocks, checkpoint, which)
