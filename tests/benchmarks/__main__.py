"""How fast everything is beside what it cannot be faster than, measured in the same run:

    python tests/benchmarks [--device cuda] [--quick] [--only PART ...] [--images FOLDER] [--output FILE]

Prints tables, then each target with its verdict, and writes all of it, with machine and versions, as JSON. On a CPU
times are CPU seconds of one thread, so that other load disturbs them less; on a GPU they are wall-clock seconds. A
ratio is the median over pairs that are measured in turns. What makes a purification wait for a GPU is an error. With
--quick each part ends when its share of eight minutes is over, and what it has not measured is missing. docs/speed.md
has the results.
"""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    # Before torch is imported: CPU time of several threads that wait for each other says little.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # For deterministic algorithms; read when cuBLAS starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sys.path.insert(0, str(Path(__file__).parents[2]))

import evaluations
import rates
import ratios
import startup
import torch
import training
from measuring import clock, machine

LIMITS = {"rates": 130, "training": 70, "evaluations": 160, "ratios": 90, "startup": 20}
"""Seconds of each part with --quick: less than eight minutes."""
AGAIN = 2.0
"""Seconds until a part that goes on is told once more."""


class OutOfTimeError(Exception):
    """A part has had its time."""


@contextlib.contextmanager
def limited(seconds):
    """Ends what runs inside after so many seconds; ``None`` does not."""

    def ring(*_):
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, ring)
    # Again and again: the first may come where exceptions are ignored.
    signal.setitimer(signal.ITIMER_REAL, seconds or 0, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def parts(given):
    """Generators of rows, by name."""
    common = given.device, clock(given.device)
    return {
        "rates": partial(rates.measure, *common, given.quick),
        "training": partial(training.measure, *common, given.quick),
        "evaluations": partial(evaluations.measure, *common, given.images, given.quick),
        "ratios": partial(ratios.measure, *common, given.quick),
        "startup": partial(startup.measure, 3),
    }


WANTED = (
    "imagenet, 8 rows, bf16, forward:",
    "full, 256 rows, bf16, forward:",
    "full, 256 rows, bf16, forward + backward:",
    "training step: share of the peak",
    "256 images, PGD 20 x EOT 4",
    "training step / bare loop",
    "purification ",
    "mask ",
    "keyed noise ",
    "two evaluations are equal",
    "robust accuracy of ",
)
"""How the names of a GPU's targets begin."""


def main(argv=None):
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--quick", action="store_true", help="what the targets are about, and little more")
    parser.add_argument("--only", nargs="+", choices=("rates", "training", "evaluations", "ratios", "startup"))
    parser.add_argument("--images", type=Path, help="CIFAR-10 in folders; without it evaluations attack noise")
    parser.add_argument("--output", type=Path, help="a JSON file")
    given = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    started, rows, failed = time.perf_counter(), [], []
    found = {"command": sys.argv[1:], "machine": machine(given.device), "results": rows}
    print(json.dumps(found["machine"], indent=1))
    for part, measure in parts(given).items():
        if part not in (given.only or parts(given)):
            continue
        print(f"\n{part}, after {time.perf_counter() - started:.0f} s", flush=True)
        try:
            with limited(LIMITS[part] if given.quick else None):
                for row in measure():
                    rows.append(row)
                    if "ratio" in row:
                        low, high = row["quartiles"]
                        print(
                            f"{row['name']:60} {row['seconds']:10.4g} / {row['bound']:10.4g} s = {row['ratio']:7.3f} "
                            f"[{low:.3f}, {high:.3f}]",
                            flush=True,
                        )
        except OutOfTimeError:
            print(f"{part}: ended after {LIMITS[part]} s, the rest is not measured")
            failed.append(part)
        except Exception:
            # The other parts are measured all the same.
            traceback.print_exc()
            failed.append(part)
    verdicts = [row["target"] for row in rows if "target" in row]
    print("\ntargets")
    for name, figure, wanted, reached in verdicts:
        print(f"{name:96} {figure:8.3f} {wanted:8.3f} {'reached' if reached else 'MISSED'}")
    unmeasured = [name for name in WANTED if not any(row[0].startswith(name) for row in verdicts)]
    for name in unmeasured:
        print(f"{name.rstrip(' :'):96} not measured")
    print(f"{time.perf_counter() - started:.0f} s; {', '.join(failed) or 'no part'} failed or ended early")
    found |= {"targets": verdicts, "unmeasured": unmeasured, "failed": failed, "seconds": time.perf_counter() - started}
    if given.output:
        given.output.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
