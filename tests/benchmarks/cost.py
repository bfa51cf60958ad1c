"""What a sample costs, when one setting at a time is doubled, against the network calls that it stands for."""

import subprocess
import sys
import tempfile

import torch
from calls import networks
from measuring import ROOT, children, clock, compare, row, timed

from lit_purify.attacks import PGD
from lit_purify.defense import DefendedClassifier, Exact, UniformPurifier
from lit_purify.functional.chunks import logits_in_chunks
from lit_purify.functional.noise import ATTACK, KeyedNoise

BASE = {"calls": 2, "steps": 2, "eot": 4, "runs": 8, "pixels": 32}
SAMPLES, CHUNK = 8, 32
EVALUATION = ["--model.init_args.attacks.pgd.init_args.steps", "4", "--model.init_args.chunk", "40"]
EVALUATION += ["--data.init_args.subset.init_args.n", "40", "--data.init_args.batch_size", "5"]


def measure(size, device):
    """Seconds a sample, once each."""
    for name in (None, *BASE):
        settings = BASE | ({name: 2 * BASE[name]} if name else {})
        title = ", ".join(f"{key} {value}" for key, value in settings.items())
        yield evaluation(f"cost: {title}", size, device, **settings)
    seconds = [timed(lambda count=count: digits(count), children) for count in (2, 1)]
    yield row("cost: digits by 2 processes / by 1 (CPU of all)", [seconds], per=40)


def evaluation(title, size, device, calls, steps, eot, runs, pixels):
    """An attack, and clean and adversarial images classified; the bound is calls of the denoiser alone."""
    denoiser, classifier = networks(size, device, pixels)
    defended = DefendedClassifier(UniformPurifier(denoiser, classifier, 150, calls), classifier)
    image = torch.rand(SAMPLES, 3, pixels, pixels, generator=torch.Generator().manual_seed(0)).to(device)
    index, attack = torch.arange(SAMPLES, device=device), PGD("linf", "8/255", steps, "2/255", eot, "margin")
    noise = KeyedNoise(0, index, torch.zeros_like(index), ATTACK)
    level, rows = torch.full((CHUNK,), 150, device=device), image.repeat(CHUNK // SAMPLES, 1, 1, 1)

    def ours():
        adversarial = attack(Exact().attacked(defended), image, index % 10, noise, CHUNK)
        for shown in (image, adversarial):
            logits_in_chunks(defended, shown, noise, list(range(runs)), CHUNK)

    def bare():
        for k in range(calls * steps * SAMPLES * eot // CHUNK):
            leaf = rows.clone().requires_grad_()
            torch.autograd.grad(denoiser(leaf, level).sum(), leaf)
            if k % calls:
                with torch.no_grad():
                    denoiser(rows, level)
        for _ in range(calls * 2 * SAMPLES * runs // CHUNK):
            with torch.no_grad():
                denoiser(rows, level)

    return compare(title, ours, bare, clock(device), pairs=1, per=SAMPLES)


def digits(processes):
    """Evaluates 40 digits under a short attack."""
    several = ["--trainer.devices", str(processes), "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
    # Unlike Lightning, torchrun waits for its processes: else their CPU time would not be known.
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    with tempfile.TemporaryDirectory() as place:
        command = [*start, "--", "eval.py", "--run", place, "--trainer.logger", "false", *EVALUATION, *several]
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
