"""What a dry run expects against what the evaluation takes, for each defense under each attack, by hand:

python tests/campaigns/dry_run.py FOLDER [frontier] [--config FILE] [--SETTING VALUE ...]

Both are measured in CPU seconds of this process, which other processes of a shared machine disturb less; take one
thread (OMP_NUM_THREADS=1) and no GPU. FOLDER must be new. README's figures, with A for model.init_args and D for
data.init_args:

FOLDER --D.subset.init_args.n 100 --A.attacks.pgd.init_args.steps 10
FOLDER --D.subset.init_args.n 24 --D.batch_size 10 --A.runs 3 --A.chunk 16 --A.attacks
    '{"apgd": {"class_path": "APGD", "init_args": {"norm": "l2", "eps": 1.0, "steps": 8}},
    "square": {"class_path": "Square", "init_args": {"norm": "linf", "eps": 0.15, "steps": 10}}}'
FOLDER frontier --D.subset.init_args.n 10 --A.runs 2 --A.attacks.pgd.init_args.{steps 4,eot 2}
"""

import inspect
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[2]))

from lit_purify.cli import evaluate
from lit_purify.evaluation import estimate, read_records
from lit_purify.training import robustness


def main(folder: str, *argv: str) -> None:
    """Prints expected, taken and their ratio."""
    sys.argv = sys.argv[:1]
    estimate.perf_counter = time.process_time
    robustness.time = SimpleNamespace(perf_counter=time.process_time)
    original, expected = estimate.EstimatingTrainer.estimate, {}

    def kept(self, *args, **kwargs):
        expected.update(original(self, *args, **kwargs))

    kept.__signature__, kept.__doc__ = inspect.signature(original), original.__doc__
    estimate.EstimatingTrainer.estimate = kept
    evaluate([*argv, "--dry_run", "--run", folder])
    started = time.process_time()
    evaluate([*argv, "--run", folder])
    whole = time.process_time() - started
    taken = defaultdict(float)
    for record in read_records(Path(folder) / "records.jsonl"):
        taken[record.defense, record.attack] += record.seconds
    rows = [(*pair, expected[pair], seconds) for pair, seconds in taken.items()]
    rows.append(("all", "", sum(expected.values()), sum(taken.values())))
    rows.append(("with start and report", "", sum(expected.values()), whole))
    for defense, attack, e, t in rows:
        print(f"{defense:40}  {attack:14}  expected {e:8.2f} s  took {t:8.2f} s  ratio {e / t:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
