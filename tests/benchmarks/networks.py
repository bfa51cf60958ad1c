"""The networks that are measured, and how near a call can come to what the device is able to do."""

import contextlib

import torch
import yaml
from measuring import ROOT, timed
from torch.utils.flop_counter import FlopCounterMode

from lit_purify.models import ResNetClassifier, UNet, accelerated, layers

# 256x256_diffusion_uncond.pt of guided-diffusion without its learned variance, 552.8 M parameters.
IMAGENET = {
    "channels": 3,
    "size": 256,
    "width": 256,
    "multipliers": [1, 1, 2, 2, 4, 4],
    "blocks": 2,
    "attention": [32, 16, 8],
    "head_width": 64,
    "embedding": 1024,
    "level_shift": 1.0,
    "groups": 32,
    "resampling": "residual",
}
SIZES = {
    "cheap": {"channels": 3, "size": 32, "width": 8, "multipliers": [1, 2], "blocks": 1},
    "small": "configs/train/cifar10_denoiser.yaml",
    "full": "configs/train/cifar10_denoiser_gpu.yaml",
    "imagenet": IMAGENET,
}
PRECISIONS = ("float32", "tf32", "bf16")


def settings(size):
    """Arguments of the UNet."""
    found = SIZES[size]
    if isinstance(found, str):
        found = yaml.safe_load((ROOT / found).read_text())["model"]["denoiser"]
    return {key: value for key, value in found.items() if key != "class_path"}


def denoiser(size, device):
    """The UNet of a configuration with random weights, none of them zero."""
    torch.manual_seed(0)
    with torch.device(device):
        network = UNet(**settings(size))
    for weight in network.parameters():
        if weight.ndim > 1 and not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    return network.requires_grad_(False)


def classifier(device):
    """The classifier beside it."""
    torch.manual_seed(0)
    return ResNetClassifier(20, 32, 10).to(device).eval().requires_grad_(False)


def images(count, device, pixels=32):
    """Noise."""
    return torch.rand(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(0)).to(device)


@contextlib.contextmanager
def arithmetic(precision):
    """float32 without TF32, or with it."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "float32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def without_kernels():
    """Only PyTorch's own operations."""
    before, layers.kernels = layers.kernels, lambda x: None
    try:
        yield
    finally:
        layers.kernels = before


def made(network, precision):
    """As evaluations run it."""
    return accelerated(network, "bf16" if precision == "bf16" else "float32")


def needs(size):
    """Operations of a call and bytes that it must move in 16 bits, of one row; bytes of the weights.

    Each convolution and matrix product reads its input and writes its output once, and everything else is fused.
    """
    with torch.device("meta"):
        network, moved = UNet(**settings(size)), []
        for module in network.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                module.register_forward_hook(lambda _, given, out: moved.append(given[0].numel() + out.numel()))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(1, 3, network.size, network.size), torch.ones(1, dtype=torch.long))
    return counter.get_total_flops(), 2 * sum(moved), 2 * sum(weight.numel() for weight in network.parameters())


def peak(device, now, precision):
    """Operations a second: the faster of wide matrix products and wide convolutions; and its name."""
    gpu = device.type == "cuda"
    side, rows = (8192, 1024) if gpu else (1024, 32)
    place = {"device": device, "dtype": torch.bfloat16 if precision == "bf16" else torch.float32}
    matrix = torch.randn(side, side, **place)
    layer = torch.nn.Conv2d(256, 256, 3, padding=1, bias=False).to(**place, memory_format=torch.channels_last)
    image = torch.randn(rows, 256, 16, 16, **place).contiguous(memory_format=torch.channels_last)
    found = []
    with torch.no_grad(), arithmetic(precision):
        for name, call in (("matrix products", lambda: matrix @ matrix), ("wide convolutions", lambda: layer(image))):
            with FlopCounterMode(display=False) as counter:
                call()
            found.append((counter.get_total_flops() / min(timed(call, now) for _ in range(10)), name))
    return max(found)


def bandwidth(device, now):
    """Bytes a second of a copy, read and written."""
    count = 2**30 if device.type == "cuda" else 2**25
    source = torch.empty(count, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 4 * count / min(timed(lambda: target.copy_(source), now) for _ in range(5))
