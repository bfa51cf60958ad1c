"""Memory and time of one exact attack step on ImageNet with the 256x256 network of guided-diffusion.

    nice python tests/campaigns/imagenet_step.py [FREE]

Random weights in the public layout (552.8 M parameters, float32), one made-up image of 224x224, ResNet-50 of random
weights behind ``ResizedPurifier``, on the CPU. Every line is a process of its own, whose peak memory is its VmHWM; what
one diffusion step more costs is the difference of two lines. Stops when less than FREE (10) GB of memory is available.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from calls import networks

from lit_purify.attacks import PGD
from lit_purify.defense import DefendedClassifier, ResizedPurifier, UniformPurifier
from lit_purify.functional.noise import KeyedNoise
from lit_purify.models import TimmClassifier

CASES = {
    # Diffusion steps, whether it is differentiated, whether the network recomputes its blocks.
    "weights alone": (0, False, False),
    "forward, 1 step": (1, False, False),
    "forward, 2 steps": (2, False, False),
    "attack step, 1 diffusion step": (1, True, False),
    "attack step, 2 diffusion steps": (2, True, False),
    "attack step, 1 diffusion step, blocks recomputed": (1, True, True),
    "attack step, 2 diffusion steps, blocks recomputed": (2, True, True),
}


def gigabytes(name: str, path: str) -> float:
    """A line of the kernel's account of memory."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path(path).read_text())[1]) * 1024 / 1e9


def measure(steps: int, differentiate: bool, blocks: bool) -> dict[str, float]:
    """Seconds of CPU time and on the wall of one call of the defense or one step of an attack; peak memory in GB."""
    torch.manual_seed(0)
    denoiser, _ = networks("imagenet", torch.device("cpu"))
    denoiser.gradient_checkpointing = blocks
    classifier = TimmClassifier("resnet50").eval().requires_grad_(False)
    parameters = sum(p.numel() for p in denoiser.parameters())
    image, index = torch.rand(1, 3, 224, 224), torch.zeros(1, dtype=torch.int64)
    noise = KeyedNoise(0, index, index)
    cpu, wall = time.process_time(), time.perf_counter()
    if steps:
        purifier = ResizedPurifier(denoiser, classifier, lambda d, c: UniformPurifier(d, c, 150, steps, "ddpm"))
        model = DefendedClassifier(purifier, classifier)
        if differentiate:
            found: Tensor = PGD("linf", "4/255", steps=1, step_size=0.007, random_start=False)(
                model, image, torch.zeros(1, dtype=torch.int64), noise, chunk=1
            )
            assert (found != image).float().mean() > 0.9, "no gradient arrived"
        else:
            with torch.no_grad():
                assert model(image, noise).isfinite().all()
    taken = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    return {**taken, "peak": gigabytes("VmHWM", "/proc/self/status"), "parameters": parameters}


def main(free: float = 10.0) -> None:
    """One process after another."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)", flush=True)
    for name, (steps, differentiate, blocks) in CASES.items():
        if (available := gigabytes("MemAvailable", "/proc/meminfo")) < free:
            sys.exit(f"{available:.1f} GB of memory are available, less than {free:.1f}: stopped before: {name}")
        arguments = json.dumps([steps, differentiate, blocks])
        done = subprocess.run(
            [sys.executable, __file__, "--child", arguments], stdout=subprocess.PIPE, text=True, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{name:50} {found['cpu']:8.1f} s CPU {found['wall']:8.1f} s wall   peak {found['peak']:5.2f} GB   "
            f"{found['parameters'] / 1e6:.1f} M parameters",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
    else:
        main(*map(float, sys.argv[1:]))
