"""How long processes wait for the last of them, in evaluations whose samples do not cost the same.

An attack sleeps as long as a sample is said to cost: ``equal``, ``alternating`` (every other sample costs a tenth),
``random`` (lognormal, sigma 1) or ``resumed`` (equal, but every other sample is recorded already, as when one of two
processes was killed). Prints for each the share of the evaluation's time that the first process to end waits.

    PYTHONPATH=. python tests/campaigns/balance.py --world 2

PYTHONPATH may name another checkout, to compare with.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning as L
import numpy as np
from processes import finish, tiny

from lit_purify.attacks import Attack
from lit_purify.attacks.base import Queries

SAMPLES, BATCH, SECONDS = 48, 2, 1.0
COSTS = {
    "equal": np.ones(SAMPLES),
    "alternating": np.where(np.arange(SAMPLES) % 2, 1.9, 0.19),
    "random": np.random.RandomState(0).lognormal(-0.5, 1.0, SAMPLES),
    "resumed": np.ones(SAMPLES),
}


class Sleeper(Attack):
    """Changes nothing, and takes its time."""

    gradient, steps, eot, queries = "none", 0, 1, Queries(0, 0)

    def __init__(self, costs: str) -> None:
        super().__init__("linf", 0.1)
        self.costs = costs

    def perturb(self, model, image, label, noise, chunk):
        time.sleep(SECONDS * COSTS[self.costs][noise.index.cpu()].sum())
        return image


class Clock(L.Callback):
    """Writes down when a process begins and ends."""

    def on_test_start(self, trainer, pl_module):
        trainer.strategy.barrier()
        self.start = time.time()

    def on_test_epoch_end(self, trainer, pl_module):
        run = Path(trainer.default_root_dir)
        (run / f"clock{trainer.global_rank}.json").write_text(json.dumps([self.start, time.time()]))


def idle(folder, costs, world):
    """Share of the time that the first process to end waits, and the time, in seconds."""
    config = tiny(folder / f"{costs}.yaml", SAMPLES, class_path="balance.Sleeper", costs=costs)
    run, flags = folder / costs, ["--data.batch_size", str(BATCH), "--trainer.callbacks+=balance.Clock"]
    if costs == "resumed":
        finish(config, run, 4, flags)
        lines = (run / "records.jsonl").read_text().splitlines(keepends=True)
        (run / "records.jsonl").write_text("".join(lines[::2]))
    finish(config, run, world, flags)
    clocks = [json.loads((run / f"clock{rank}.json").read_text()) for rank in range(world)]
    start, ends = max(start for start, _ in clocks), [end for _, end in clocks]
    return (max(ends) - min(ends)) / (max(ends) - start), max(ends) - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=int, default=2)
    world = parser.parse_args().world
    with tempfile.TemporaryDirectory() as folder:
        for costs in COSTS:
            share, seconds = idle(Path(folder), costs, world)
            print(f"{costs:12} {100 * share:5.1f} % of {seconds:5.1f} s waited", flush=True)
