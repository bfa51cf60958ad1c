"""eval.py compare: what is paired, what is not, and what is refused."""

import json
import re

import pytest
import torch
from made_runs import ATTACKS, DEFENSES, HOSTILE, RUNS, Cells, finished_run

from lit_purify.cli import evaluate
from lit_purify.functional.statistics import paired_difference, unpaired_difference, wilson
from lit_purify.report.comparison import Comparison
from lit_purify.report.finished import FinishedRun, radius, threat_name
from lit_purify.report.html import page
from lit_purify.report.summary import percent, signed


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two evaluations that share ten of their twenty samples."""
    path = tmp_path_factory.mktemp(f"compare{HOSTILE[:8]}")
    some = {name: ATTACKS[name] for name in ("pgd", "other")}
    return finished_run(path / "first"), finished_run(path / "$x_{$<b>second", range(20, 40), 1, some, depth=3)


def averages(run, defense, attacks):
    """By sample the lowest share of right runs."""
    found = {}
    for line in (run / "records.jsonl").read_text().splitlines():
        r = json.loads(line)
        if r["defense"] == defense and r["attack"] in attacks:
            share = r["adversarial"].count(r["label"]) / RUNS
            found[r["index"]] = min(share, found.get(r["index"], share))
    return found


def test_differences_are_paired_over_the_shared_samples(pair):
    comparison = Comparison(list(pair))
    rows = comparison.rows["linf", 8 / 255]
    assert [(row.run, row.result["defense"]) for row in rows] == [(p.name, d) for p in pair for d in DEFENSES]
    assert all(row.robust is None for row in rows[:3])
    for row in rows[3:]:
        before, after = averages(pair[0], row.other, ["pgd", "square"]), averages(pair[1], row.other, ["pgd"])
        values = [torch.tensor([each[i] for i in range(20, 30)], dtype=torch.float64) for each in (before, after)]
        assert row.robust == pytest.approx(paired_difference(*values))
        assert row.remarks == "another attack, 10 shared samples"
    # A radius that only one has.
    assert all(row.robust is None for row in comparison.rows["linf", 16 / 255])
    assert list(comparison.differing) == ["depth"]


def test_a_run_differs_from_its_copy_by_nothing(pair, tmp_path):
    copy = finished_run(tmp_path / "copy")
    rows = Comparison([pair[0], copy]).rows["l2", 0.5]
    assert [row.robust.value for row in rows[3:]] == [0.0] * 3
    assert rows[3].remarks == "20 shared samples"


@pytest.mark.parametrize(("attack", "differ"), [("square", [0]), ("far", [1]), ("other", [2])])
def test_another_attack_is_one_that_differs_in_itself_or_in_an_ensemble(pair, tmp_path, attack, differ):
    """Of pgd and square an ensemble states the sum of their steps, and their names."""
    copy = finished_run(tmp_path / "copy")
    summary = json.loads((copy / "summary.json").read_text())
    for result in summary["results"]:
        if result["attack"] == attack:
            result["attack_title"] = "with half the step"
    (copy / "summary.json").write_text(json.dumps(summary))
    remarks = [rows[3].remarks for rows in Comparison([pair[0], copy]).rows.values()]
    assert [k for k, remark in enumerate(remarks) if remark.startswith("another attack")] == differ


def test_a_defense_without_counterpart_is_compared_to_the_baseline(pair, tmp_path):
    copy = finished_run(tmp_path / "copy")
    for name in ("summary.json", "records.jsonl"):
        (copy / name).write_text((copy / name).read_text().replace('"paper"', '"new"'))
    row = Comparison([pair[0], copy]).rows["l2", 0.5][5]
    assert (row.result["defense"], row.other) == ("new", "uniform")
    assert row.robust.value == pytest.approx(
        row.result["robust"]["average"][0] - sum(averages(pair[0], "uniform", ["other"]).values()) / 20
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"samples": range(40, 50)}, "no sample is shared"),
        ({"model.init_args.classifier.path (sha256)": "2"}, "the classifier has other settings or another file"),
        ({"data.init_args.root": "elsewhere"}, "the data have other settings"),
        # Images of a folder that has changed since.
        ({"data (sha256 of names)": "1"}, "the data have other settings"),
        ({"summary": ('"split": "test"', '"split": "val"')}, "another split: val, not test"),
        ({"records": ('"label": 1', '"label": 2')}, "samples of one number have other labels"),
    ],
)
def test_what_cannot_be_paired_is_not(pair, tmp_path, changes, reason):
    edits = {f"{kind}.json{'l' * (kind == 'records')}": changes.pop(kind, None) for kind in ("summary", "records")}
    other = finished_run(tmp_path / "other", **changes)
    for name, edit in edits.items():
        if edit:
            (other / name).write_text((other / name).read_text().replace(*edit))
    comparison = Comparison([pair[0], other])
    assert comparison.pairing["other"].startswith(reason)
    row = comparison.rows["l2", 0.5][3]
    assert row.remarks == f"not paired ({re.split('[:,]', reason)[0]})"
    for kind in ("clean", "robust"):
        (before, *_), (after, *_) = (rows.result[kind]["average"] for rows in comparison.rows["l2", 0.5][0::3])
        assert getattr(row, kind).low < getattr(row, kind).value < getattr(row, kind).high
        assert getattr(row, kind).value == pytest.approx(after - before)
    assert "other: not paired, " + reason in comparison.table()
    assert "other is not paired: " + reason in comparison.page()


def test_unpaired_difference_is_newcombes():
    """The first example of Newcombe 1998, method 10: 56/70 less 48/80."""
    found = unpaired_difference(wilson(48 / 80, 80), wilson(56 / 70, 70))
    assert found == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_compare_command(pair, tmp_path, capsys):
    output = tmp_path / "page.html"
    evaluate(["compare", *map(str, pair), "--output", str(output)])
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert "linf <= 8/255, average accuracy in %" in printed
    assert f"Page: {output}" in printed
    assert output.read_text() == Comparison(list(pair)).page()
    evaluate(["compare", *map(str, pair), "--output", str(output)])


def test_text_and_page_have_each_figure_in_its_place(pair):
    comparison = Comparison(list(pair))
    printed, cells = comparison.table().splitlines(), Cells(comparison.page()).tables
    for threat, rows in comparison.rows.items():
        start = next(k for k, line in enumerate(printed) if line.startswith(f"{threat[0]} <= {radius(threat)}"))
        table = cells[f"{threat_name(threat)}, under all attacks of this kind: accuracy in %"]
        columns = table[0]
        for k, row in enumerate(rows):
            line, shown = printed[start + 2 + k], dict(zip(columns, table[1 + k], strict=True))
            wanted = [percent(row.result[kind]["average"]) for kind in ("clean", "robust")]
            if row.robust is not None:
                wanted += [signed(row.clean), signed(row.robust)]
            assert re.findall(r"[+-]?\d+\.\d \[[^]]*\]", line) == wanted
            for kind in ("clean", "robust"):
                for rule, name in (("average", "average"), ("worst", "worst"), ("majority", "vote")):
                    assert shown[f"{kind} {name}"] == percent(row.result[kind][rule])
            less = [cell for name, cell in zip(columns, table[1 + k], strict=True) if name.startswith("less ")]
            assert less == ([signed(row.robust), signed(row.clean)] if row.robust is not None else ["", ""])


def test_another_number_of_runs_is_named(pair, tmp_path):
    copy = finished_run(tmp_path / "copy")
    comparison = Comparison([pair[0], copy])
    comparison.runs["copy"].summary["runs"] = 9
    assert all("9 runs for 4" in row.remarks for row in comparison._rows(("l2", 0.5))[3:])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["{0}"], "compare takes two run folders or more"),
        (["{0}", "{0}/summary.json"], "first: named twice; give each run once"),
        (["{0}", "{0}/overlays"], "no finished evaluation, summary.json is missing"),
        ([], "the following arguments are required: RUN"),
        (["{0}", "{1}", "--out", "x"], "unrecognized arguments: --out x"),
        (["{0}", "{1}", "--output", "{0}/summary.json/page.html"], "choose another file with --output"),
        (["{0}", "{1}", "--output", "{0}/overlays"], "choose another file with --output"),
    ],
)
def test_wrong_comparisons_are_refused(pair, capsys, argv, said):
    with pytest.raises(SystemExit) as exit_:
        evaluate(["compare", *(word.format(*pair) for word in argv)])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("kind", ["records", "report", "page of somebody else"])
def test_what_is_no_comparison_is_not_written_over(kind, pair, tmp_path, capsys):
    there = tmp_path / "there.html"
    there.write_text("<!doctype html><p>mine")
    if kind == "records":
        there = pair[0] / "records.jsonl"
    elif kind == "report":
        there.write_text(page(FinishedRun.read(pair[0])))
    before = there.read_bytes()
    with pytest.raises(SystemExit) as exit_:
        evaluate(["compare", *map(str, pair), "--output", str(there)])
    assert exit_.value.code == 2
    assert "is there already, and no page of a comparison" in capsys.readouterr().err
    assert there.read_bytes() == before
