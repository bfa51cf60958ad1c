"""The identity of a run: objects by the arguments that they were made from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from lit_purify.attacks import PGD
from lit_purify.defense import HeterogeneousPurifier, NoPurifier, TopFraction
from lit_purify.errors import InputError
from lit_purify.recorded import Recorded, identity


class Own(Recorded):
    """A class of one's own, with arguments of every kind."""

    irrelevant = frozenset({"workers"})

    def __init__(
        self,
        weights: Path,
        note: str = "",
        extra: Path | None = None,
        several: Sequence[Path] = (),
        named: Mapping[str, Path | None] | None = None,
        workers: int = 0,
        **options: int,
    ):
        self.weights = weights


@pytest.mark.parametrize("given", [str, Path])
def test_a_file_is_a_file_by_the_type_of_its_argument(given, tmp_path):
    """Whatever it is called, and also where a string names it."""
    path = tmp_path / "a"

    def of(content, **arguments):
        path.write_text(content)
        return identity(it=Own(**{"weights": tmp_path / "none", **arguments}))

    for name in ("weights", "extra"):
        assert of("1", **{name: given(path)}) != of("2", **{name: given(path)})
        assert of("1", **{name: given(path)}) == of("1", **{name: given(path)})
    assert of("1", several=[given(path)]) != of("2", several=[given(path)])
    assert of("1", named={"a": given(path)}) != of("2", named={"a": given(path)})
    # A string is a string, even where a file has this name.
    assert of("1", note=str(path)) == of("2", note=str(path))
    (tmp_path / "folder").mkdir()
    before = of("1", extra=tmp_path / "folder")
    (tmp_path / "folder" / "b").write_text("b")
    assert of("1", extra=tmp_path / "folder") != before


def test_a_type_that_exists_for_type_checkers_only_hides_no_file(tmp_path):
    class Lazy(Recorded):
        def __init__(self, weights: "Path | str", other: "NowhereImported | None" = None):  # noqa: F821
            self.weights = weights

    (tmp_path / "a").write_text("1")
    assert "it.weights (sha256)" in identity(it=Lazy(str(tmp_path / "a")))


def test_arguments_are_stated_flat_with_their_defaults():
    own = Own("w", note="n", workers=3, depth=2)
    assert identity(it=own, runs=8) == {
        "it": "test_recorded.Own",
        "it.weights": "w",
        "it.note": "n",
        "it.extra": None,
        "it.several": [],
        "it.named": None,
        "it.depth": 2,
        "runs": 8,
    }

    class Child(Own):
        def __init__(self, size=1):
            super().__init__("w", note="fixed")
            self.size = size

    # Those of the outermost class.
    assert Child().arguments == {"size": 1}
    found = identity(attacks={"pgd": PGD(eps="8/255", steps=3)})
    assert found["attacks.pgd"] == "lit_purify.attacks.pgd.PGD"
    assert (found["attacks.pgd.eps"], found["attacks.pgd.steps"], found["attacks.pgd.loss"]) == ("8/255", 3, "margin")


def test_tensors_and_modules_are_their_content(unet):
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert identity(net=one) != identity(net=other)
    other.load_state_dict(one.state_dict())
    assert identity(net=one) == identity(net=other)
    tensors = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4).double(), torch.ones(4), torch.zeros(0)]
    assert len({str(identity(x=tensor)) for tensor in tensors}) == len(tensors)
    assert identity(x=torch.zeros(4, 4)[:, ::2]) == identity(x=torch.zeros(4, 2))
    purifiers = {"a": HeterogeneousPurifier(unet, TopFraction(0.3), 200, 100, 4), "none": NoPurifier()}
    found = identity(defenses=purifiers)
    assert [key for key in found if key.endswith("(sha256)")] == ["defenses.a.denoiser.weights (sha256)"]
    assert found["defenses.a.mask.fraction"] == 0.3


def test_an_object_that_appears_twice_is_named_by_its_first_place(unet):
    shared = {k: HeterogeneousPurifier(unet, TopFraction(0.3), 200, 100, 4) for k in ("a", "b")}
    found = identity(defenses=shared)
    assert found["defenses.b.denoiser"] == "the defenses.a.denoiser"
    copies = identity(x=nn.Linear(1, 1), y=nn.Linear(1, 1))
    assert copies["y"] == "torch.nn.modules.linear.Linear"


class Choosing(Recorded):
    def __init__(self, way: Literal["a", "b", "c"] = "a"):
        self.way = way


class Passing(Choosing):
    def __init__(self, **more: str):
        super().__init__(**more)


@pytest.mark.parametrize("make", [Choosing, Passing])
def test_a_choice_is_one_of_its_type(make):
    assert make(way="c").way == "c"
    with pytest.raises(InputError, match=r"^way = 'd': use a, b or c$"):
        make(way="d")
