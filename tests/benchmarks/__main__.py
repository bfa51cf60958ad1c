"""How fast everything is beside what it cannot be faster than, measured in the same run:

    python tests/benchmarks [--device cuda] [--only PART ...] [--networks SIZE ...] [--variants VARIANT ...]
        [--images FOLDER] [--pairs N] [--output FILE]

Prints a table and writes it, with machine and versions, as JSON. What is measured and its bound take turns; a ratio
is the median over pairs. On a CPU times are CPU seconds of one thread, so that other load disturbs them less; on a
GPU they are wall-clock seconds. There all networks are measured, in float32, under bf16 autocast, and compiled under
it; the limits are closer; whatever makes a purification wait for the device is an error. About ten minutes on one core
of a CPU. docs/speed.md has the results.
"""

import argparse
import itertools
import json
import logging
import os
import sys
import warnings
from pathlib import Path

if __name__ == "__main__":
    # Before torch is imported: CPU time of several threads that wait for each other says little.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(Path(__file__).parents[2]))

import calls
import cost
import precision
import records
import startup
import torch
import training
from measuring import machine

SIZED = {"calls": calls.measure, "evaluations": calls.measure_evaluations, "training": training.measure}
PARTS = (*SIZED, "precision", "cost", "records", "startup")
VARIANTS = ("float32", "bf16", "compiled")


def rows(device, only, sizes, variants, images, batch, pairs):
    """Measures one thing after the other."""
    for variant, size, part in itertools.product(variants, sizes, SIZED):
        compiled = {"compiled": True} if variant == "compiled" else {}
        # Trainings are not compiled; the network of ImageNet does not fit what the other parts do.
        if part in only and not (compiled and part == "training") and (size != "imagenet" or part == "calls"):
            with torch.autocast(device.type, torch.bfloat16, enabled=variant != "float32"):
                for found in SIZED[part](size, device, batch, pairs, **compiled):
                    yield found | {"name": f"{size}, {variant}: {found['name']}"}
    if "precision" in only:
        yield from precision.measure(device, images)
    if "cost" in only:
        yield from cost.measure("small", device)
    for part, module in (("records", records), ("startup", startup)):
        if part in only:
            yield from module.measure(pairs)


def main():
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--networks", nargs="+", choices=calls.SIZES, help="default: small, on a GPU all")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: float32, on a GPU all")
    parser.add_argument("--images", type=Path, help="CIFAR-10, for the part precision (default: the embedded digits)")
    parser.add_argument("--batch", type=int, help="rows of a network call (default: 32, on a GPU 256)")
    parser.add_argument("--pairs", type=int, default=7, help="how often each is measured")
    parser.add_argument("--output", type=Path, help="a JSON file")
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    gpu = given.device.type == "cuda"
    batch = given.batch or (256 if gpu else 32)
    sizes, variants = (
        chosen or every[: None if gpu else 1]
        for chosen, every in ((given.networks, [*calls.SIZES]), (given.variants, VARIANTS))
    )
    if batch < 2 or batch % 2:
        parser.error(f"argument --batch: {batch} rows; use an even number, an evaluation takes half as many images")
    found = {"command": sys.argv[1:], "batch": batch, "machine": machine(given.device), "results": []}
    print(json.dumps(found["machine"], indent=1))
    print(f"{'':80} {'seconds':>10} {'bound':>10} {'ratio':>7} {'quartiles':>15} {'limit':>6}")
    for row in rows(given.device, given.only, sizes, variants, given.images, batch, given.pairs):
        low, high = row["quartiles"]
        limit = f"{row['limit']:6.2f}{' !' * (row['ratio'] > row['limit'])}" if "limit" in row else ""
        print(
            f"{row['name']:80} {row['seconds']:10.4g} {row['bound']:10.4g} {row['ratio']:7.3f} "
            f"{low:7.3f} {high:7.3f} {limit}",
            flush=True,
        )
        found["results"].append(row)
        if given.output:
            given.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
