"""A classifier from [0, 1] images to logits, with its normalization inside and its activations at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_data_config
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn

from lit_purify.errors import InputError
from lit_purify.models.weights import load_into, read_state_dict


class Classifier(nn.Module):
    """Wraps any network: images in [0, 1] go in, logits come out.

    Args:
        network: From normalized images (B, C, size, size) to logits (B, num_classes).
        size: Height and width of the images it takes.
        num_classes: Number of classes.
        channels: Channels of the images.
        mean: Subtracted from each channel of a [0, 1] image (one value, or one a channel).
        std: What each channel is divided by.
        blocks: Names of the modules of ``network`` whose outputs (B, C_m, h_m, w_m) make the attention mask; may be
            empty when the network has timm's ``forward_intermediates``, whose stages are then taken.
        checkpoint: File with the network's state_dict; ``None`` leaves the network as it is.

    Attributes:
        origin: The file that its weights come from.
        config: The arguments that rebuild it; a subclass sets them, and only then ``save_network`` takes it.
    """

    mean: Tensor
    std: Tensor

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
        if not all(0.0 <= value <= 1.0 for value in mean) or not all(value > 0.0 for value in std):
            raise InputError(
                f"mean = {list(mean)}, std = {list(std)}: pixels lie in [0, 1], so must mean, and std is above 0; "
                "divide values meant for 0 .. 255 by 255"
            )
        modules = dict(network.named_modules())
        unknown = [block for block in blocks if block not in modules]
        if unknown:
            some = ", ".join(list(modules)[1:9])
            raise InputError(f"blocks: the network has no module {unknown[0]!r}; it has {some} ...")
        self.network, self.size, self.num_classes, self.channels = network, size, num_classes, channels
        self.blocks = list(blocks)
        self.origin = "not loaded from a file" if checkpoint is None else Path(checkpoint).name.partition("#")[0]
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
        return (image - self.mean) / self.std

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W) in [0, 1]."""
        return self.network(self.normalize(image))

    def features(self, image: Tensor) -> list[Tensor]:
        """Activations (B, C_m, h_m, w_m) of the blocks on images (B, C, H, W) in [0, 1].

        Raises:
            InputError: There are no blocks, or one of them is not called or puts out another shape.
        """
        normalized = self.normalize(image)
        if not self.blocks:
            intermediates = getattr(self.network, "forward_intermediates", None)
            if intermediates is None:
                raise InputError("an attention mask needs blocks of the classifier: name some, e.g. [layer1, layer2]")
            return list(intermediates(normalized, intermediates_only=True, output_fmt="NCHW"))
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ANN401
                if not isinstance(output, Tensor) or output.ndim != 4:
                    raise InputError(f"blocks: {name} does not put out a tensor (B, C, h, w), which a mask needs")
                # A later module may work in place.
                found[name] = output.clone()

            return hook

        handles = [self.network.get_submodule(name).register_forward_hook(keep(name)) for name in self.blocks]
        try:
            self.network(normalized)
        finally:
            for handle in handles:
                handle.remove()
        unused = [name for name in self.blocks if name not in found]
        if unused:
            raise InputError(f"blocks: the network does not call its module {unused[0]!r}")
        return [found[name] for name in self.blocks]

    def check_classes(self, classes: Sequence[str]) -> None:
        """Raises an ``InputError`` when a dataset has another number of classes: its labels would mean other things."""
        if len(classes) != self.num_classes:
            some = ", ".join(classes[:3]) + (" ..." if len(classes) > 3 else "")
            raise InputError(
                f"the data has {len(classes)} classes ({some}), the classifier "
                f"{self.num_classes}: labels would be out of its range or mean others; set num_classes, or choose data"
            )

    def check_image(self, image: Tensor) -> None:
        """Raises an ``InputError`` when an image batch does not fit this network."""
        expected = (self.channels, self.size, self.size)
        if tuple(image.shape[1:]) != expected:
            raise InputError(
                f"the classifier takes images of shape {expected}, the data has {tuple(image.shape[1:])}: give both "
                "one size and as many channels (of a folder: data.init_args.size, data.init_args.channels)"
            )


class TimmClassifier(Classifier):
    """Any classifier of timm, by name.

    Args:
        name: Model name, e.g. ``mobilenetv2_100``; ``timm.list_models()`` has them all.
        num_classes: Number of classes.
        size: Height and width of the images; ``None`` takes the model's own. A vision transformer at another size needs
            ``options: {img_size: ...}`` as well.
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
        try:
            network: Any = timm.create_model(name, pretrained, num_classes=num_classes, in_chans=channels, **options)
        except (TypeError, RuntimeError) as error:
            raise InputError(f"timm cannot make {name} with options {options}: {error}") from error
        except OSError as error:
            raise InputError(f"the weights of {name} cannot be downloaded: give a checkpoint instead") from error
        own = resolve_data_config({}, model=network)  # type: ignore[no-untyped-call]
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
        if pretrained:
            self.origin = f"weights of timm ({network.pretrained_cfg.get('tag') or 'untagged'})"
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
    return list(ImageNetInfo("imagenet-1k").label_names())  # type: ignore[no-untyped-call]
