"""Families of defenses, each a purifier with some of its settings swept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lit_purify.attacks import Attack
from lit_purify.data.base import ImageDataModule
from lit_purify.defense import Gradient, Purifier
from lit_purify.errors import InputError
from lit_purify.evaluation.module import RobustnessTask
from lit_purify.models import Classifier, Denoiser


class FrontierTask(RobustnessTask):
    """Evaluates every point of some families of defenses, so that families are compared at their best.

    A family is a purifier as in a configuration, with a list in place of each setting that is swept, at any depth:
    ``{class_path: UniformPurifier, init_args: {level: [100, 200], steps: 4}}``. Its points are all combinations, each
    an ordinary defense named after what is swept (``uniform-level100``). Combinations that the purifier refuses are
    left out. The best of more points is higher by chance: give the families as many points each.

    Args:
        classifier: What is defended.
        denoiser: What purifies.
        families: Templates by name, in the order in which they are compared: every one to those before it.
        attacks: Attacks by name.
        defenses: Further defenses by name, which are drawn and not compared.
        points: What the families expand to; the command line fills it in.
        baseline: See ``RobustnessTask``.
        runs: N.
        chunk: See ``RobustnessTask``.
        seed: Of all noise.
        gallery: See ``RobustnessTask``.
        gradients: See ``RobustnessTask``.
        on_test: Allows the test split, on which choosing the best of many points spoils every later figure.
    """

    def __init__(
        self,
        classifier: Classifier,
        denoiser: Denoiser,
        families: dict[str, dict[str, Any]],
        attacks: dict[str, Attack],
        defenses: dict[str, Callable[[Denoiser, Classifier], Purifier]] | None = None,
        points: dict[str, Callable[[Denoiser, Classifier], Purifier]] | None = None,
        baseline: str | None = None,
        runs: int = 8,
        chunk: int = 64,
        seed: int = 0,
        gallery: int = 0,
        gradients: dict[str, Gradient] | None = None,
        on_test: bool = False,
    ) -> None:
        self.refused: dict[str, str] = {}
        kept = dict(defenses or {})
        for name, make in (points or {}).items():
            try:
                make(denoiser, classifier)
            except InputError as error:
                self.refused[name] = str(error)
            else:
                kept[name] = make
        self.families: dict[str, list[str]] = {}
        for family, template in families.items():
            names = list(expand({family: template}))
            self.families[family] = [name for name in names if name in kept]
            if not self.families[family]:
                reason = self.refused.get(names[0], "it is not among the points") if names else "a list is empty"
                raise InputError(f"families.{family}: no point is left ({reason})")
        super().__init__(
            classifier,
            denoiser,
            kept,
            attacks,
            baseline=baseline,
            runs=runs,
            chunk=chunk,
            seed=seed,
            gallery=gallery,
            gradients=gradients,
        )
        self.on_test = on_test

    def check(self, data: ImageDataModule) -> None:
        """Also refuses the test split, unless it is asked for."""
        if data.evaluate_on == "test" and not self.on_test:
            raise InputError(
                "evaluate_on = test: a frontier chooses the best of many points, after which the test split says "
                "little about them; use val, or set on_test"
            )
        super().check(data)


def expand(families: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The points of all families by name: for every combination of listed values the template with these in place.

    Raises:
        InputError: A template names no class, or two points would have one name.
    """
    points: dict[str, Any] = {}
    for family, template in families.items():
        if not isinstance(template, Mapping) or "class_path" not in template:
            raise InputError(f"families.{family}: give its class_path and init_args, in the file: a flag replaces them")
        swept = dict(_lists(template))
        for values in itertools.product(*swept.values()):
            chosen = dict(zip(swept, values, strict=True))
            words = [path[-1] + _word(chosen[path]) for path, listed in swept.items() if len(listed) > 1]
            name = "-".join([family, *words])
            if name in points:
                raise InputError(f"families.{family}: two points would be called {name}; list every value once")
            points[name] = _filled(template, chosen)
    return points


def _word(value: object) -> str:
    """As it stands in a name: ``0_5``, ``50x125``."""
    return "x".join(map(_word, value)) if isinstance(value, list) else str(value).replace(".", "_")


Keys = tuple[str, ...]


def _lists(node: Any, path: Keys = ()) -> Iterator[tuple[Keys, list[Any]]]:  # noqa: ANN401
    """The lists in a tree, with the keys that lead there."""
    if isinstance(node, list):
        yield path, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _lists(value, (*path, key))


def _filled(node: Any, chosen: Mapping[Keys, Any], path: Keys = ()) -> Any:  # noqa: ANN401
    """The tree with a value in place of each list."""
    if path in chosen:
        return chosen[path]
    if isinstance(node, Mapping):
        return {key: _filled(value, chosen, (*path, key)) for key, value in node.items()}
    return node
