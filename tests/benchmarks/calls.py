"""Purification, the mask and the step of an attack, against bare calls of the network."""

from functools import partial

import torch
import yaml
from measuring import ROOT, clock, compare, timed
from torch.utils.flop_counter import FlopCounterMode

from lit_purify.attacks import PGD
from lit_purify.defense import (
    DefendedClassifier,
    Exact,
    HeterogeneousPurifier,
    MinMaxThreshold,
    SoftmaxThreshold,
    TopFraction,
    UniformPurifier,
    VariableIntensityPurifier,
)
from lit_purify.functional.chunks import logits_in_chunks
from lit_purify.functional.levels import two_level
from lit_purify.functional.noise import KeyedNoise
from lit_purify.models import Compiled, ResNetClassifier, UNet

EOT, RUNS = 4, 8
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
    "small": "configs/train/cifar10_denoiser.yaml",
    "full": "configs/train/cifar10_denoiser_gpu.yaml",
    "imagenet": IMAGENET,
}


def networks(size, device, pixels=None, compiled=False):
    """The UNet of a configuration with random weights, none of them zero, and the classifier beside it."""
    torch.manual_seed(0)
    settings = SIZES[size]
    if isinstance(settings, str):
        settings = yaml.safe_load((ROOT / settings).read_text())["model"]["init_args"]["denoiser"]["init_args"]
    settings = settings | ({"size": pixels} if pixels else {})
    denoiser, classifier = UNet(**settings), ResNetClassifier(20, settings["size"], 10)
    for weight in denoiser.parameters():
        if weight.ndim > 1 and not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    denoiser, classifier = (net.to(device).eval().requires_grad_(False) for net in (denoiser, classifier))
    return Compiled(denoiser) if compiled else denoiser, classifier


def defenses(denoiser, classifier):
    """One of each kind, by name."""
    return {
        "uniform": UniformPurifier(denoiser, classifier, 150, 4),
        "ddpm": UniformPurifier(denoiser, classifier, 150, 4, "ddpm"),
        "heterogeneous": HeterogeneousPurifier(denoiser, classifier, MinMaxThreshold(0.9), 200, 100, 4),
        "variable": VariableIntensityPurifier(denoiser, classifier, TopFraction(0.25), 200, 100, 4),
    }


def images(count, device, pixels=32):
    """Noise."""
    return torch.rand(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(0)).to(device)


def fastest_products(device, now):
    """What reaches the matrix product peak of the device: a call, its name, operations a second.

    A library of convolutions may multiply matrices faster than the one of matrix products.
    """
    side, rows = (8192, 1024) if device.type == "cuda" else (1024, 32)
    low = torch.is_autocast_enabled(device.type)
    place = {"device": device, "dtype": torch.get_autocast_dtype(device.type) if low else torch.float32}
    matrix, layer = torch.rand(side, side, **place), torch.nn.Conv2d(256, 256, 3, padding=1, bias=False)
    layer = layer.to(**place, memory_format=torch.channels_last).requires_grad_(False)
    image = torch.rand(rows, 256, 16, 16, **place).contiguous(memory_format=torch.channels_last)
    found = []
    for name, call in (("matrix products", lambda: matrix @ matrix), ("wide convolutions", lambda: layer(image))):
        with FlopCounterMode(display=False) as counter:
            call()
        call.flops = counter.get_total_flops()
        speed = call.flops / min(timed(call, now) for _ in range(10))
        found.append((speed, name, call))
    speed, name, call = max(found, key=lambda one: one[0])
    return call, name, speed


