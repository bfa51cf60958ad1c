"""Purification, the mask, a draw of noise and the step of an attack, against bare calls of the network."""

from functools import partial

import torch
from measuring import compare
from networks import classifier as small_classifier
from networks import denoiser as random_denoiser
from networks import images

import lit_purify as lp
from lit_purify.functional.chunks import logits_in_chunks
from lit_purify.functional.levels import two_level
from lit_purify.functional.noise import KeyedNoise
from lit_purify.models import accelerated

EOT, RUNS = 4, 8


def defenses(denoiser):
    """One of each kind, by name."""
    heterogeneous = {
        f"heterogeneous {kind}": lp.HeterogeneousPurifier(denoiser, lp.MinMaxThreshold(0.9), 200, 100, 4, kind, 10, 2)
        for kind in ("single", "none", "release", "multi")
    }
    return {
        "uniform": lp.UniformPurifier(denoiser, 150, 4),
        "ddpm": lp.UniformPurifier(denoiser, 150, 4, "ddpm"),
        "variable": lp.VariableIntensityPurifier(denoiser, lp.TopFraction(0.25), 200, 100, 4),
        **heterogeneous,
        "sde": lp.UniformPurifier(denoiser, 150, 4, "sde"),
        "gradual": lp.GradualPurifier(denoiser, [125, 125], [2, 2]),
    }


def measure(device, now, quick):
    """Rows; on a GPU of the 10.0 M network, as evaluations run it."""
    gpu = device.type == "cuda"
    size, batch, pairs = ("full", 256, 5) if gpu else ("small", 32, 3 if quick else 7)
    denoiser, classifier = random_denoiser(size, device), small_classifier(device)
    if gpu:
        denoiser, classifier = accelerated(denoiser, "bf16"), accelerated(classifier)
    image = images(batch, device)
    index = torch.arange(batch, device=device)
    noise, one = KeyedNoise(0, index, torch.zeros_like(index)), torch.full((batch,), 150, device=device)
    against = partial(compare, now=now, pairs=pairs)

    def forward(level, calls=1):
        with torch.no_grad():
            for _ in range(calls):
                denoiser(image, level)

    mask = lp.TopFraction(0.25)(classifier, image, noise)
    both = two_level(mask, 150, 75)
    yield against("network call at a map / at one level", partial(forward, both, 4), partial(forward, one, 4))
    yield against("keyed noise / network call", lambda: noise.normal(0, image), partial(forward, one))
    # Several, since one of randn's is short.
    randn = lambda: [torch.randn(image.shape, device=device) for _ in range(8)]  # noqa: E731
    yield against("keyed noise / torch.randn", lambda: [noise.normal(k, image) for k in range(8)], randn, limit=10.0)

    def plain():
        with torch.no_grad():
            for _ in range(4):
                classifier(image)

    for rule in (lp.TopFraction(0.25), lp.MinMaxThreshold(0.9), lp.SoftmaxThreshold(1e-3)):
        masked = lambda rule=rule: [rule(classifier, image, noise) for _ in range(4)]  # noqa: E731
        name = f"mask {type(rule).__name__} / classifier call"
        yield against(name, masked, plain, limit=1.05 if gpu else 1.10)

    for name, purifier in defenses(denoiser).items():
        given = None if purifier.mask is None else purifier.mask(classifier, image, noise)

        def purified(purifier=purifier, given=given):
            with torch.no_grad():
                for _ in range(2):
                    purifier(image, noise, given)

        level = both if name == "variable" else one
        bare = partial(forward, level, 2 * purifier.nfe)
        if gpu:
            # An error where anything waits for the device. Not in the first call, which records.
            purified()
            torch.cuda.set_sync_debug_mode("error")
            purified()
            torch.cuda.set_sync_debug_mode("default")
        limit = 1.03 if gpu else 1.05
        yield against(f"purification {name} / network calls", purified, bare, limit=limit, nfe=purifier.nfe)
        if name in ("uniform", "ddpm", "variable", "heterogeneous single"):
            yield from attacked(name, purifier, classifier, denoiser, image, level, against, gpu)
    if not gpu:
        denoiser = random_denoiser("cheap", device)
        purifier = lp.UniformPurifier(denoiser, 150, 20, "ddpm")

        def cheap():
            with torch.no_grad():
                purifier(image, noise)

        name = "purification in 20 steps by a cheap network / network calls"
        yield against(name, cheap, partial(forward, one, 20), limit=1.10)


def attacked(name, purifier, classifier, denoiser, image, level, against, gpu):
    """A step of an attack, and runs classified, of half as many images as rows in a call."""
    defended, chunk = lp.DefendedClassifier(purifier, classifier), len(image)
    index = torch.arange(chunk // 2, device=image.device)
    noise = KeyedNoise(0, index, torch.zeros_like(index))
    step = lp.PGD("linf", "8/255", 1, "2/255", EOT, "margin")

    def differentiated():
        for _ in range(purifier.nfe * EOT // 2):
            leaf = image.clone().requires_grad_()
            with torch.no_grad():
                denoiser(image, level)
            torch.autograd.grad(denoiser(leaf, level).sum(), leaf)

    def forward():
        with torch.no_grad():
            for _ in range(purifier.nfe * RUNS // 2):
                denoiser(image, level)

    function = lp.Exact().attacked(defended).function
    # The label does not matter.
    stepped = partial(step, function, image[index], index % 10, noise, chunk)
    limit = 1.03 if gpu else 1.10
    yield against(f"attack step {name} / network calls", stepped, differentiated, limit=limit, nfe=purifier.nfe)
    classified = partial(logits_in_chunks, function, image[index], noise, list(range(RUNS)), chunk)
    yield against(f"{RUNS} runs classified {name} / network calls", classified, forward, nfe=purifier.nfe)
