"""Wide ResNets for small images (Zagoruyko & Komodakis, BMVC 2016, arXiv 1605.07146), in all public layouts."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from lit_purify.errors import InputError
from lit_purify.models.classifier import Classifier
from lit_purify.models.weights import Which, load_into, read_state_dict, without_prefix

Activation = Literal["relu", "silu"]
Padding = Literal["symmetric", "same"]

_ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}
_NORMALIZATION = ("mean", "mu", "std", "sigma")
_ROBUSTBENCH = "block1.layer.0.bn1.weight"
# A name that every file of a layout has, and the rules that turn the layout's names into RobustBench's, in order.
_LAYOUTS = {
    _ROBUSTBENCH: [],
    "layer.0.block.0.batchnorm_0.weight": [
        *((rf"^layer\.{group}\.block\.", f"block{group + 1}.layer.") for group in range(3)),
        (r"^init_conv\.", "conv1."),
        (r"^batchnorm\.", "bn1."),
        (r"^logits\.", "fc."),
        (r"\.batchnorm_0\.", ".bn1."),
        (r"\.conv_0\.", ".conv1."),
        (r"\.batchnorm_1\.", ".bn2."),
        (r"\.conv_1\.", ".conv2."),
        (r"\.shortcut\.", ".convShortcut."),
        # DeepMind's strided convolutions pad as TensorFlow does; see ``Block``.
        (r"^(block[23]\.layer\.0\.conv1)\.", r"\1.1."),
    ],
    "group0.block0.bn0.weight": [
        *((rf"^group{group}\.block", f"block{group + 1}.layer.") for group in range(3)),
        (r"^conv0$", "conv1.weight"),
        (r"^bn\.", "bn1."),
        (r"\.bn1\.", ".bn2."),
        (r"\.bn0\.", ".bn1."),
        (r"\.conv1$", ".conv2.weight"),
        (r"\.conv0$", ".conv1.weight"),
        (r"\.convdim$", ".convShortcut.weight"),
    ],
}


class Block(nn.Module):
    """Two 3x3 convolutions after normalization and activation, with a 1x1 shortcut if the width changes."""

    def __init__(self, width_in: int, width_out: int, stride: int, activation: Activation, padding: Padding) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1: nn.Module = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
        if stride == 2 and padding == "same":
            # A separate module: weights trained with the other padding then have another name and are refused.
            conv = nn.Conv2d(width_in, width_out, 3, stride, bias=False)
            self.conv1 = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        changes = width_in != width_out
        self.convShortcut = nn.Conv2d(width_in, width_out, 1, stride, bias=False) if changes else None
        # Separate modules, so that a mask can use them.
        self.relu1, self.relu2 = _ACTIVATIONS[activation](), _ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, width_in, H, W) to (B, width_out, H / stride, W / stride)."""
        h = self.relu1(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(h)
        return shortcut + self.conv2(self.relu2(self.bn2(self.conv1(h))))


class WideResNet(nn.Module):
    """Depth 6 n + 4, with three groups of n blocks of 16, 32 and 64 times ``width`` channels; RobustBench's names."""

    def __init__(
        self, depth: int, width: int, channels: int, num_classes: int, activation: Activation, padding: Padding
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise InputError(f"depth = {depth} is not 6 n + 4: use 10, 16, 22, 28, 34, 40 or 70")

        def group(width_in: int, width_out: int, stride: int) -> nn.Sequential:
            widths = [(width_in, stride)] + [(width_out, 1)] * ((depth - 4) // 6 - 1)
            blocks = (Block(before, width_out, by, activation, padding) for before, by in widths)
            return nn.Sequential(OrderedDict(layer=nn.Sequential(*blocks)))

        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.block1 = group(16, 16 * width, 1)
        self.block2 = group(16 * width, 32 * width, 2)
        self.block3 = group(32 * width, 64 * width, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        self.relu = _ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits (B, num_classes) of normalized images (B, C, H, H)."""
        h = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.relu(self.bn1(h)).mean(dim=(2, 3)))


class WideResNetClassifier(Classifier):
    """A wide ResNet that reads the weights of RobustBench, of DeepMind and of the paper's authors unchanged.

    The names in the file identify the layout (a ``.pt`` file may hold them in ``state_dict``, ``model_state_dict`` or
    ``params``, with prefixes such as ``module.0.``):

    - RobustBench (TRADES, ``Standard`` ...): ``block1.layer.0.conv1.weight``. ``Standard`` has no normalization and
    uses
      ReLU. The unused ``sub_block1`` of some files is ignored.
    - DeepMind (Gowal et al., arXiv 2010.03593; also DiffPure's WRN-70-16): ``layer.0.block.0.conv_0.weight``. Mostly
      SiLU. The original normalizes inside the network: use mean [0.4914, 0.4822, 0.4465] and std [0.2471, 0.2435,
      0.2616] for CIFAR-10, [0.5071, 0.4865, 0.4409] and [0.2673, 0.2564, 0.2762] for CIFAR-100.
    - The authors' PyTorch code: ``group0.block0.conv0``. ReLU; trained on CIFAR-10 images with mean
      [0.4914, 0.4824, 0.4467] and std [0.2471, 0.2435, 0.2616].

    Args:
        depth: 6 n + 4.
        width: Width as a multiple of a ResNet with 16, 32 and 64 channels.
        size: Height and width of the images.
        num_classes: Number of classes.
        channels: Channels of the images.
        activation: ``relu``, or ``silu`` (swish).
        mean: Subtracted from each channel of a [0, 1] image; ``None`` uses the file's value, else 0. Required for a
            file without it whose layout is not plainly RobustBench's.
        std: Divisor of each channel; as ``mean``, else 1.
        padding: Zero padding of strided convolutions: ``symmetric``, or at the right and bottom only (``same``, as
            TensorFlow; needs a size divisible by 4). ``None`` uses that of the file, without a file ``symmetric``.
        blocks: Modules whose outputs give the attention mask.
        checkpoint: File with a state_dict; ``None`` leaves the network as initialized.
        which: Weights to read from a checkpoint with a network and its average: ``average`` or ``last``.

    Raises:
        InputError: The arguments are invalid, or the file does not match them in a name, shape or normalization value.
    """

    recordable = True

    def __init__(
        self,
        depth: int,
        width: int,
        size: int = 32,
        num_classes: int = 10,
        channels: int = 3,
        activation: Activation = "relu",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        padding: Padding | None = None,
        blocks: Sequence[str] = ("block1", "block2", "block3"),
        checkpoint: str | Path | None = None,
        which: Which = "average",
    ) -> None:
        state: dict[str, Tensor] = {}
        if checkpoint is not None:
            found = read_state_dict(checkpoint, which)
            state = robustbench_names(found, str(checkpoint), which)
            mean = _take_normalization(state, "mean", ("mean", "mu"), mean, str(checkpoint))
            std = _take_normalization(state, "std", ("std", "sigma"), std, str(checkpoint))
            trained: Padding = "same" if "block2.layer.0.conv1.1.weight" in state else "symmetric"
            # A number before the name indicates a layer before the network.
            plain = any(re.fullmatch(rf"\D*{re.escape(_ROBUSTBENCH)}", name) for name in found)
            translated = trained == "same" or (_ROBUSTBENCH in state and not plain)
            if translated and (mean is None or std is None):
                raise InputError(
                    f"{checkpoint}: networks with such names mostly normalize images: give mean and std, for CIFAR-10 "
                    "[0.4914, 0.4822, 0.4465] and [0.2471, 0.2435, 0.2616]; [0.0] and [1.0] where there is none"
                )
            if padding not in (None, trained):
                raise InputError(f"{checkpoint}: these weights need padding = {trained!r}: leave the argument out")
            padding = trained
        mean, std, padding = mean or (0.0,), std or (1.0,), padding or "symmetric"
        if padding == "same" and size % 4:
            raise InputError(f"size = {size}: padding = 'same' needs a multiple of 4: give such a size")
        network = WideResNet(depth, width, channels, num_classes, activation, padding)
        super().__init__(network, size, num_classes, channels, mean, std, blocks)
        if checkpoint is not None:
            load_into(self.network, state, str(checkpoint), which)
            self.origin = Path(checkpoint).name
        self.resolve(padding=padding)


def robustbench_names(state: Mapping[str, Tensor], origin: str, which: Which = "average") -> dict[str, Tensor]:
    """Renames the tensors of any of the three layouts to those of ``WideResNet``; other names are kept."""
    for known, rules in _LAYOUTS.items():
        prefix, inside = without_prefix(state, [known], origin, which)
        if known in inside:
            # Normalization can be stored beside the network.
            beside = {n: t for n, t in state.items() if n[: len(prefix)] != prefix and _leaf(n) in _NORMALIZATION}
            renamed = {_rename(name, rules): tensor for name, tensor in (inside | beside).items()}
            if len(renamed) < len(inside | beside):
                raise InputError(f"{origin}: two names are the same tensor: save the state_dict of one network alone")
            # TRADES' code builds it and never calls it.
            return {name: tensor for name, tensor in renamed.items() if not name.startswith("sub_block1.")}
    return dict(state)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _rename(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def _take_normalization(
    state: dict[str, Tensor], argument: str, names: Sequence[str], given: Sequence[float] | None, origin: str
) -> Sequence[float] | None:
    """Removes normalization buffers from ``state`` and returns their values, which must match given ones."""
    for name in [name for name in state if _leaf(name) in names]:
        held = state.pop(name).flatten().tolist()
        values = held if given is None else list(given) * (len(held) if len(given) == 1 else 1)
        if len(values) != len(held) or any(abs(a - b) > 1e-5 for a, b in zip(values, held, strict=True)):
            shown = [round(value, 5) for value in held]
            raise InputError(f"{origin}: {name} is {shown}, {argument} = {list(given or [])}: leave the argument out")
        given = values
    return given
