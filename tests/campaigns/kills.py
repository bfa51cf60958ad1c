"""Interrupts evaluations at random, takes them up again, and compares with one that nobody interrupted.

Each round begins an evaluation on some processes with some batch size and interrupts it one to three times: SIGKILL
or SIGTERM of all processes or SIGKILL of one (what is left of the run lives on while the next begins), SIGKILL of a
process just before its k-th change of the folder (merging, replacing, reporting), a disk that fills in the middle of a
write, or a second launch on the same folder. After some of them the end of a file of records is cut off, as when a
machine crashes. Then it finishes, again on some processes with some batch size, and must leave what the uninterrupted
one left; every record that was on the disk must have been kept.

    PYTHONPATH=. python tests/campaigns/kills.py --rounds 50 --seed 0

About 8 seconds of one core a round; exit status 1 when a round fails.
"""

import argparse
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from processes import SAMPLES, Killer, Room, finish, launch, recorded, result, tiny

KINDS = ("all", "one", "term", "folder", "room", "second")


def deck(draw):
    """All kinds in random order, over and over."""
    while True:
        yield from draw.sample(KINDS, len(KINDS))


def interrupt(draw, config, run, duration, kind):
    """Begins an evaluation and ends it; returns the launch, of which processes may live on."""
    world = draw.choice((1, 2, 3))
    flags = ["--data.batch_size", str(draw.choice((1, 3, 5, 13)))]
    spoil = Killer(run, draw.randrange(world), draw.randrange(22)) if kind == "folder" else None
    spoil = Room(draw.randrange(50, 2_500)) if kind == "room" else spoil
    launched = launch(config, run, world, flags, spoil)
    if kind in ("folder", "room"):
        while all(process.exitcode is None for process in launched.processes):
            time.sleep(0.01)
    else:
        records = draw.randrange(SAMPLES)
        while len(recorded(run)) < records and any(process.exitcode is None for process in launched.processes):
            time.sleep(0.005)
        time.sleep(duration * draw.uniform(0.0, 0.2 if records else 0.8))
    if kind == "second":
        second = launch(config, run)
        (status,) = second.wait()
        # Refused, unless the first had ended, or had not yet come to lock the folder.
        if status != 0:
            assert status == 2, second.said
            assert second.said.count("\n") == 1, second.said
            assert "another run is writing there" in second.said, second.said
        launched.wait()
    if kind == "room":
        time.sleep(0.2)
        assert "Traceback" not in launched.said, launched.said
    if kind == "term":
        launched.kill(signal.SIGTERM)
        launched.wait()
        assert "Traceback" not in launched.said.split("stopped; the same command resumes")[0], launched.said
    elif kind == "one":
        launched.kill(ranks={draw.randrange(world)})
    elif kind == "all":
        launched.kill()
    return launched


def tear(draw, run):
    """Cuts off the end of a file of records; returns whether it did."""
    parts = sorted(run.glob("records*.jsonl"))
    if not parts or draw.random() < 0.5:
        return False
    path = draw.choice(parts)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - draw.randrange(1, 300)] if len(content) > 300 else content[:-1])
    return True


def campaign(folder, rounds, seed, worlds=(1, 2, 3, 4)):
    """Plays the rounds; returns what was done, and a line for each round that failed."""
    config = tiny(folder / "tiny.yaml")
    finish(config, folder / "warm")
    started = time.monotonic()
    finish(config, folder / "whole")
    duration, expected = time.monotonic() - started, result(folder / "whole")
    counts, failures, kinds = Counter(), [], deck(random.Random(seed))
    for number in range(rounds):
        draw, run = random.Random(f"{seed}/{number}"), folder / f"run{number}"
        alive, story = [], []
        try:
            for _ in range(draw.choice((1, 1, 2, 3))):
                kind = next(kinds)
                story.append(kind)
                launched = interrupt(draw, config, run, duration, kind)
                alive.append(launched)
                # While rank zero lives the folder is its own; of the others the next launch must not mind.
                launched.processes[0].join(5)
                launched.kill(ranks={0})
                launched.processes[0].join()
                counts[kind] += 1
                # A file that somebody may still write into is not cut.
                if all(process.exitcode is not None for process in launched.processes) and tear(draw, run):
                    story.append("torn")
                    counts["torn"] += 1
                before = recorded(run)
                counts["records found"] += len(before)
                counts["unfinished"] += len(before) < SAMPLES or not (run / "report.html").exists()
            world, batch = draw.choice(worlds), draw.choice((1, 2, 4, 13))
            story.append(f"{world} x {batch}")
            said = finish(config, run, world, ["--data.batch_size", str(batch)])
            assert result(run) == expected, "another result"
            after = recorded(run)
            lost = [key for key, seconds in before.items() if not after[key] <= seconds]
            assert not lost, f"recorded and made anew: {lost}"
            # Or after more, written meanwhile by what lives on of a run.
            found = re.search(r"resumes after (\d+) records", said)
            assert not before or (found and int(found[1]) >= len(before)), said
        except AssertionError as error:
            failures.append(f"round {number}: {', '.join(story)}: {error}")
            print(failures[-1], flush=True)
        finally:
            for launched in alive:
                launched.kill()
        counts["rounds"] += 1
    return counts, failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts, failures = campaign(Path(folder), given.rounds, given.seed)
    print(", ".join(f"{name}: {count}" for name, count in sorted(counts.items())))
    print(f"{len(failures)} of {given.rounds} rounds failed")
    sys.exit(bool(failures))
