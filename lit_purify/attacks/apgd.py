"""Auto-PGD: projected gradient descent with automatic step sizes and expectation over transformation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lit_purify.attacks.base import Attack, Best, Queries, check_counts, draws, rowwise
from lit_purify.errors import InputError
from lit_purify.functional.chunks import AttackedFunction, average, draws_in_chunks, logits_in_chunks
from lit_purify.functional.images import each
from lit_purify.functional.losses import LossName, mean_margin, named_loss, targeted_dlr_loss
from lit_purify.functional.noise import START_STEP, Noise
from lit_purify.functional.threat import Norm, l2_norm, linf_norm, steepest

_RHO, _MOMENTUM = 0.75, 0.75
"""Fraction of the steps between checkpoints in which the loss must increase; weight of the gradient in a step."""


class APGD(Attack):
    """APGD (Croce & Hein, ICML 2020, arXiv 2003.01690, algorithm 1) on the loss averaged over ``eot`` draws of noise.

    The step size begins at 2 ``eps``. At checkpoints it is halved for samples whose loss increased in too few steps
    since the previous checkpoint, or whose best loss did not improve; these continue from their best point.
    AutoAttack's attacks are ``loss="ce"``, ``loss="dlr"`` and ``loss="dlr", targets=9``; with ``eot=20`` the first two
    are its version for randomized models. As in AutoAttack, the start is on the border of the ball.

    For a randomized model every step uses new draws, and "best" compares losses averaged over them.

    Args:
        norm: ``linf`` or ``l2``.
        eps: Radius, in pixels of [0, 1]; a number or a fraction such as ``8/255``.
        steps: Steps of each start.
        eot: Noise draws averaged in each step.
        loss: ``ce``, ``margin`` or ``dlr``, as in ``PGD``.
        targets: ``0`` is untargeted; n runs once towards each of the n wrong classes that are most likely for the image
            (only ``dlr`` has a targeted form).
        restarts: Number of starts, for each target.
        select: The returned image. ``best``: the iterate of all starts, or the image itself, with the highest averaged
            margin. A deterministic model then returns any misclassified iterate, as in AutoAttack; for a randomized
            model the highest noisy average is partly luck. ``last``: the last iterate; of several starts, the one with
            the highest averaged margin.
    """

    scalable = frozenset({"steps", "eot", "restarts", "loss", "eps"})
    loss: LossName

    def __init__(
        self,
        norm: Norm = "linf",
        eps: float | str = "8/255",
        steps: int = 100,
        eot: int = 1,
        loss: LossName = "margin",
        targets: int = 0,
        restarts: int = 1,
        select: Literal["best", "last"] = "best",
    ) -> None:
        super().__init__(norm, eps)
        check_counts(steps=steps, eot=eot, restarts=restarts)
        if targets < 0:
            raise InputError(f"targets = {targets}: use 0 for an untargeted attack, or a number of classes")
        if targets and loss != "dlr":
            raise InputError(f"targets = {targets} with loss = {loss}: only dlr has a targeted form; use loss: dlr")
        self.steps, self.eot, self.targets, self.restarts, self.select = steps, eot, targets, restarts, select
        self.loss = loss

    def stronger(self, **changes: Any) -> APGD:  # noqa: ANN401
        """Returns a stronger version, see ``Attack``; a loss other than this one is untargeted."""
        other = super().stronger(**changes)
        assert isinstance(other, APGD)
        other.targets = self.targets if other.loss == self.loss else 0
        return other

    @property
    @override
    def title(self) -> str:
        targets = f" towards {self.targets} classes in turn" if self.targets else ""
        restarts = f", {self.restarts} restarts" if self.restarts > 1 else ""
        return f"APGD on the {self.loss} loss{targets} from the border of the ball, {self.select} iterate{restarts}"

    @property
    @override
    def queries(self) -> Queries:
        backward = max(1, self.targets) * self.restarts * (self.steps + 1) * self.eot
        return Queries(self.eot + backward, backward)

    @override
    def perturb(self, model: AttackedFunction, image: Tensor, label: Tensor, noise: Noise, chunk: int) -> Tensor:
        clean = logits_in_chunks(model, image, noise, draws(0, self.eot), chunk)
        best = Best(image, mean_margin(clean, label) if self.select == "best" else None)
        first = self.eot
        for goal in self._goals(clean, label):
            for start in range(self.restarts):
                begin = self._start(image, noise.runs([first]), start)
                for k, (point, margin) in enumerate(self._path(model, image, label, goal, noise, chunk, first, begin)):
                    if self.select == "best" or k == self.steps:
                        best.offer(point, margin)
                first += (self.steps + 1) * self.eot
        return best.image

    def _goals(self, clean: Tensor, label: Tensor) -> list[Tensor]:
        """Returns the loss argument of each run: labels (B,), or labels and targets (B, 2)."""
        needed = max(self.targets + 1, 4) if self.targets else 3 if self.loss == "dlr" else 2
        if clean.shape[2] < needed:
            what = f"the {self.loss} loss" + (f" with targets = {self.targets}" if self.targets else "")
            raise InputError(f"{what} needs {needed} classes, the classifier has {clean.shape[2]}: use loss: margin")
        if not self.targets:
            return [label]
        wrong = average(clean).scatter(1, label[:, None], -torch.inf)
        return [torch.stack([label, target], dim=1) for target in wrong.topk(self.targets, dim=1).indices.unbind(dim=1)]

    def _path(
        self,
        model: AttackedFunction,
        image: Tensor,
        label: Tensor,
        goal: Tensor,
        noise: Noise,
        chunk: int,
        first: int,
        begin: Tensor,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the iterates of a start and their averaged margins; ``first`` numbers its first draw."""
        raised = targeted_dlr_loss if self.targets else named_loss(self.loss)

        def judge(point: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            runs = draws(first + k * self.eot, self.eot)
            shown, back = self.shown(point, image)
            drawn = draws_in_chunks(model, raised, shown, goal, noise, runs, chunk)
            return shown, average(drawn.loss), back(average(drawn.gradient)), mean_margin(drawn.logits, label)

        point = previous = begin
        shown, loss, gradient, margin = judge(point, 0)
        yield shown, margin
        best_point, best_gradient, best_loss, best_before = point, gradient, loss, loss
        step = each(torch.full_like(image.flatten(1)[:, 0], 2.0 * self.eps), image)
        interval, least, shorter = (max(int(part * self.steps), 1) for part in (0.22, 0.06, 0.03))
        halved, rises, waited = torch.ones_like(loss, dtype=torch.bool), torch.zeros_like(loss), 0
        for k in range(1, self.steps + 1):
            ahead = self.inside(point + step * steepest(gradient, self.norm), image)
            share = 1.0 if k == 1 else _MOMENTUM
            ahead = point + share * (ahead - point) + (1.0 - share) * (point - previous)
            point, previous, before = self.inside(ahead, image), point, loss
            shown, loss, gradient, margin = judge(point, k)
            yield shown, margin
            better = loss > best_loss
            best_point, best_gradient = rowwise(better, point, best_point), rowwise(better, gradient, best_gradient)
            best_loss = torch.where(better, loss, best_loss)
            rises, waited = rises + (loss > before), waited + 1
            if waited == interval:
                halved = (rises <= _RHO * interval) | (~halved & (best_loss <= best_before))
                step = rowwise(halved, step / 2.0, step)
                point, gradient = rowwise(halved, best_point, point), rowwise(halved, best_gradient, gradient)
                best_before, rises, waited = best_loss, torch.zeros_like(loss), 0
                interval = max(interval - shorter, least)

    def _start(self, image: Tensor, noise: Noise, start: int = 0) -> Tensor:
        """Returns a random point on the border of the ball, clipped to [0, 1]."""
        if self.norm == "linf":
            direction = 2.0 * noise.uniform(START_STEP, image) - 1.0
            size = linf_norm(direction)
        else:
            direction = noise.normal(START_STEP, image)
            size = l2_norm(direction)
        return self.inside(image + self.eps * direction / each(size, image), image)
