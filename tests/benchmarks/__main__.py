"""How fast everything is beside what it cannot be faster than, measured in the same run:

    python tests/benchmarks [--device cuda] [--only PART ...] [--networks SIZE ...] [--pairs N] [--output FILE]

Prints a table and writes it, with machine and versions, as JSON. What is measured and its bound take turns; a ratio
is the median over pairs. On a CPU times are CPU seconds of one thread, so that other load disturbs them less; on a
GPU they are wall-clock seconds. About ten minutes on one core of a CPU. docs/speed.md has the results.
"""

import argparse
import json
import logging
import os
import sys
import warnings
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    # Before torch is imported: CPU time of several threads that wait for each other says little.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(Path(__file__).parents[2]))

import calls
import cost
import records
import startup
import torch
import training
from measuring import machine

PARTS = ("calls", "evaluations", "training", "cost", "records", "startup")


def main():
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--networks", nargs="+", choices=calls.SIZES, help="default: small, on a GPU both")
    parser.add_argument("--batch", type=int, help="rows of a network call (default: 32, on a GPU 256)")
    parser.add_argument("--pairs", type=int, default=7, help="how often each is measured")
    parser.add_argument("--output", type=Path, help="a JSON file")
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    gpu = given.device.type == "cuda"
    batch = given.batch or (256 if gpu else 32)
    found = {"command": sys.argv[1:], "batch": batch, "machine": machine(given.device), "results": []}
    print(json.dumps(found["machine"], indent=1))
    print(f"{'':70} {'seconds':>10} {'bound':>10} {'ratio':>7} {'quartiles':>15} {'limit':>6}")
    measures = []
    for name in given.networks or [*calls.SIZES][: 1 + gpu]:
        both = {"calls": calls.measure, "evaluations": calls.measure_evaluations, "training": training.measure}
        for part, measure in both.items():
            if part in given.only:
                measures.append((f"{name}: ", partial(measure, name, given.device, batch, given.pairs)))
    if "cost" in given.only:
        measures.append(("", partial(cost.measure, "small", given.device)))
    for part, module in (("records", records), ("startup", startup)):
        if part in given.only:
            measures.append(("", partial(module.measure, given.pairs)))
    for prefix, measure in measures:
        for row in measure():
            row["name"] = prefix + row["name"]
            low, high = row["quartiles"]
            limit = f"{row['limit']:6.2f}{' !' * (row['ratio'] > row['limit'])}" if "limit" in row else ""
            print(
                f"{row['name']:70} {row['seconds']:10.4g} {row['bound']:10.4g} {row['ratio']:7.3f} "
                f"{low:7.3f} {high:7.3f} {limit}",
                flush=True,
            )
            found["results"].append(row)
            if given.output:
                given.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
