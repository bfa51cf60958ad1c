"""What an evaluation will cost, measured on a chunk of it."""

from __future__ import annotations

import copy
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_purify.attacks import Attack
from lit_purify.attacks.base import Queries
from lit_purify.data import ImageDataModule
from lit_purify.data.base import Batch
from lit_purify.evaluation.module import RobustnessTask
from lit_purify.evaluation.records import Record
from lit_purify.functional.chunks import logits_in_chunks
from lit_purify.functional.noise import ATTACK, EVALUATION, KeyedNoise
from lit_purify.models import Classifier

_BACKWARD = 2
"""What a backward pass costs, in forward passes: the steps are computed anew, and differentiated by their input."""
_LONG_ENOUGH = 0.5
"""Seconds that a measurement lasts, where the attack has that many steps."""
_LONG = 20.0
"""Seconds beside which what the first call takes more does not count."""


@dataclass(frozen=True)
class Measured:
    """Of one defense under one attack, on a few samples.

    Attributes:
        samples: How many.
        attack: Seconds of the attack on them.
        evaluation: Seconds of a chunk of the evaluation.
    """

    samples: int
    attack: float
    evaluation: float

    def seconds(self, count: int, eot: int, runs: int, chunk: int, images: int) -> float:
        """Of a batch of ``count`` samples, of each of which so many images are classified.

        What is called in chunks is paid in chunks.
        """

        def attacked(samples: int) -> int:
            return -(-samples * eot // chunk) if eot else samples

        evaluations = images * -(-count * runs // chunk)
        return self.attack * attacked(count) / attacked(self.samples) + self.evaluation * evaluations


class EstimatingTrainer(L.Trainer):
    """A trainer that can also say what an evaluation will cost."""

    records: Sequence[Record] = ()
    """What the run's folder holds already."""

    def estimate(self, model: L.LightningModule, datamodule: L.LightningDataModule) -> dict[tuple[str, str], float]:
        """Measures a chunk of every defense under every attack; prints what the whole evaluation needs.

        Args:
            model: An evaluation.
            datamodule: Its data.

        Returns:
            Seconds that each (defense, attack) takes the busiest process.
        """
        assert isinstance(model, RobustnessTask)
        assert isinstance(datamodule, ImageDataModule)
        datamodule.prepare_data()
        model.check(datamodule)
        device = self.strategy.root_device
        model.to(device).eval()
        evaluated, size = datamodule.evaluated, datamodule.batch_size
        done = {record.key for record in self.records}
        todo = [i for i in evaluated.positions.tolist() if any((*pair, i) not in done for pair in model.pairs)]
        # The first process has as many samples as any.
        mine = todo[:: self.world_size]
        batches = [mine[start : start + size] for start in range(0, len(mine), size)]
        rows = [evaluated[k] for k in range(min(size, len(evaluated)))]
        first = {key: torch.stack([torch.as_tensor(row[key]) for row in rows]).to(device) for key in rows[0]}
        expected, memory = {}, 0
        wanted = {(*pair, int(i)) for pair in model.pairs for i in evaluated.positions}
        widths = [max(7, *map(len, names)) for names in (model.defenses, model.attacks)]

        def say(*cells: object) -> None:
            first, *others = (f"{cell:{width}}" for cell, width in zip(cells, [*widths, 8, 8, 9, 12], strict=False))
            if self.is_global_zero:
                print("  ".join([first, *others]), flush=True)

        if self.is_global_zero:
            print(
                f"{datamodule.name} ({datamodule.evaluate_on}), {len(evaluated)} samples, {model.runs} runs each: "
                f"{len(wanted)} records, {len(wanted & done)} of them there already\n"
            )
        say("", "", "network calls a sample")
        say("defense", "attack", " forward", "backward", " s/sample", "        time")
        transferred: set[tuple[str, Classifier]] = set()
        for described in model.describe():
            pair = described["defense"], described["attack"]
            eot, runs = model.attacks[pair[1]].eot, model.runs
            if model.views[pair].deterministic:
                # Two draws show that all are alike.
                eot, runs = min(eot, 2), min(runs, 2)
            left = [count for batch in batches if (count := sum((*pair, i) not in done for i in batch))]
            seconds = 0.0
            if left:
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                with torch.no_grad(), self.precision_plugin.forward_context():
                    measured = _measure(model, *pair, first)
                if model.attacks[pair[1]].target == "classifier":
                    # Made once for all defenses of a classifier.
                    attacked = (pair[1], model.views[pair].defended.classifier)
                    measured = replace(measured, attack=0.0) if attacked in transferred else measured
                    transferred.add(attacked)
                images = described["evaluations"]
                seconds = sum(measured.seconds(count, eot, runs, model.chunk, images) for count in left)
                # A whole batch keeps the gradients of all its draws, twice when they are joined.
                draws = eot if described["queries"]["backward"] else 0
                kept = 2 * max(0, max(left) - measured.samples) * draws * first["image"][0].nbytes
                memory = max(memory, peak_memory(device) + kept)
            expected[pair] = seconds
            calls = (f"{count:8,d}" for count in network_calls(described, model.runs))
            say(*pair, *calls, f"{seconds / sum(left):9.3g}" if left else f"{'done':>9}", f"{duration(seconds):>12}")
        if self.is_global_zero:
            processes = f"{self.world_size} process{'es' if self.world_size > 1 else ''} ({device.type})"
            print(f"\nExpected: {duration(sum(expected.values()))} on {processes}, and the start and the report")
            if self.world_size > 1 and device.type == "cpu":
                print("Measured by one process; several share the cores of a machine")
            print(f"Peak memory of a process: {gibibytes(memory)}{_available(device)}\nNothing was written.")
        return expected


def network_calls(described: Mapping[str, Any], runs: int) -> tuple[int, int]:
    """Calls of the denoiser for one sample, and how many of them are differentiated.

    Args:
        described: An entry of ``RobustnessTask.describe``.
        runs: N, for the adversarial and, under the first attack, the clean image.
    """
    queries = Queries(**described["queries"])
    backward = queries.backward * described["nfe_attack"]
    evaluated = described["evaluations"] * runs * described["nfe_defense"]
    return queries.forward * described["nfe_attack"] + evaluated, backward


def work(described: Mapping[str, Any], runs: int) -> int:
    """What a sample costs, roughly and in no unit: the classifier counts as much as a call of the denoiser."""
    forward, backward = network_calls(described, runs)
    queries = Queries(**described["queries"])
    return (
        forward
        + _BACKWARD * backward
        + queries.forward
        + _BACKWARD * queries.backward
        + described["evaluations"] * runs
    )


def duration(seconds: float) -> str:
    """As people say it, in two units at most."""
    whole = round(seconds)
    for unit, small, name, of in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // small} {of}"
    return f"{whole} s"


def peak_memory(device: torch.device) -> int:
    """Bytes: of tensors on a GPU since the statistics were reset; elsewhere of the whole process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _measure(model: RobustnessTask, defense: str, name: str, batch: Batch) -> Measured:
    attack, view = model.attacks[name], model.views[defense, name]
    device, runs, chunk = batch["image"].device, list(range(model.runs)), model.chunk
    image, index = (batch[key][: max(1, chunk // len(runs))] for key in ("image", "index"))
    noise = KeyedNoise(model.seed, index, torch.zeros_like(index), EVALUATION)
    once = partial(logits_in_chunks, view.defended, image, noise, runs, chunk)
    # What is called for the first time takes longer.
    _seconds(once, device)
    times = [_seconds(once, device)]
    times += [_seconds(once, device) for _ in range(min(8, int(_LONG_ENOUGH / max(times[0], 1e-6))))]
    evaluation = sum(times) / len(times) / -(-len(image) * len(runs) // chunk)

    image, label, index = (batch[key][: max(1, chunk // max(1, attack.eot))] for key in ("image", "label", "index"))
    noise = KeyedNoise(model.seed, index, torch.zeros_like(index), ATTACK)

    def attacked(steps: int) -> tuple[float, Queries]:
        short = _shortened(attack, steps)
        return _seconds(partial(short, view, image, label, noise, chunk), device), short.queries

    seconds, queries = attacked(1)
    if seconds < _LONG:
        seconds, queries = attacked(1)
    steps = min(attack.steps, int(_LONG_ENOUGH / max(seconds, 1e-6)))
    if steps > 1:
        seconds, queries = attacked(steps)
    whole = attack.queries
    if not queries.backward:
        return Measured(len(image), seconds * whole.forward / max(1, queries.forward), evaluation)
    only = 0.0
    if queries.forward > queries.backward:
        only = (
            _seconds(partial(logits_in_chunks, view, image, noise, list(range(attack.eot)), chunk), device) / attack.eot
        )
    differentiated = (seconds - only * (queries.forward - queries.backward)) / queries.backward
    return Measured(len(image), only * (whole.forward - whole.backward) + differentiated * whole.backward, evaluation)


def _shortened(attack: Attack, steps: int) -> Attack:
    """The same attack with fewer steps, and the one that it wraps."""
    short = copy.copy(attack)
    if attack.steps > steps:
        short.steps = steps
    if isinstance(inner := getattr(attack, "attack", None), Attack):
        vars(short)["attack"] = _shortened(inner, steps)
    return short


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    started = perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - started


def gibibytes(count: int) -> str:
    """Bytes in GiB."""
    return f"{count / 2**30:.1f} GiB"


def _available(device: torch.device) -> str:
    return f" of {gibibytes(torch.cuda.mem_get_info(device)[1])}" if device.type == "cuda" else ""