def measure(size, device, batch, pairs, compiled=False):
    """Rows of one network; of that of ImageNet only how near its calls come to the peak of the device."""
    now = clock(device)
    denoiser, classifier = networks(size, device, compiled=compiled)
    batch = batch if size != "imagenet" else max(1, batch // 32)
    image = images(batch, device, denoiser.size)
    index = torch.arange(batch, device=device)
    noise = KeyedNoise(0, index, torch.zeros_like(index))
    one = torch.full((batch,), 150, device=device)
    against = partial(compare, now=now, pairs=pairs)

    def forward(level, calls=1):
        with torch.no_grad():
            for _ in range(calls):
                denoiser(image, level)

    # A compiled call has its operations as well, but nobody counts them.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        (denoiser.denoiser if compiled else denoiser)(image, one)
    products, name, speed = fastest_products(device, now)
    repeats = max(1, round(counter.get_total_flops() * 4 / products.flops))
    yield against(
        f"network call / {name}",
        partial(forward, one, 4),
        lambda: [products() for _ in range(repeats)],
        # For as many operations as the calls have.
        scale=counter.get_total_flops() * 4 / (repeats * products.flops),
        gigaflop_s=speed / 1e9,
        **({"limit": 1 / 0.45} if size == "imagenet" and device.type == "cuda" else {}),
    )
    if size == "imagenet":
        return
    mask = TopFraction(0.25)(classifier, image, noise)
    levels = {"uniform": one, "ddpm": one, "heterogeneous": one, "variable": two_level(mask, 150, 75)}
    yield against("network call at a map / at one level", partial(forward, levels["variable"]), partial(forward, one))
    yield against("keyed noise / network call", lambda: noise.normal(0, image), partial(forward, one))

    def plain():
        with torch.no_grad():
            classifier(image)

    for rule in (TopFraction(0.25), MinMaxThreshold(0.9), SoftmaxThreshold(1e-3)):
        name = f"mask {type(rule).__name__} / classifier call"
        yield against(name, partial(rule, classifier, image, noise), plain)

    made = defenses(denoiser, classifier)
    for name, purifier in made.items():

        def purified(purifier=purifier):
            with torch.no_grad():
                purifier(image, noise)

        bare = partial(forward, levels[name], purifier.nfe)
        if device.type == "cuda":
            # An error where anything waits for the device. Not in the first call, which may compile.
            purified()
            torch.cuda.set_sync_debug_mode("error")
            purified()
            torch.cuda.set_sync_debug_mode("default")
        limit = 1.03 if device.type == "cuda" else 1.05
        yield against(f"purification {name} / network calls", purified, bare, limit=limit, nfe=purifier.nfe)


def measure_evaluations(size, device, batch, pairs, compiled=False):
    """Rows of what an evaluation consists of: as many images as configs/eval/cifar10.yaml, half of a network call's."""
    against = partial(compare, now=clock(device), pairs=pairs)
    denoiser, classifier = networks(size, device, compiled=compiled)
    rows = images(batch, device)
    index = torch.arange(batch // 2, device=device)
    noise = KeyedNoise(0, index, torch.zeros_like(index))
    mask = TopFraction(0.25)(classifier, rows, noise)
    one = torch.full((batch,), 150, device=device)
    for name, purifier in defenses(denoiser, classifier).items():
        defended, level = (
            DefendedClassifier(purifier, classifier),
            two_level(mask, 150, 75) if name == "variable" else one,
        )
        step = PGD("linf", "8/255", 1, "2/255", EOT, "margin")

        def differentiated(level=level, calls=purifier.nfe * EOT // 2):
            for _ in range(calls):
                leaf = rows.clone().requires_grad_()
                with torch.no_grad():
                    denoiser(rows, level)
                torch.autograd.grad(denoiser(leaf, level).sum(), leaf)

        def forward(level=level, calls=purifier.nfe * RUNS // 2):
            with torch.no_grad():
                for _ in range(calls):
                    denoiser(rows, level)

        # The label does not matter.
        attacked = partial(step, Exact().attacked(defended), rows[index], index % 10, noise, batch)
        limit = 1.03 if device.type == "cuda" else 1.10
        yield against(f"attack step {name} / network calls", attacked, differentiated, limit=limit, nfe=purifier.nfe)
        classified = partial(logits_in_chunks, defended, rows[index], noise, list(range(RUNS)), batch)
        yield against(f"{RUNS} runs classified {name} / network calls", classified, forward, nfe=purifier.nfe)
