"""A whole evaluation, what precision changes in it, and whether two are equal."""

import torch
from measuring import ROOT, timed
from networks import arithmetic, images, made

from lit_purify.api import evaluate
from lit_purify.attacks import PGD
from lit_purify.data import Digits, First, ImageFolder, RandomChoice
from lit_purify.defense import (
    GradualPurifier,
    HeterogeneousPurifier,
    OtherPurifier,
    TopFraction,
    UniformPurifier,
    VariableIntensityPurifier,
)
from lit_purify.models import accelerated, load_classifier, load_denoiser


def purifiers(network):
    """Those of configs/eval/cifar10.yaml."""
    mask, kept = TopFraction(0.25), {"recompute": False}
    return {
        "uniform": UniformPurifier(network, 200, 4, **kept),
        "uniform-ddpm": UniformPurifier(network, 150, 4, "ddpm", **kept),
        "gradual": GradualPurifier(network, [125, 125], [2, 2], **kept),
        "heterogeneous": HeterogeneousPurifier(network, mask, 200, 175, 4, **kept),
        "variable": VariableIntensityPurifier(network, mask, 200, 175, 4, **kept),
    }


def shipped(kind, device):
    """Denoiser and classifier."""
    place = ROOT / "checkpoints"
    return [
        read(place / f"{kind}_{name}.safetensors").to(device)
        for name, read in (("denoiser", load_denoiser), ("classifier", load_classifier))
    ]


def correct(kind, device, data, labels, attacked, names, steps=20, runs=10, chunk=1024):
    """Share of correct runs of each image and purifier, attacked in one precision and classified in float32's."""
    given, classifier = shipped(kind, device)
    final = given if device.type == "cpu" else made(given, "tf32")
    ours, eps = classifier if device.type == "cpu" else accelerated(classifier), "8/255" if kind == "cifar10" else 0.15
    attack, found = PGD("linf", eps, steps, "2/255" if kind == "cifar10" else 0.02, 4, "margin"), {}
    low = made(given, "bf16") if attacked == "bf16" else None
    with arithmetic("float32" if attacked == "float32" else "tf32"):
        for name in names:
            gradients = {"pgd": OtherPurifier(purifiers(low)[name])} if low is not None else None
            result = evaluate(
                ours, {name: purifiers(final)[name]}, {"pgd": attack}, data, labels, runs=runs, chunk=chunk,
                batch_size=256, gradients=gradients, progress=False, gallery=0,
            )  # fmt: skip
            records = sorted(result.records, key=lambda record: record.index)
            hits = [[run == record.label for run in record.adversarial] for record in records]
            found[name] = torch.tensor(hits, dtype=torch.float32).mean(dim=1)
    return found


def measure(device, now, folder, quick):
    """The time of the table, then the differences."""
    gpu = device.type == "cuda"
    names = list(purifiers(shipped("cifar10", "cpu")[0]))
    count, steps = (256, 20) if gpu else (4, 1)
    if folder is None:
        data, labels = images(count, "cpu"), torch.arange(count) % 10
    else:
        split = ImageFolder(folder, size=32, subset=RandomChoice(count, 0)).evaluated
        items = [split[k] for k in range(len(split))]
        data, labels = torch.stack([item["image"] for item in items]), torch.tensor([item["label"] for item in items])
    results = {}
    for attacked in ("tf32", "bf16", "float32") if gpu else ("float32",):
        chosen = names if attacked == "tf32" or not quick else [names[0], names[3], names[4]]
        call = lambda a=attacked, c=chosen: results.update(  # noqa: E731
            {a: correct("cifar10", device, data, labels, a, c, steps, 10 if gpu else 2, 1024 if gpu else 8)}
        )
        seconds = timed(call, now)
        print(
            f"{count} images, PGD {steps} x EOT 4, attacked in {attacked}: {seconds:.1f} s for {len(chosen)} purifiers"
        )
        yield {"name": "evaluation", "attacked": attacked, "seconds": seconds, "purifiers": len(chosen)}
    if not gpu:
        return
    again = correct("cifar10", device, data, labels, "tf32", [names[4]])[names[4]]
    equal = again.equal(results["tf32"][names[4]])
    print(f"two evaluations of {names[4]} in TF32 are {'' if equal else 'NOT '}equal, image by image")
    yield {"name": "repeated", "equal": equal}
    split = Digits(subset=First(64)).evaluated
    items = [split[k] for k in range(len(split))]
    digits = torch.stack([item["image"] for item in items]), torch.tensor([item["label"] for item in items])
    sets = [("cifar10" if folder else "noise", results, count)]
    few = [names[0], names[3], names[4]]
    sets.append(("digits", {a: correct("digits", device, *digits, a, few) for a in ("float32", "tf32", "bf16")}, 64))
    for kind, found, size in sets:
        for other in ("tf32", "bf16"):
            for name in few:
                difference = 100.0 * (found[other][name] - found["float32"][name])
                half = 1.96 * difference.std().item() / size**0.5
                mean, right = difference.mean().item(), 100 * found["float32"][name].mean().item()
                print(
                    f"{kind}, {size} images, {name}: robust {right:.1f} in float32; attacked in {other} "
                    f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]",
                    flush=True,
                )
                yield {
                    "name": f"precision {kind} {name} {other}",
                    "robust": right,
                    "difference": mean,
                    "half_width": half,
                }
