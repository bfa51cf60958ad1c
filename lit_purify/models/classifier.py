"""A classifier from [0, 1] images to logits, with its normalization inside and its activations at hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from lit_purify.errors import InputError
from lit_purify.models.weights import load_into, read_state_dict


class Classifier(nn.Module):
    """Wraps any network: images in [0, 1] go in, logits come out.

    Args:
        network: From normalized images (B, C, H, W) to logits (B, num_classes).
        size: Height and width of the images it takes.
        num_classes: Number of classes.
        channels: Channels of the images.
        mean: Subtracted from each channel of a [0, 1] image (one value, or one a channel).
        std: What each channel is divided by.
        blocks: Names of the modules of ``network`` whose outputs (B, C_m, h_m, w_m) make the attention mask; may be
            empty when the network has timm's ``forward_intermediates``, whose stages are then taken.
        checkpoint: File with the network's state_dict; ``None`` leaves the network as it is.
    """

    def __init__(
        self,
        network: nn.Module,
        size: int,
        num_classes: int,
        channels: int = 3,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        blocks: Sequence[str] = (),
        checkpoint: Path | None = None,
    ) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise InputError(f"{name} has {len(values)} values: give one, or one for each of {channels} channels")
        modules = dict(network.named_modules())
        unknown = [block for block in blocks if block not in modules]
        if unknown:
            raise InputError(f"blocks: the network has no module {unknown[0]!r}; it has {', '.join(list(modules)[1:9])} ...")
        self.network, self.size, self.num_classes, self.channels = network, size, num_classes, channels
        self.blocks = list(blocks)
        self.origin = "not loaded from a file" if checkpoint is None else Path(checkpoint).name
        self.config: dict[str, Any] = {}
        # Not part of the state_dict: they are configuration, and foreign weights do not hold them.
        self.register_buffer("mean", torch.tensor(list(mean)).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).reshape(1, -1, 1, 1), persistent=False)
        if checkpoint is not None:
            load_into(network, read_state_dict(checkpoint), str(checkpoint))

    @property
    def title(self) -> str:
        """What reports call it."""
        return f"{type(self.network).__name__}, {self.origin}"

    def normalize(self, image: Tensor) -> Tensor:
        """[0, 1] images to what the network was trained on."""
        return (image - self.mean) / self.std  # type: ignore[operator]

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W) in [0, 1]."""
        return self.network(self.normalize(image))  # type: ignore[no-any-return]

    def features(self, image: Tensor) -> list[Tensor]:
        """Activations (B, C_m, h_m, w_m) of the blocks on images (B, C, H, W) in [0, 1]."""
        normalized = self.normalize(image)
        if not self.blocks:
            intermediates = getattr(self.network, "forward_intermediates", None)
            if intermediates is None:
                raise InputError("the classifier names no blocks for the attention mask: give blocks, e.g. [layer1, layer2]")
            return list(intermediates(normalized, intermediates_only=True, output_fmt="NCHW"))
        found: dict[str, Tensor] = {}
        handles = [
            self.network.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, name=name: found.__setitem__(name, output)
            )
            for name in self.blocks
        ]
        try:
            self.network(normalized)
        finally:
            for handle in handles:
                handle.remove()
        return [found[name] for name in self.blocks]

    def check_image(self, image: Tensor) -> None:
        """Raises an ``InputError`` when an image batch does not fit this network."""
        expected = (self.channels, self.size, self.size)
        if tuple(image.shape[1:]) != expected:
            raise InputError(f"the classifier takes images of shape {expected}, the data has {tuple(image.shape[1:])}")


class TimmClassifier(Classifier):
    """Any classifier of timm, by name.

    Args:
        name: Model name, e.g. ``mobilenetv2_100``; ``timm.list_models()`` has them all.
        num_classes: Number of classes.
        size: Height and width of the images; ``None`` takes the model's own.
        channels: Channels of the images.
        mean: Subtracted from each channel; ``None`` takes the model's own.
        std: What each channel is divided by; ``None`` takes the model's own.
        blocks: Modules whose outputs make the attention mask; empty takes ``forward_intermediates``.
        checkpoint: File with a state_dict.
        pretrained: Download timm's weights (needs a network); not together with ``checkpoint``.
        options: Further arguments of the model, e.g. ``{pad_type: same}``.
    """

    def __init__(
        self,
        name: str,
        num_classes: int = 1000,
        size: int | None = None,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        blocks: Sequence[str] = (),
        checkpoint: Path | None = None,
        pretrained: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        if not timm.is_model(name):
            near = timm.list_models(f"*{name.split('_')[0]}*")[:4]
            raise InputError(f"timm has no model {name!r}" + (f"; near: {', '.join(near)}" if near else ""))
        if pretrained and checkpoint is not None:
            raise InputError("pretrained and checkpoint are both given: choose one")
        options = options or {}
        network = timm.create_model(name, pretrained, num_classes=num_classes, in_chans=channels, **options)
        own = timm.data.resolve_data_config({}, model=network)
        super().__init__(
            network,
            size=size or int(own["input_size"][-1]),
            num_classes=num_classes,
            channels=channels,
            mean=mean or own["mean"],
            std=std or own["std"],
            blocks=blocks,
            checkpoint=checkpoint,
        )
        self.config = {
            "name": name,
            "num_classes": num_classes,
            "size": self.size,
            "channels": channels,
            "mean": list(mean or own["mean"]),
            "std": list(std or own["std"]),
            "blocks": list(blocks),
            "options": options,
        }


def imagenet_synsets() -> list[str]:
    """WordNet ids of the 1,000 ImageNet classes, in the order of their labels."""
    return list(timm.data.ImageNetInfo("imagenet-1k").label_names())
