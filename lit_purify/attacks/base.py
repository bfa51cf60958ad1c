"""Base class of attacks: the threat model, which is checked on exit, and the query cost."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_purify.errors import InputError
from lit_purify.functional.chunks import AttackedFunction
from lit_purify.functional.images import check_unit_range, each
from lit_purify.functional.noise import ATTACK, Noise, fresh_noise
from lit_purify.functional.rows import Domain
from lit_purify.functional.threat import Norm, pixels, project, violations
from lit_purify.recorded import Recorded


class Queries(NamedTuple):
    """Model evaluations for one sample: forward passes, and how many of them are differentiated."""

    forward: int
    backward: int

    @property
    def cost(self) -> int:
        """Cost in forward passes; differentiating one costs two more, since steps are recomputed."""
        return self.forward + 2 * self.backward


class NotApplicableError(ValueError):
    """The attack has no such version; the message gives the reason."""


@runtime_checkable
class Attackable(Protocol):
    """A model that defines its attacked function, such as a ``DefendedClassifier``."""

    def attacked(self) -> AttackedFunction:
        """Returns the function that attacks differentiate."""
        ...


class Attack(Recorded, ABC):
    """Searches the threat model for an image that the model misclassifies.

    Args:
        norm: ``linf`` or ``l2``.
        eps: Radius of the ball around the image, in pixels of [0, 1]; a number or a fraction such as ``8/255``.

    Attributes:
        steps: Iterations of each start.
        eot: Noise draws in each iteration.
        restarts: Number of starts.
        step_size: Length of a step in pixels of [0, 1], if any.
        loss: Name of the maximized loss, if there is a choice.
        aggregate: Weights of the draws of a sample, see ``PGD``.
        gradient: ``exact``, ``none``, ``surrogate`` (another model is differentiated), or ``theirs`` (an attack of
            another library).
        target: The attacked model: the ``defense``, or the bare ``classifier`` behind it.
        stopping: Stopping rule, in words for the report.
        scalable: Attributes that ``stronger`` may change.
        domain: Constraints on table rows; ``None`` for images, or without constraints.
    """

    steps: int
    eot: int
    restarts: int = 1
    step_size: float | None = None
    loss: str | None = None
    aggregate: str = "mean"
    gradient: Literal["exact", "surrogate", "theirs", "none"] = "exact"
    target: Literal["defense", "classifier"] = "defense"
    stopping: str = "runs all its steps; does not look at the defense's final runs"
    scalable: frozenset[str] = frozenset()
    domain: Domain | None = None

    def __init__(self, norm: Norm, eps: float | str) -> None:
        self.norm, self.eps = norm, pixels("eps", eps)
        if norm == "linf" and self.eps > 1.0:
            raise InputError(
                f"eps = {eps} is above 1, the whole range of a pixel: images lie in [0, 1], use e.g. 8/255"
            )

    def __call__(
        self,
        model: AttackedFunction | Attackable | nn.Module | Callable[[Tensor], Tensor],
        image: Tensor,
        label: Tensor,
        noise: Noise | None = None,
        chunk: int = 64,
    ) -> Tensor:
        """Returns adversarial images, (B, C, H, W) in [0, 1], or valid table rows (B, F), detached.

        A row without a valid adversarial row in the threat model is returned unchanged.

        Args:
            model: A defended classifier, any ``nn.Module`` or function from [0, 1] images to logits, or an
                ``AttackedFunction``.
            image: (B, C, H, W), or rows (B, F), in [0, 1].
            label: (B,) int64.
            noise: Randomness of the same rows, independent of the evaluation's; ``None`` draws a seed from torch's
                global generator.
            chunk: Rows in each call of the model.

        Raises:
            InputError: The images are not in [0, 1], or labels are not (B,).
            RuntimeError: The attack left its threat model (a bug in the attack).
        """
        check_unit_range(image)
        if label.shape != image.shape[:1]:
            raise InputError(f"labels have shape {tuple(label.shape)}: give one for each of the {len(image)} images")
        noise = noise or fresh_noise(image, ATTACK)
        adversarial = self.perturb(attackable(model), image, label, noise, chunk).detach()
        if self.domain is not None:
            broken = self.domain.violations(adversarial, image)
            adversarial = rowwise(broken, self.domain.repair(adversarial, image, self.radius(image)), adversarial)
            beyond = violations(adversarial, image, self.norm, self.radius(image))
            adversarial = rowwise(beyond, image, adversarial)
        bad = self.outside(adversarial, image, chunk).nonzero().flatten().tolist()
        if bad:
            bound = f"{self.threat} <= {self.eps}"
            raise RuntimeError(f"{type(self).__name__} left its threat model ({bound}) in rows {bad}")
        return adversarial

    @property
    def threat(self) -> str:
        """Name of the bounded size in reports: the norm, or another distance."""
        return self.norm

    def outside(self, adversarial: Tensor, image: Tensor, chunk: int) -> Tensor:
        """Marks samples outside the threat model, (B,) bool."""
        return violations(adversarial, image, self.norm, self.radius(image))

    def radius(self, image: Tensor) -> float:
        """Returns the largest allowed norm for images of this size: ``eps``."""
        return self.eps

    @property
    def title(self) -> str:
        """Name and settings for reports."""
        return type(self).__name__

    @property
    def raised(self) -> list[str]:
        """Names of the maximized losses, if there is a choice."""
        return [] if self.loss is None else [self.loss]

    @property
    @abstractmethod
    def queries(self) -> Queries:
        """Query cost for one sample."""

    def stronger(self, **changes: Any) -> Attack:  # noqa: ANN401
        """Returns this attack with more steps, draws or restarts, or another loss or radius; for the audit.

        Args:
            changes: New values of attributes in ``scalable``: ``steps``, ``eot``, ``restarts``, ``loss``,
                ``aggregate``, ``eps`` (which also scales the step size).

        Raises:
            NotApplicableError: The attack has no such version.
        """
        missing = [name for name in changes if name not in self.scalable]
        if missing:
            raise NotApplicableError(f"{type(self).__name__} has no version with other {' or '.join(missing)}")
        other = copy.copy(self)
        if "eps" in changes and self.step_size is not None:
            changes["step_size"] = self.step_size * changes["eps"] / self.eps
        vars(other).update(changes)
        return other

    def prepare(self, positions: Sequence[int], domain: Domain | None = None) -> None:
        """Prepares for an evaluation.

        Args:
            positions: Positions of the samples in the evaluated split, in order, as in the ``index`` of their noise.
            domain: Constraints on table rows.
        """
        self.domain = domain if domain is not None and domain.constrained else None

    def inside(self, point: Tensor, image: Tensor) -> Tensor:
        """Projects a point on the threat model."""
        near = project(point, image, self.norm, self.eps)
        return near if self.domain is None else self.domain.project(near, image)

    def shown(self, point: Tensor, image: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Returns the model's input for a point (for table rows, its repair), and the backward pass of the repair."""
        if self.domain is None:
            return point, lambda gradient: gradient
        with torch.enable_grad():
            leaf = point.detach().requires_grad_()
            repaired = self.domain.repair(leaf, image, self.eps)
        return repaired.detach(), lambda gradient: torch.autograd.grad(repaired, leaf, gradient)[0]

    @abstractmethod
    def perturb(self, model: AttackedFunction, image: Tensor, label: Tensor, noise: Noise, chunk: int) -> Tensor:
        """Computes adversarial images; ``__call__`` checks arguments and result."""


