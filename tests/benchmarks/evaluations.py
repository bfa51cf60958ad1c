"""A whole evaluation, what precision changes in it, and whether two are equal."""

import contextlib
from dataclasses import replace

import torch
from measuring import ROOT, row, target, timed
from networks import arithmetic, images

import lit_purify as lp
from lit_purify.api import evaluate
from lit_purify.data import Digits, First, ImageFolder, RandomChoice
from lit_purify.models import accelerated, load_classifier, load_denoiser

FEW = ["uniform", "heterogeneous", "variable"]


def purifiers(network):
    """Those of configs/eval/cifar10.yaml."""
    mask, kept = lp.TopFraction(0.25), {"recompute": False}
    return {
        "uniform": lp.UniformPurifier(network, 200, 4, **kept),
        "uniform-ddpm": lp.UniformPurifier(network, 150, 4, "ddpm", **kept),
        "gradual": lp.GradualPurifier(network, [125, 125], [2, 2], **kept),
        "heterogeneous": lp.HeterogeneousPurifier(network, mask, 200, 175, 4, **kept),
        "variable": lp.VariableIntensityPurifier(network, mask, 200, 175, 4, **kept),
    }


def records(kind, device, data, attacked, names, steps=20, runs=10, chunk=1024):
    """Records of each purifier, without their times; attacked in one precision and classified in float32's."""
    place, found = ROOT / "checkpoints", {}
    denoiser = load_denoiser(place / f"{kind}_denoiser.safetensors").to(device)
    classifier = load_classifier(place / f"{kind}_classifier.safetensors").to(device)
    low = accelerated(denoiser, "bf16") if attacked == "bf16" else None
    eps, step = ("8/255", "2/255") if kind == "cifar10" else (0.15, 0.02)
    attack = lp.PGD("linf", eps, steps, step, 4, "margin")
    with arithmetic("float32" if attacked == "float32" else "tf32"):
        for name in names:
            gradients = {"pgd": lp.SurrogatePurifier(purifiers(low)[name])} if low is not None else None
            result = evaluate(
                classifier, {name: purifiers(denoiser)[name]}, {"pgd": attack}, *data, runs=runs, chunk=chunk,
                batch_size=256, gradients=gradients, progress=False, gallery=0,
            )  # fmt: skip
            found[name] = [replace(record, seconds=0.0) for record in result.records]
            if smaller := {record.chunk for record in result.records} - {None}:
                print(f"{name} attacked in {attacked}: memory was too small, chunks of {smaller} rows")
    return found


def correct(found):
    """Share of correct runs of each image."""
    hits = [[run == record.label for run in record.adversarial] for record in found]
    return torch.tensor(hits, dtype=torch.float32).mean(dim=1)


def tensors(split):
    """Images and labels of a split."""
    items = [split[k] for k in range(len(split))]
    return torch.stack([item["image"] for item in items]), torch.tensor([item["label"] for item in items])


@contextlib.contextmanager
def deterministic():
    """Deterministic algorithms alone, as far as there are some."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def measure(device, now, folder, quick):
    """The time of the table, whether it can be repeated, then the differences."""
    gpu = device.type == "cuda"
    names = list(purifiers(load_denoiser(ROOT / "checkpoints/cifar10_denoiser.safetensors")))
    count, steps, small = (256, 20, {}) if gpu else (4, 1, {"runs": 2, "chunk": 8})
    if folder is None:
        data = images(count, "cpu"), torch.arange(count) % 10
    else:
        data = tensors(ImageFolder(folder, size=32, subset=RandomChoice(count, 0)).evaluated)

    def timed_records(attacked, chosen):
        found = {}
        seconds = timed(lambda: found.update(records("cifar10", device, data, attacked, chosen, steps, **small)), now)
        print(f"{count} images, PGD {steps} x EOT 4, attacked in {attacked}: {seconds:.1f} s for {', '.join(chosen)}")
        return found, seconds

    first, seconds = timed_records("tf32", names)
    about = target("256 images, PGD 20 x EOT 4, N = 10, five purifiers: seconds", seconds, most=15.0)
    yield {"name": "evaluation", "attacked": "tf32", "seconds": seconds, "purifiers": len(names), **about}
    again, plain = timed_records("tf32", FEW)
    yield target("two evaluations are equal", float(again == {name: first[name] for name in FEW}), least=1.0)
    if not gpu:
        return
    with deterministic():
        _, strict = timed_records("tf32", FEW)
        yield row("deterministic / default evaluation", [(strict, plain)], limit=1.05)
        same = timed_records("tf32", FEW[1:2])[0] == timed_records("tf32", FEW[1:2])[0]
        yield target("two deterministic evaluations are equal", float(same), least=1.0)
    digits, few = tensors(Digits(subset=First(64)).evaluated), FEW[1:2] if quick else FEW
    ours, found = "cifar10" if folder else "noise", {}
    found["digits"] = {kind: records("digits", device, digits, kind, FEW) for kind in ("float32", "tf32", "bf16")}
    # The slowest last: it has no tensor cores.
    found[ours] = {"tf32": first, "bf16": timed_records("bf16", FEW)[0], "float32": timed_records("float32", few)[0]}
    for data_name, attacked in found.items():
        for other in ("tf32", "bf16"):
            for name in attacked["float32"]:
                pair = attacked["float32"][name], attacked[other][name]
                yield difference(f"{data_name} {name}, attacked in {other}", *pair)


def difference(name, first, second):
    """What another precision changes of robust accuracy, in points."""
    shares = [correct(found) for found in (first, second)]
    points = 100.0 * (shares[1] - shares[0])
    half = 1.96 * points.std().item() / len(points) ** 0.5
    mean, robust = points.mean().item(), 100.0 * shares[0].mean().item()
    title = f"robust accuracy of {name}: points, of {robust:.1f} [{mean - half:+.2f}, {mean + half:+.2f}]"
    return {
        "name": name,
        "robust": robust,
        "difference": mean,
        "half_width": half,
        **target(title, abs(mean), most=0.5),
    }
