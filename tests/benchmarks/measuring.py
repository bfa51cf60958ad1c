"""Times, and ratios to a bound that is timed in turn with what is measured."""

import os
import platform
import resource
import statistics
import subprocess
import time
from pathlib import Path

import lightning
import timm
import torch

ROOT = Path(__file__).parents[2]


def clock(device):
    """A function that tells seconds.

    CPU time of this process, which other load on the machine disturbs less than wall-clock time; on a GPU the latter,
    once all that was asked of it is done.
    """
    if device.type == "cpu":
        return time.process_time

    def synchronized():
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized


def children():
    """CPU seconds of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(call, now):
    """Seconds that a call takes."""
    started = now()
    call()
    return now() - started


def compare(name, measured, bound, now, pairs, scale=1.0, **facts):
    """A row of the table: what is measured and its bound in turn, the median of the ratios and its quartiles.

    Args:
        scale: Of the bound's seconds, where it does more or less.
    """
    seconds = [(timed(measured, now), scale * timed(bound, now)) for _ in range(pairs + 1)]
    # What is called for the first time takes longer.
    return row(name, seconds[1:], **facts)


def row(name, seconds, per=1, limit=None, **facts):
    """The same from pairs of seconds, each for ``per`` units; the ratio is to stay below ``limit``."""
    ratios = [ours / theirs for ours, theirs in seconds]
    low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    ours, theirs = (statistics.median(each) / per for each in zip(*seconds, strict=True))
    found = {"name": name, "seconds": ours, "bound": theirs, "ratio": ratio, "quartiles": [low, high]}
    return {**found, "pairs": len(seconds), **facts, **({} if limit is None else target(name, ratio, most=limit))}


def target(name, figure, least=None, most=None):
    """What is wanted of a GPU: name, figure, bound, and whether it is reached."""
    return {"target": (name, figure, least, figure >= least) if most is None else (name, figure, most, figure <= most)}


def machine(device):
    """What the figures hold for."""

    def git(*command):
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": names[0].partition(": ")[2] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "lightning": lightning.__version__,
        "timm": timm.__version__,
        "commit": git("describe", "--always", "--dirty", "--exclude", "*"),
        "date": time.strftime("%Y-%m-%d"),
    }
