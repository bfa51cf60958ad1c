"""Time and memory of an exact attack step through single-step and multi-step resampling, on the CIFAR-10 weights.

    nice python tests/campaigns/resampling_step.py

One thread, 32 images of noise, 4 grid steps from 200 to 100 to 0, U = 10 (``multi``: back in 10 steps of one level).
Every line is a process of its own, whose peak memory is its VmHWM; the first one calls the classifier alone, and what a
line needs above it is the purifier's.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from lit_purify.attacks import PGD
from lit_purify.defense import DefendedClassifier, HeterogeneousPurifier, NoPurifier, Purifier, TopFraction
from lit_purify.functional.noise import KeyedNoise
from lit_purify.models import load_classifier, load_denoiser

ROOT = Path(__file__).parents[2]
CASES = [(None, False), *((kind, recompute) for recompute in (True, False) for kind in ("none", "single", "multi"))]
HIGH, LOW, STEPS, JUMP, ROWS, REPEATS = 200, 100, 4, 10, 32, 3


def measure(resampling: str | None, recompute: bool) -> dict[str, float]:
    """Network calls of a purification, seconds of CPU of an attack step (the least of three), peak memory in GB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    classifier = load_classifier(ROOT / "checkpoints/cifar10_classifier.safetensors").eval().requires_grad_(False)
    denoiser = load_denoiser(ROOT / "checkpoints/cifar10_denoiser.safetensors").eval().requires_grad_(False)
    purifier: Purifier = NoPurifier(denoiser, classifier)
    if resampling is not None:
        options = {"steps": STEPS, "resampling": resampling, "jump": JUMP, "recompute": recompute}
        purifier = HeterogeneousPurifier(denoiser, classifier, TopFraction(0.25), HIGH, LOW, **options)
    model = DefendedClassifier(purifier, classifier)
    image, index = torch.rand(ROWS, 3, 32, 32), torch.arange(ROWS)
    noise = KeyedNoise(0, index, torch.zeros_like(index))
    attack = PGD("linf", "8/255", steps=1, step_size="2/255", loss="margin", random_start=False)
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        attack(model, image, index % 10, noise, chunk=ROWS)
        times.append(time.process_time() - start)
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
    return {"calls": purifier.nfe, "seconds": min(times), "peak": peak}


def main() -> None:
    """One process after another."""
    print(f"torch {torch.__version__}, {ROWS} images, levels {HIGH}/{LOW}, {STEPS} steps, U = {JUMP}", flush=True)
    print(
        f"{'resampling':12}{'gradient':14}{'calls':>6}{'s CPU':>8}{'GB':>7}{'GB above the classifier':>25}", flush=True
    )
    alone = 0.0
    for resampling, recompute in CASES:
        command = [sys.executable, __file__, "--child", json.dumps([resampling, recompute])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        alone = alone or found["peak"]
        kind = ("recomputed" if recompute else "kept") if resampling else ""
        row = f"{resampling or 'no purifier':12}{kind:14}{found['calls']:6}{found['seconds']:8.2f}{found['peak']:7.2f}"
        print(f"{row}{found['peak'] - alone:25.2f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
    else:
        main()
