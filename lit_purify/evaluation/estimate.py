"""The cost estimate of a dry run: the time of one chunk, multiplied by the queries that each attack declares."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from lit_purify.attacks.base import Queries
from lit_purify.data.base import ImageDataset
from lit_purify.evaluation.evaluator import Evaluator
from lit_purify.evaluation.records import Key
from lit_purify.functional.chunks import AttackedFunction, draws_in_chunks, logits_in_chunks
from lit_purify.functional.losses import margin_loss
from lit_purify.functional.noise import ATTACK, KeyedNoise
from lit_purify.models import Replays


class Estimate:
    """Times one chunk of every defense under every attack, and extrapolates.

    Args:
        evaluator: The evaluator, on the device of the run.
        data: The evaluated samples.
        batch_size: Samples in a batch.
        done: Keys of existing records.
        processes: Processes that share the samples.

    Attributes:
        seconds: Expected seconds of the busiest process, by (defense, attack).
        memory: Peak memory of a process, in bytes.
        largest: On a GPU, the largest chunk that fits into memory and that batches can fill; ``None`` elsewhere.

    Raises:
        InputError: Data, networks and attacks do not match.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        data: ImageDataset,
        batch_size: int,
        done: Collection[Key] = (),
        processes: int = 1,
    ) -> None:
        evaluator.check(data)
        self.evaluator, self.processes = evaluator, processes
        self.device = next(evaluator.parameters(), torch.zeros(0)).device
        self.wanted = {(*pair, int(i)) for pair in evaluator.pairs for i in data.positions}
        self.existing = len(self.wanted & set(done))
        todo = [int(i) for i in data.positions if any((*pair, int(i)) not in done for pair in evaluator.pairs)]
        # No process has more samples than the first one.
        share = todo[::processes]
        batches = [share[k : k + batch_size] for k in range(0, len(share), batch_size)]
        item = data[0]
        self.image = item["image"][None].to(self.device)
        self.label = torch.tensor([item["label"]], device=self.device)
        self.seconds: dict[tuple[str, str], float] = {}
        self.samples: dict[tuple[str, str], int] = {}
        self.memory = 0
        self.largest: int | None = None
        self.described = evaluator.describe()
        transferred: set[tuple[str, int]] = set()
        for described in self.described:
            pair = described["defense"], described["attack"]
            counts = [n for batch in batches if (n := sum((*pair, i) not in done for i in batch))]
            once = (pair[1], id(evaluator.defenses[pair[0]].classifier))
            # An attack on the bare classifier runs once for all its defenses.
            repeated = evaluator.attacks[pair[1]].target == "classifier" and once in transferred
            if counts:
                transferred.add(once)
            self.samples[pair] = sum(counts)
            self.seconds[pair] = self._measured(described, counts, repeated) if counts else 0.0

    def _measured(self, described: Mapping[str, Any], counts: list[int], repeated: bool) -> float:
        """Seconds of a result on the busiest process; ``counts`` holds the samples of each batch."""
        evaluator = self.evaluator
        defense, attack = described["defense"], described["attack"]
        function, view = evaluator.defenses[defense].attacked(), evaluator.views[defense, attack].function
        queries, eot = Queries(**described["queries"]), max(1, described["eot"])
        free, chunk = room(self.device), evaluator.chunk
        if free is not None and chunk > 1:
            calls = [(function, False), (view, queries.backward > 0 and not repeated)]
            small, large = ((rows, self._need(rows, calls)) for rows in (chunk // 2, chunk))
            fitting = largest_chunk(small, large, free, max(counts) * max(eot, evaluator.runs))
            self.largest = min(fitting, self.largest or fitting)
        reset_peak_memory(self.device)
        with evaluator.replays:
            evaluated = self._chunk(function, gradient=False)
            forward = self._chunk(view, gradient=False) if queries.forward > queries.backward and not repeated else 0.0
            backward = self._chunk(view, gradient=True) if queries.backward and not repeated else 0.0
        self.memory = max(self.memory, peak_memory(self.device))
        if queries.backward:
            # The gradients of all draws of a batch are kept, and held twice while they are joined.
            self.memory += 2 * max(0, max(counts) * eot - evaluator.chunk) * self.image[0].nbytes

        def chunks(samples: int, draws: int, deterministic: bool) -> int:
            return -(-samples * (min(draws, 2) if deterministic else draws) // evaluator.chunk)

        total = 0.0
        for count in counts:
            step = chunks(count, eot, view.deterministic)
            total += step * backward * queries.backward / eot
            total += step * forward * (queries.forward - queries.backward) / eot
            total += chunks(count, evaluator.runs, function.deterministic) * evaluated * described["evaluations"]
            if extra := described.get("diagnostics"):
                total += chunks(count, extra["replicas"], function.deterministic) * evaluated
                own = Queries(**extra["queries"])
                total += chunks(count, 1, False) * (forward * (own.forward - own.backward) + backward * own.backward)
        return total

    def _chunk(self, function: AttackedFunction, gradient: bool) -> float:
        return chunk_seconds(function, self.image, self.label, self.evaluator.chunk, gradient)

    def _need(self, rows: int, calls: Sequence[tuple[AttackedFunction, bool]]) -> int:
        """Peak memory in bytes of the calls (function, with gradient) with this many rows."""
        reset_peak_memory(self.device)
        with Replays(self.evaluator) if self.evaluator.replay else nullcontext():
            for function, gradient in calls:
                chunk_seconds(function, self.image, self.label, rows, gradient)
        return peak_memory(self.device)

    def __str__(self) -> str:
        """The table that a dry run prints."""
        evaluator = self.evaluator
        widths = [max(7, *map(len, names)) for names in (evaluator.defenses, evaluator.attacks)]

        def line(*cells: object) -> str:
            first, *others = (f"{cell:{width}}" for cell, width in zip(cells, [*widths, 9, 9, 9, 12], strict=False))
            return "  ".join([first, *others])

        lines = [f"{len(self.wanted)} records, {self.existing} of them exist already", ""]
        lines += [line("", "", "network calls a sample")]
        lines += [line("defense", "attack", "  forward", " backward", " s/sample", f"{'time':>12}")]
        for described in self.described:
            pair = described["defense"], described["attack"]
            calls = (f"{count:9,d}" for count in network_calls(described, evaluator.runs))
            each = f"{self.seconds[pair] / self.samples[pair]:9.3g}" if self.samples[pair] else f"{'done':>9}"
            lines.append(line(*pair, *calls, each, f"{duration(self.seconds[pair]):>12}"))
        processes = f"{self.processes} process{'es' if self.processes > 1 else ''} ({self.device.type})"
        lines += ["", f"Expected: {duration(sum(self.seconds.values()))} on {processes}, and the start and the report"]
        if self.processes > 1 and self.device.type == "cpu":
            lines.append("Measured with one process: several processes share the cores of a machine and are slower")
        total = f" of {gibibytes(torch.cuda.mem_get_info(self.device)[1])}" if self.device.type == "cuda" else ""
        lines.append(f"Peak memory of a process: {gibibytes(self.memory)}{total}")
        if self.largest not in (None, evaluator.chunk):
            lines.append(
                f"Memory has room for chunk: {self.largest} instead of {evaluator.chunk}. Set it before the first "
                "record: a run has one chunk"
            )
        return "\n".join(lines)


def network_calls(described: Mapping[str, Any], runs: int) -> tuple[int, int]:
    """Denoiser calls for one sample, forward and backward.

    Args:
        described: An entry of ``Evaluator.describe``.
        runs: N, runs of each image.
    """
    queries, evaluated = _queries(described, runs)
    nfe = described["nfe_attack"]
    return queries.forward * nfe + evaluated * described["nfe_defense"], queries.backward * nfe


def _queries(described: Mapping[str, Any], runs: int) -> tuple[Queries, int]:
    """For one sample, the queries of the attack and the images that the defense classifies."""
    queries, evaluated = Queries(**described["queries"]), described["evaluations"] * runs
    extra = described.get("diagnostics")
    if not extra:
        return queries, evaluated
    own = Queries(**extra["queries"])
    added = Queries(queries.forward + own.forward, queries.backward + own.backward)
    return added, evaluated + extra["replicas"]


def work(described: Mapping[str, Any], runs: int) -> int:
    """Rough cost of a sample, in network calls; a classifier call counts as much as a denoiser call."""
    forward, backward = network_calls(described, runs)
    queries, evaluated = _queries(described, runs)
    return Queries(forward, backward).cost + queries.cost + evaluated


def duration(seconds: float) -> str:
    """Seconds as text with at most two units, such as ``2 h 5 min``."""
    whole = round(seconds)
    for unit, small, name, of in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // small} {of}"
    return f"{whole} s"


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of a GPU since the last reset, else of the whole process since its start."""
    if device.type == "cuda":
        # Reserved, not allocated: recorded CUDA graphs keep their memory.
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Empties the cache of a GPU and resets its ``peak_memory``; does nothing on other devices."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def room(device: torch.device) -> int | None:
    """Bytes of a GPU that this process can use, including those it already holds; ``None`` on other devices."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def largest_chunk(small: tuple[int, int], large: tuple[int, int], free: int, most: int) -> int:
    """The largest power of two of rows that needs at most 90 % of the memory, if memory grows linearly with rows.

    Args:
        small: Rows of a chunk, and the bytes it needs.
        large: The same for a larger chunk.
        free: Available bytes.
        most: Rows available at a time: a larger chunk is never full.
    """
    each = (large[1] - small[1]) / (large[0] - small[0])
    rows = min(most, (0.9 * free - large[1]) / each + large[0]) if each > 0 else most
    return 2 ** max(0, math.floor(math.log2(max(1, rows))))


def gibibytes(count: int) -> str:
    """A number of bytes as text, such as ``1.5 GiB``."""
    return f"{count / 2**30:.1f} GiB"


def chunk_seconds(function: AttackedFunction, image: Tensor, label: Tensor, chunk: int, gradient: bool) -> float:
    """Seconds of one chunk. The second call is timed, because the first one takes longer.

    Args:
        function: The function to call.
        image: (1, C, H, W) in [0, 1].
        label: (1,).
        chunk: Rows of the chunk.
        gradient: Whether to differentiate the loss in the image.
    """
    runs, index = list(range(chunk)), torch.zeros(1, dtype=torch.long, device=image.device)
    noise = KeyedNoise(0, index, index, ATTACK)
    # Otherwise a deterministic function would be called with fewer rows.
    called = replace(function, deterministic=False)

    def call() -> None:
        if gradient:
            draws_in_chunks(called, margin_loss, image, label, noise, runs, chunk)
        else:
            logits_in_chunks(called, image, noise, runs, chunk)

    _seconds(call, image.device)
    return _seconds(call, image.device)


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    started = perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - started
