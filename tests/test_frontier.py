"""Families of defenses at equal clean accuracy: the geometry, its intervals, and the command."""

import contextlib
import io
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from lit_purify.evaluation.frontier import expand
from scipy.optimize import linprog

from lit_purify.cli import evaluate
from lit_purify.errors import InputError
from lit_purify.evaluation import read_records
from lit_purify.functional.frontier import bootstrap, envelope, gap, on_envelope, resampled
from lit_purify.report import frontier
from lit_purify.report.frontier import verdict

ROOT = Path(__file__).parent.parent


def at(points, *clean):
    count = len(clean)
    return envelope(torch.tensor(points).expand(count, -1, -1), torch.tensor(clean))


def test_interpolation_by_hand():
    points = [[0.9, 0.2], [0.8, 0.6], [0.6, 0.7]]
    # Halfway between two neighbors; at a point; less clean than the most robust.
    torch.testing.assert_close(at(points, 0.85, 0.7, 0.8, 0.5), torch.tensor([0.4, 0.65, 0.6, 0.7]))
    assert at(points, 0.91).isnan().all()
    # A point below the line of its neighbors is skipped.
    torch.testing.assert_close(at([[0.9, 0.2], [0.8, 0.3], [0.6, 0.8]], 0.8), torch.tensor([0.4]))


