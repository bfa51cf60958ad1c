"""What bf16 autocast changes of an attack, and what it saves: gradients and predictions against those of float32."""

import torch
from calls import defenses
from measuring import ROOT, clock, row, timed

from lit_purify.data import CIFAR10, Digits, RandomChoice
from lit_purify.defense import DefendedClassifier, NoPurifier
from lit_purify.functional.chunks import draws_in_chunks
from lit_purify.functional.losses import named_loss
from lit_purify.functional.noise import KeyedNoise
from lit_purify.models import load_classifier, load_denoiser

SAMPLES = 64
READERS = {"denoiser": load_denoiser, "classifier": load_classifier}


def measure(device, folder):
    """Rows of the weights that ship, on validation images: of CIFAR-10 in a folder, of the digits without one."""
    chosen = {"batch_size": SAMPLES, "subset": RandomChoice(SAMPLES, 0), "evaluate_on": "val"}
    kind, data = ("digits", Digits(**chosen)) if folder is None else ("cifar10", CIFAR10(folder, **chosen))
    batch = {name: values.to(device) for name, values in next(iter(data.test_dataloader())).items()}
    networks = (read(ROOT / f"checkpoints/{kind}_{name}.safetensors") for name, read in READERS.items())
    denoiser, classifier = (network.to(device).eval().requires_grad_(False) for network in networks)
    noise = KeyedNoise(0, batch["index"], torch.zeros_like(batch["index"]))
    now = clock(device)
    for name, purifier in {"none": NoPurifier(denoiser, classifier), **defenses(denoiser, classifier)}.items():
        model, found, seconds = DefendedClassifier(purifier, classifier), [], []
        for low in (True, False):
            with torch.autocast(device.type, torch.bfloat16, enabled=low):
                seconds.append(timed(lambda model=model, found=found: found.append(learned(model, batch, noise)), now))
        signs = [each.gradient.sign() for each in found]
        classes = [each.logits.argmax(dim=2) for each in found]
        equal, changed = (signs[0] == signs[1]).float().mean().item(), (classes[0] != classes[1]).float().mean().item()
        yield row(
            f"{kind}, {name} in bf16 / float32: {equal:.1%} of signs equal, {changed:.1%} of classes not",
            [tuple(seconds)],
            signs_equal=equal,
            classes_changed=changed,
            accuracies=[(each == batch["label"][:, None]).float().mean().item() for each in classes],
        )


def learned(model, batch, noise):
    """Logits and gradients of one draw."""
    return draws_in_chunks(model, named_loss("margin"), batch["image"], batch["label"], noise, [0], SAMPLES)