class AttackWrapper(Attack):
    """Another attack in other circumstances, under the other attack's threat model.

    Args:
        attack: The other attack.
    """

    def __init__(self, attack: Attack) -> None:
        if not isinstance(attack, Attack):
            raise InputError(f"attack is a {type(attack).__name__}: use an attack, or wrap a function in ForeignAttack")
        self.attack, self.norm, self.eps = attack, attack.norm, attack.eps
        self.steps, self.eot = attack.steps, attack.eot

    @property
    @override
    def threat(self) -> str:
        return self.attack.threat

    @override
    def outside(self, adversarial: Tensor, image: Tensor, chunk: int) -> Tensor:
        return self.attack.outside(adversarial, image, chunk)

    @override
    def radius(self, image: Tensor) -> float:
        return self.attack.radius(image)

    @override
    def prepare(self, positions: Sequence[int], domain: Domain | None = None) -> None:
        super().prepare(positions, domain)
        self.attack.prepare(positions, domain)


def attackable(model: AttackedFunction | Attackable | nn.Module | Callable[..., Tensor]) -> AttackedFunction:
    """Returns the attacked function of a model.

    Functions of two required arguments take (image, noise); other functions and modules take images.
    """
    if isinstance(model, AttackedFunction):
        return model
    if isinstance(model, Attackable):
        return model.attacked()
    if not isinstance(model, nn.Module):
        parameters = inspect.signature(model).parameters.values()
        if sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) > 1:
            return AttackedFunction(model)
    return AttackedFunction(lambda image, noise: model(image))


def single_draw(attack: Attack) -> Attack:
    """Returns the attack with one noise draw per step, or the attack itself if it has no such version."""
    try:
        return attack.stronger(eot=1)
    except NotApplicableError:
        return attack


def at_cost(attack: Attack, queries: Queries) -> Attack:
    """Returns the attack with as many steps as the queries allow, at least one.

    Raises:
        NotApplicableError: It has no version with other steps.
    """
    one, two = (attack.stronger(steps=steps).queries.cost for steps in (1, 2))
    return attack.stronger(steps=max(1, 1 + (queries.cost - one) // (two - one)))


class Best:
    """The candidate with the highest score for each sample; ties keep the first.

    Args:
        image: (B, C, H, W), kept until a candidate scores above ``score``.
        score: (B,); ``None`` is below every score.
    """

    def __init__(self, image: Tensor, score: Tensor | None = None) -> None:
        self.image = image
        self.score = torch.full((len(image),), -torch.inf, device=image.device) if score is None else score

    def offer(self, candidate: Tensor, score: Tensor) -> None:
        """Replaces the images of samples whose score improves."""
        better = score > self.score
        self.image = rowwise(better, candidate, self.image)
        self.score = torch.where(better, score, self.score)


def rowwise(condition: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """Selects samples (B, ...) by a condition (B,)."""
    return torch.where(each(condition, other), chosen, other)


def draws(first: int, count: int) -> list[int]:
    """Returns ``count`` run numbers, so that no two evaluations of an attack share a draw."""
    return list(range(first, first + count))


def check_counts(**counts: int) -> None:
    """Raises an ``InputError`` if a count is not a whole number of at least 1."""
    for name, value in counts.items():
        if not value >= 1 or value % 1:
            raise InputError(f"{name} = {value}: use {'a whole number' if value > 1 else 'at least 1'}")