def test_envelope_is_the_best_mixture():
    """Against a linear program over all mixtures that are clean enough."""
    points = torch.rand(20, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clean = points[..., 0].amin(dim=1) * 0.4 + points[..., 0].amax(dim=1) * 0.6
    for cloud, x, found in zip(points, clean, envelope(points, clean), strict=True):
        best = linprog(-cloud[:, 1], A_ub=-cloud[None, :, 0], b_ub=[-float(x)], A_eq=[[1.0] * 5], b_eq=[1.0])
        assert float(found) == pytest.approx(-best.fun, abs=1e-9)


def test_points_on_the_envelope():
    points = torch.tensor([[0.9, 0.2], [0.8, 0.3], [0.6, 0.8], [0.5, 0.8], [0.6, 0.8], [0.75, 0.5], [0.8, 0.7]])
    assert on_envelope(points).tolist() == [True, False, False, False, True, False, True]
    assert on_envelope(points[:1]).tolist() == [True]


def test_gap_of_a_shifted_family_is_the_shift():
    first = torch.tensor([[[0.9, 0.2], [0.8, 0.6], [0.6, 0.7]]], dtype=torch.float64)
    second = first + torch.tensor([0.0, 0.125])
    assert float(gap(first, second)) == pytest.approx(0.125)
    other = torch.rand(1, 4, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert float(gap(first, other)) == pytest.approx(-float(gap(other, first)))
    # A family that is nowhere as clean is compared at what it reaches.
    assert float(gap(first, torch.tensor([[[0.5, 0.75]]], dtype=torch.float64))) == pytest.approx(0.05)


def simulated(seed, shift, samples=100, runs=4):
    """Two families of four points each on one curve, for samples of different difficulty; the second is shifted up."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.tensor([0.2, 0.5, 0.8, 1.1] * 2, dtype=torch.float64)
    typical = torch.stack([2.5 - 2.0 * level, -1.0 + 3.2 * level - 1.6 * level**2], dim=1)
    difficulty = torch.randn(samples, 1, 2, generator=generator, dtype=torch.float64)
    chance = torch.sigmoid(typical + 2.0 * difficulty)
    chance[:, 4:, 1] = (chance[:, 4:, 1] + shift).clamp(max=1.0)
    return torch.binomial(torch.full_like(chance, runs), chance, generator=generator) / runs


def difference(shares):
    return bootstrap(shares.mean(dim=0), resampled(shares, 200), len(shares), lambda p: gap(p[:, :4], p[:, 4:]))


def test_equal_families_are_seldom_told_apart_and_a_shift_is_found():
    equal = [verdict(difference(simulated(seed, 0.0))) for seed in range(100)]
    assert 88 <= equal.count("not distinguishable") <= 99
    shifted = [difference(simulated(seed, 0.15)) for seed in range(20)]
    assert [verdict(found) for found in shifted] == ["above"] * 20
    # Of the shift a little is lost where accuracies end at 1.
    assert sum(found.value for found in shifted) / 20 == pytest.approx(0.14, abs=0.02)


def test_the_same_records_differ_by_nothing_within_some_width():
    shares = simulated(0, 0.0)
    found = difference(torch.cat([shares[:, :4], shares[:, :4]], dim=1))
    assert found.value == 0.0
    assert found.low < -0.01 < 0.01 < found.high


def test_what_no_point_reaches_is_not_a_number():
    points = torch.tensor([[0.9, 0.2], [0.8, 0.3]], dtype=torch.float64)
    draws = points.expand(10, -1, -1)
    found = bootstrap(points, draws, 10, lambda p: p[:, 0, 1] - envelope(p[:, 1:], p[:, 0, 0]))
    assert all(math.isnan(value) for value in found)


def test_a_family_expands_to_all_combinations():
    mask = {"class_path": "TopFraction", "init_args": {"fraction": [0.15, 0.3]}}
    template = {"class_path": "P", "init_args": {"mask": mask, "high": [100, 200], "steps": [4]}}
    points = expand({"a": template})
    assert list(points) == [f"a-fraction0_{f}-high{h}" for f in (15, 3) for h in (100, 200)]
    assert points["a-fraction0_3-high100"] == {
        "class_path": "P",
        "init_args": {
            "mask": {"class_path": "TopFraction", "init_args": {"fraction": 0.3}},
            "high": 100,
            "steps": 4,
        },
    }
    with pytest.raises(InputError, match="two points would be called a-high100"):
        expand({"a": {"class_path": "P", "init_args": {"high": [100, 100]}}})


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The shipped configuration in small: five points, one of them refused, two attacks of one step."""
    settings = yaml.safe_load((ROOT / "configs/eval/digits_frontier.yaml").read_text())
    arguments = settings["model"]["init_args"]
    for kind in ("classifier", "denoiser"):
        arguments[kind]["init_args"]["path"] = str(ROOT / arguments[kind]["init_args"]["path"])
    pgd = {**arguments["attacks"]["pgd"]["init_args"], "steps": 1, "step_size": 0.15, "eot": 1}
    arguments["attacks"] = {
        name: {"class_path": "PGD", "init_args": {**pgd, "loss": loss}} for name, loss in (("m", "margin"), ("c", "ce"))
    }
    arguments["runs"], arguments["chunk"] = 2, 16
    families = arguments["families"]
    families["uniform"]["init_args"] |= {"level": [50, 200], "steps": 2}
    families["heterogeneous"]["init_args"] |= {"high": [100, 200], "low": [50, 100], "steps": 2}
    families["heterogeneous"]["init_args"]["mask"]["init_args"]["fraction"] = 0.3
    del families["variable"]
    settings["data"]["init_args"]["subset"]["init_args"]["n"] = 2
    path = tmp_path_factory.mktemp("frontier") / "small.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return ["frontier", "--config", str(path)]


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    run, printed = tmp_path_factory.mktemp("runs") / "frontier", io.StringIO()
    with contextlib.redirect_stdout(printed):
        evaluate([*command, "--run", str(run)])
    (run / "printed.txt").write_text(printed.getvalue())
    return run


def test_frontier_command(finished):
    names = ["none", "uniform-level50", "uniform-level200"]
    names += [f"heterogeneous-high{h}-low{low}" for h, low in ((100, 50), (200, 50), (200, 100))]
    assert {record.defense for record in read_records(finished / "records.jsonl")} == set(names)
    found = json.loads((finished / "frontier.json").read_text())
    assert list(found["refused"]) == ["heterogeneous-high100-low100"]
    summary = json.loads((finished / "summary.json").read_text())
    assert list(found["attacks"]) == ["m", "c", "ensemble"]
    for attack, part in found["attacks"].items():
        results = {r["defense"]: r for r in summary["results"] if r["attack"] == attack}
        assert [point["defense"] for point in part["points"]] == names
        for point in part["points"]:
            assert point["robust"] == results[point["defense"]]["robust"]["average"]
        assert [(each["family"], each["to"]) for each in part["comparisons"]] == [("heterogeneous", "uniform")]
        # Of each family at least one point lies on its line, and points are compared with the other family alone.
        assert {"uniform", "heterogeneous"} == {point["family"] for point in part["points"] if point["on_frontier"]}
        assert [list(point["above"]) for point in part["points"]] == [[]] + [["heterogeneous"]] * 2 + [["uniform"]] * 3
    assert (finished / "frontier.png").stat().st_size > 10_000
    assert "<h2>Frontiers</h2>" in (finished / "report.html").read_text()
    printed = (finished / "printed.txt").read_text()
    assert "1 combinations left out" in printed
    assert "uniform 2, heterogeneous 3; left out: 1" in printed


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([(0.9, 0.1), (0.8, 0.3), (0.7, 0.5)], True),
        ([(0.9, 0.1), (0.8, 0.5), (0.7, 0.3)], False),
        ([(0.9, 0.1)], False),
    ],
)
def test_a_family_that_should_be_swept_on_is_named(points, said):
    """Its curve is cut off where it still rises, which would be to its disadvantage."""
    shares = torch.tensor([[(1.0, 0.0), *points]] * 4, dtype=torch.float64)
    results = [
        {"defense": f"d{k}", "clean": {"average": [0.0] * 3}, "robust": {"average": [0.0] * 3}}
        for k in range(len(points) + 1)
    ]
    found = frontier._compared(shares, results, {"a": [f"d{k}" for k in range(1, len(points) + 1)]})
    assert found["open_ended"] == ["a"] * said


