"""Classifiers from [0, 1] images to logits, with normalization and attention features."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import timm
import torch
from timm.data.config import resolve_data_config
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn

from lit_purify.errors import InputError, notice
from lit_purify.functional.images import check_shape, sample_shape
from lit_purify.models.weights import Which, load_into, read_state_dict
from lit_purify.recorded import Recorded

Layout = Literal["channels_first", "channels_last"]
_COARSE = "has fewer than 4x4 cells"


class Classifier(Recorded, nn.Module):
    """Wraps any network in evaluation mode, from images in [0, 1] to logits.

    Args:
        network: Maps normalized images (B, C, size, size) to logits (B, num_classes).
        size: Height and width of the images, or number of features of rows.
        num_classes: Number of classes.
        channels: Channels of the images; 0 for table rows (B, size).
        mean: Subtracted from each channel of a [0, 1] image or each feature of a row (one value, or one for each).
        std: Divisor of each channel or feature.
        blocks: Names of modules of ``network`` whose outputs (B, C_m, h_m, w_m) give the attention mask. May be empty
            if the network has timm's ``forward_intermediates``: its stages are used then, without those of fewer than
            4x4 cells of more than 4 pixels.
        checkpoint: File with the network's state_dict; ``None`` leaves the network unchanged.
        which: Weights to read from a checkpoint with a network and its average: ``average`` or ``last``.
        layout: Axis order of block outputs whose shape does not show it (C_m = h_m = w_m): ``channels_first`` is (B,
            C, h, w).

    Attributes:
        origin: The file of the weights.
        recordable: Whether all calls of equal shapes run the same operations, so that a GPU can replay them; unknown
            and hence false for other modules.
    """

    recordable: ClassVar[bool] = False
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
        checkpoint: str | Path | None = None,
        which: Which = "average",
        layout: Layout | None = None,
    ) -> None:
        super().__init__()
        self.shape = sample_shape(channels, size)
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, self.shape[0]):
                each = f"{channels} channels" if channels else f"{size} features"
                raise InputError(f"{name} has {len(values)} values: give one, or one for each of {each}")
        if not all(0.0 <= value <= 1.0 for value in mean) or not all(value > 0.0 for value in std):
            raise InputError(
                f"mean = {list(mean)}, std = {list(std)}: mean must be in [0, 1] as the pixels are, and std above 0; "
                "divide values for 0 .. 255 by 255"
            )
        modules = dict(network.named_modules())
        unknown = [block for block in blocks if block not in modules]
        if unknown:
            some = ", ".join(list(modules)[1:9])
            raise InputError(f"blocks: the network has no module {unknown[0]!r}: name some of {some} ...")
        self.network, self.size, self.num_classes, self.channels = network, size, num_classes, channels
        self.blocks, self.layout = list(blocks), layout
        self.origin = "not loaded from a file" if checkpoint is None else Path(checkpoint).name.partition("#")[0]
        across = (1, -1, 1, 1) if channels else (1, -1)
        # Not part of the state_dict: they are configuration, and other libraries' files lack them.
        self.register_buffer("mean", torch.tensor(list(mean)).reshape(across), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).reshape(across), persistent=False)
        self.resolve(size=size, mean=list(mean), std=list(std))
        if checkpoint is not None:
            load_into(network, read_state_dict(checkpoint, which), str(checkpoint), which)
        self.eval()

    def resolve(self, **values: Any) -> None:  # noqa: ANN401
        """Records arguments that came from the model or the file, so that the file is not needed to build it again."""
        self.arguments |= {name: value for name, value in values.items() if name in self.arguments}

    @property
    def title(self) -> str:
        """Name and origin for reports."""
        return f"{type(self.network).__name__}, {self.origin}"

    def normalize(self, image: Tensor) -> Tensor:
        """Normalizes [0, 1] images for the network."""
        return (image - self.mean) / self.std

    def forward(self, image: Tensor) -> Tensor:
        """Returns logits (B, num_classes) of images (B, C, H, W) in [0, 1]."""
        found = self.network(self.normalize(image))
        # Networks of the package transformers return an object with logits.
        return getattr(found, "logits", found)

    def features(self, image: Tensor) -> list[Tensor]:
        """Returns activations (B, C_m, h_m, w_m) of the blocks for images (B, C, H, W) in [0, 1].

        Raises:
            InputError: There are no blocks, or a block is not called or returns another shape.
        """
        if image.ndim != 4:
            raise InputError("mask: rows have no attention maps: use GradientTimesInput or FirstLayer")
        normalized = self.normalize(image)
        if not self.blocks:
            intermediates = getattr(self.network, "forward_intermediates", None)
            if intermediates is None:
                raise InputError(
                    "an attention mask needs blocks of the classifier: name them, for example Classifier(network, ..., "
                    "blocks=['layer1', 'layer2'])"
                )
            stages = list(intermediates(normalized, intermediates_only=True, output_fmt="NCHW"))
            return _fine(stages, image, type(self.network).__name__)
        found: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ANN401
            if not isinstance(output, Tensor) or output.ndim != 4:
                shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise InputError(
                    f"blocks: {name} returns {shape}, but a mask needs a tensor (B, C, h, w): name others, "
                    "or none for transformers in timm"
                )
            # A later module may modify the output in place.
            found[name] = output.clone()

        modules = {name: self.network.get_submodule(name) for name in self.blocks}
        with ExitStack() as hooks:
            for name, module in modules.items():
                hooks.enter_context(module.register_forward_hook(partial(keep, name)))
            self.network(normalized)
        unused = [name for name in self.blocks if name not in found]
        if unused:
            raise InputError(f"blocks: the network does not call its module {unused[0]!r}: name other blocks")
        layouts = {name: _layout(feature, self.layout, modules[name]) for name, feature in found.items()}
        # Networks usually have one layout, so blocks that show it determine the others.
        shown = set(layouts.values()) - {None}
        for name, feature in found.items():
            layout = layouts[name] or (next(iter(shown)) if len(shown) == 1 else None)
            if layout is None:
                raise InputError(
                    f"blocks: the axes of {name}, {tuple(feature.shape)}, are ambiguous: set layout, "
                    "channels_first or channels_last"
                )
            if layout == "channels_last":
                found[name] = feature.movedim(-1, 1)
            if _is_coarse(found[name], image):
                notice(f"blocks: {name} {_COARSE}: its mask covers whole corners; leave it out")
        return [found[name] for name in self.blocks]

    def check_classes(self, classes: Sequence[str]) -> None:
        """Raises an ``InputError`` if a dataset has another number of classes than the classifier."""
        if len(classes) != self.num_classes:
            some = ", ".join(classes[:3]) + (" ..." if len(classes) > 3 else "")
            raise InputError(
                f"the data has {len(classes)} classes ({some}) but the classifier has {self.num_classes}: set "
                "num_classes or use matching data"
            )

    def check_image(self, image: Tensor) -> None:
        """Raises an ``InputError`` if images do not fit this network."""
        check_shape("classifier", image, self.shape)

    def check_output(self, image: Tensor) -> None:
        """Raises an ``InputError`` unless a forward pass gives float logits (B, num_classes) with a gradient."""
        with torch.enable_grad():
            found = self(image.detach().requires_grad_())
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if shape != (len(image), self.num_classes):
            raise InputError(
                f"the classifier returns {shape} for {len(image)} images, but logits ({len(image)}, "
                f"{self.num_classes}) are needed: set num_classes, or wrap the network"
            )
        if not found.is_floating_point() or not found.requires_grad:
            raise InputError("the classifier's logits have no gradient, which attacks need: remove no_grad from it")


class TimmClassifier(Classifier):
    """Any classifier of timm, by name.

    Args:
        name: Model name, e.g. ``mobilenetv2_100``; ``timm.list_models()`` lists them.
        num_classes: Number of classes.
        size: Height and width of the images; ``None`` uses the model's own. A vision transformer at another size also
            needs ``options: {img_size: ...}``.
        channels: Channels of the images.
        mean: Subtracted from each channel; ``None`` uses the model's own.
        std: Divisor of each channel; ``None`` uses the model's own.
        blocks: Modules whose outputs give the attention mask; empty uses ``forward_intermediates``.
        checkpoint: File with a state_dict.
        pretrained: Download timm's weights; not together with ``checkpoint``.
        options: Further arguments of the model, e.g. ``{pad_type: same}``.
        which: See ``Classifier``.
        layout: See ``Classifier``.
    """

    recordable = True

    def __init__(
        self,
        name: str,
        num_classes: int = 1000,
        size: int | None = None,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        blocks: Sequence[str] = (),
        checkpoint: str | Path | None = None,
        pretrained: bool = False,
        options: dict[str, Any] | None = None,
        which: Which = "average",
        layout: Layout | None = None,
    ) -> None:
        if not timm.is_model(name):
            near = timm.list_models(f"*{name.split('_')[0]}*")[:4]
            raise InputError(f"timm has no model {name!r}: use {', '.join(near) or 'a name of timm.list_models()'}")
        if pretrained and checkpoint is not None:
            raise InputError("pretrained and checkpoint are both set: choose one")
        options = options or {}
        try:
            network: Any = timm.create_model(name, pretrained, num_classes=num_classes, in_chans=channels, **options)
        except (TypeError, RuntimeError) as error:
            raise InputError(f"timm cannot make {name} ({error}): correct its options {options}") from error
        except OSError as error:
            raise InputError(f"the weights of {name} cannot be downloaded: give a checkpoint instead") from error
        own = resolve_data_config({}, model=network)  # type: ignore[no-untyped-call]
        size, mean, std = size or int(own["input_size"][-1]), mean or own["mean"], std or own["std"]
        super().__init__(network, size, num_classes, channels, mean, std, blocks, checkpoint, which, layout)
        if pretrained:
            self.origin = f"weights of timm ({network.pretrained_cfg.get('tag') or 'untagged'})"


def imagenet_synsets() -> list[str]:
    """Returns the WordNet ids of the 1,000 ImageNet classes, in label order."""
    return list(ImageNetInfo("imagenet-1k").label_names())  # type: ignore[no-untyped-call]


def _layout(feature: Tensor, given: Layout | None, block: nn.Module) -> Layout | None:
    """Axis order of a block's output (B, ...): from its shape, else as given, else from its layers."""
    first, second, third = feature.shape[1:]
    if first != second or second != third:
        return "channels_first" if second == third else "channels_last" if first == second else given
    layers = list(block.modules())
    convolves = any(isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)) for layer in layers)
    mixes = any(isinstance(layer, (nn.Linear, nn.LayerNorm)) for layer in layers)
    return given or ("channels_first" if convolves and not mixes else None)


def _fine(stages: list[Tensor], image: Tensor, title: str) -> list[Tensor]:
    """Returns the stages with enough cells to locate attention or, if there is none, the finest."""
    fine = [stage for stage in stages if not _is_coarse(stage, image)]
    if not fine:
        finest = max(min(stage.shape[-2:]) for stage in stages)
        fine = [stage for stage in stages if min(stage.shape[-2:]) == finest]
        notice(f"attention of {title}: each of its blocks {_COARSE}: masks are coarse")
    elif len(fine) < len(stages):
        notice(f"attention of {title}: {len(stages) - len(fine)} of its {len(stages)} blocks are left out: {_COARSE}")
    return fine


def _is_coarse(feature: Tensor, image: Tensor) -> bool:
    """Whether a block has fewer than 4x4 cells of more than 4 pixels."""
    return min(feature.shape[-2:]) < min(4, min(image.shape[-2:]) // 4)
