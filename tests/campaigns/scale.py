"""What an evaluation of 50,000 images costs beside its network calls, with made-up records.

    python tests/campaigns/scale.py FOLDER [SAMPLES [PAIRS [RUNS [RANKS]]]]

Prints seconds of this process's CPU time, wall-clock seconds beside them, and peak memory, for each thing that one
process does: with several hundred thousand records some minutes, and a few GB.
"""

import json
import resource
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lit_purify.attacks import PGD
from lit_purify.defense import NoPurifier
from lit_purify.evaluation import Evaluator, Record, RobustnessTask
from lit_purify.evaluation.folder import RunFolder
from lit_purify.models import ResNetClassifier
from lit_purify.report.summary import summarize


@contextmanager
def measured(what, count):
    """Prints what it took."""
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{what:32} {cpu:8.1f} s CPU {wall:8.1f} s wall {count / cpu:12,.0f} records/s   peak {peak:.2f} GiB",
        flush=True,
    )


def main(folder, samples=50_000, pairs=12, runs=8, ranks=64):
    """Writes parts as ranks would, merges, resumes, summarizes."""
    run, draw = RunFolder(folder), np.random.default_rng(0)
    folder.mkdir(parents=True)
    count = samples * pairs
    labels = draw.integers(1000, size=samples).tolist()
    names = [(f"defense{k // 3}", f"attack{k % 3}") for k in range(pairs)]
    with measured("make records", count):
        records = [
            Record(defense, attack, i, labels[i], clean, broken, 0.0313, 1.25, 0.37)
            for defense, attack in names
            for i, (clean, broken) in enumerate(draw.integers(1000, size=(samples, 2, runs)).tolist())
        ]
    with measured("lines, written", count):
        for rank in range(ranks):
            run.part(rank).write_text("".join(record.line() for record in records[rank::ranks]))
    print(f"{sum(path.stat().st_size for path in folder.iterdir()) / 2**20:.0f} MiB of records in {ranks} parts")
    del records
    with measured("merged (rank zero, start and end)", count):
        records = run.collect(write=True)
    with measured("read (every rank, at the start)", count):
        run.collect(write=False)
    classifier = ResNetClassifier(8, 8, 1000, 1, 4)
    attacks = {attack: PGD("linf", 0.03, 1, 0.01) for attack in dict.fromkeys(a for _, a in names)}
    task = RobustnessTask(Evaluator(classifier, {d: NoPurifier() for d, _ in names}, attacks, runs=runs))
    with measured("taken over (every rank)", count):
        task.resume(records, count=True)
    described = [
        {"defense": d, "attack": a, "norm": "linf", "eps": 0.03, "attack_steps": 40, "eot": 4, "gradient": "exact"}
        | {"nfe_defense": 4, "nfe_attack": 4, "queries": {"forward": 1}, "stopping": ""}
        for d, a in names
    ]
    facts = {"chunk": 64, "dataset": "made up", "samples": samples, "runs": runs, "classifier": "none"}
    with measured("summarized", count):
        summary = summarize(records, described, facts, "defense0")
    print(f"{len(json.dumps(summary)) / 1024:.0f} KiB of summary")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