@pytest.mark.parametrize(("missing", "stated"), [(5, True), (6, False)])
def test_no_interval_on_the_condition_that_there_is_a_difference(missing, stated):
    draws = torch.linspace(0, 1, 100, dtype=torch.float64)[:, None, None]
    points = torch.tensor([[0.5]], dtype=torch.float64)

    def statistic(drawn):
        values = drawn[:, 0, 0].clone()
        if len(drawn) > 1:
            values[:missing] = torch.nan
        return values

    assert (not math.isnan(bootstrap(points, draws, 100, statistic).value)) == stated


def test_a_gap_begins_at_the_less_clean_of_two_peaks():
    """A family that is more robust at less clean accuracy is above for it."""
    first = torch.tensor([[[0.9, 0.2], [0.8, 0.4]]], dtype=torch.float64)
    second = torch.tensor([[[0.9, 0.2], [0.8, 0.4], [0.7, 0.6]]], dtype=torch.float64)
    # Over 0.7 .. 0.9 the first is flat from 0.8 down: a triangle of 0.1 by 0.2.
    assert float(gap(first, second)) == pytest.approx(0.5 * 0.1 * 0.2 / 0.2, abs=0.005)


def test_the_saved_configuration_is_that_of_the_run(finished, capsys):
    """Nothing is evaluated anew in the run's own folder, which other settings would be refused."""
    before = (finished / "records.jsonl").read_bytes()
    evaluate(["--config", str(finished / "config.yaml"), "--run", str(finished)])
    assert "goes on after 24 records" in capsys.readouterr().out
    assert (finished / "records.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ({"level": [2000], "steps": 2}, "families.uniform: no point is left (level = 2000 is outside"),
        ({"level": [], "steps": 2}, "families.uniform: no point is left (a list is empty)"),
        ({"levle": [50], "steps": 2}, "UniformPurifier has no option levle; did you mean level?"),
        (None, "families.uniform: give its class_path"),
    ],
)
def test_wrong_families_are_refused(command, tmp_path, capsys, family, said):
    template = {} if family is None else {"class_path": "UniformPurifier", "init_args": family}
    refused(command, tmp_path, f"--model.init_args.families.uniform={json.dumps(template)}")
    assert said in capsys.readouterr().err


def test_the_test_split_is_refused(command, tmp_path, capsys):
    refused(command, tmp_path, "--data.init_args.evaluate_on=test")
    assert "evaluate_on = test: a frontier chooses the best" in capsys.readouterr().err


def test_an_attack_called_ensemble_is_refused(command, tmp_path, capsys):
    attack = {"class_path": "PGD", "init_args": {"norm": "linf", "eps": 0.1, "steps": 1, "step_size": 0.1}}
    refused(command, tmp_path, f"--model.init_args.attacks.ensemble={json.dumps(attack)}")
    assert "'ensemble' is what the worst case over all attacks is called" in capsys.readouterr().err


def refused(command, tmp_path, flag):
    with pytest.raises(SystemExit) as exit_:
        evaluate([*command, "--run", str(tmp_path / "run"), flag])
    assert exit_.value.code == 2
