"""eval.py compare: what is paired, what is not, and what is refused."""

import json
import re

import pytest
import torch
from made_runs import ATTACKS, DEFENSES, HOSTILE, RUNS, cells, finished_run

from lit_purify.cli import evaluate
from lit_purify.functional.statistics import paired_difference
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
    assert [row.title for row in rows] == [f"{path}: {defense}" for path in pair for defense in DEFENSES]
    assert all(row.robust is None for row in rows[:3])
    for row in rows[3:]:
        before, after = averages(pair[0], row.other, ["pgd", "square"]), averages(pair[1], row.other, ["pgd"])
        values = [torch.tensor([each[i] for i in range(20, 30)], dtype=torch.float64) for each in (before, after)]
        assert row.robust == pytest.approx(paired_difference(*values))
        assert row.remarks == "another attack, 10 shared samples"
    # A radius that only one has.
    assert all(row.robust is None for row in comparison.rows["linf", 16 / 255])
    differing = cells(comparison.page())["Settings that differ between the runs"]
    assert [row[0] for row in differing] == ["setting", "depth"]


@pytest.mark.parametrize(("attack", "differ"), [(None, []), ("square", [0]), ("far", [1]), ("other", [2])])
def test_another_attack_is_one_that_differs_in_itself_or_in_an_ensemble(pair, tmp_path, attack, differ):
    """Of pgd and square an ensemble states the sum of their steps, and their names."""
    copy = finished_run(tmp_path / "copy")
    summary = json.loads((copy / "summary.json").read_text())
    for result in summary["results"]:
        if result["attack"] == attack:
            result["attack_title"] = "with half the step"
    (copy / "summary.json").write_text(json.dumps({**summary, "runs": 9}))
    rows = [rows[3] for rows in Comparison([pair[0], copy]).rows.values()]
    assert [row.robust.value for row in rows] == [0.0] * 3
    assert [k for k, row in enumerate(rows) if row.remarks.startswith("another attack")] == differ
    assert all(row.remarks.endswith("9 runs for 4, 20 shared samples") for row in rows)


def test_a_defense_without_counterpart_is_compared_to_the_baseline(pair, tmp_path):
    copy = finished_run(tmp_path / "copy")
    for name in ("summary.json", "records.jsonl"):
        (copy / name).write_text((copy / name).read_text().replace('"paper"', '"new"'))
    row = Comparison([pair[0], copy]).rows["l2", 0.5][5]
    assert (row.result["defense"], row.other) == ("new", "uniform")
    before = sum(averages(pair[0], "uniform", ["other"]).values()) / 20
    assert row.robust.value == pytest.approx(row.result["robust"]["average"][0] - before)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"samples": range(40, 50)}, "the runs share no sample"),
        ({"classifier.weights (sha256)": "2"}, "the classifier has other settings or another file"),
        ({"data.root": "elsewhere"}, "the data has other settings"),
        # Images of a folder that has changed since.
        ({"data.names (sha256)": "1"}, "the data has other settings"),
        ({"summary": ('"split": "test"', '"split": "val"')}, "another split: val, not test"),
        ({"records": ('"label": 1', '"label": 2')}, "the same samples have other labels"),
        # The same file elsewhere, and another choice of samples.
        ({"classifier.weights": "elsewhere", "data.subset.n": 3}, ""),
    ],
)
def test_what_cannot_be_paired_is_not(pair, tmp_path, changes, reason):
    edits = {f"{kind}.json{'l' * (kind == 'records')}": changes.pop(kind, None) for kind in ("summary", "records")}
    other = finished_run(tmp_path / "other", **changes)
    for name, edit in edits.items():
        if edit:
            (other / name).write_text((other / name).read_text().replace(*edit))
    comparison = Comparison([pair[0], other])
    assert comparison.pairing[str(other)].startswith(reason)
    row = comparison.rows["l2", 0.5][3]
    assert (row.clean is None, row.robust is None) == (bool(reason),) * 2
    if reason:
        assert row.remarks == f"not paired ({re.split('[:,]', reason)[0]})"
        assert "other: not paired, " + reason in comparison.table()
        assert "other is not paired: " + reason in comparison.page()


def test_text_and_page_have_each_figure_in_its_place(pair):
    comparison = Comparison(list(pair))
    printed, tables = comparison.table().splitlines(), cells(comparison.page())
    for threat, rows in comparison.rows.items():
        start = next(k for k, line in enumerate(printed) if line.startswith(f"{threat[0]} <= {radius(threat)}"))
        head, *table = tables[f"{threat_name(threat)}, under all attacks of this kind: accuracy in %"]
        for line, row, words in zip(printed[start + 2 :], rows, table, strict=False):
            wanted = [percent(row.result[kind]["average"]) for kind in ("clean", "robust")]
            wanted += [signed(row.clean), signed(row.robust)] if row.robust else []
            assert re.findall(r"[+-]?\d+\.\d \[[^]]*\]", line) == wanted
            shown = dict(zip(head, words, strict=True))
            for kind in ("clean", "robust"):
                for rule in ("average", "worst", "majority"):
                    assert shown[f"{kind} {rule}"] == percent(row.result[kind][rule])
            assert [words[2], words[4]] == [signed(row.robust), signed(row.clean)]


def test_several_processes_compare_once(pair, tmp_path, capsys, monkeypatch):
    """And explain themselves once."""
    monkeypatch.setenv("RANK", "1")
    evaluate(["compare", *map(str, pair), "--output", str(tmp_path / "page.html")])
    with pytest.raises(SystemExit):
        evaluate(["--help"])
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "page.html").exists()


def test_compare_command(pair, tmp_path, capsys):
    output = tmp_path / "page.html"
    for _ in range(2):
        evaluate(["compare", *map(str, pair), "--output", str(output)])
        printed = capsys.readouterr().out
        assert printed.isascii()
        assert "linf <= 8/255, average accuracy in %" in printed
        assert f"Page: {output}" in printed
        assert output.read_text() == Comparison(list(pair)).page()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["{0}"], "compare needs at least two run folders"),
        (["{0}", "{0}/summary.json"], "a run is named twice: give each run once"),
        (["{0}", "{0}/overlays"], "no finished evaluation, summary.json is missing"),
        (["{0}", "{1}", "--output", "{0}/summary.json/page.html"], "choose another file with --output"),
        (["{0}", "{1}", "--output", "{0}/records.jsonl"], "exists and is not a comparison page"),
        (["{0}", "{1}", "--output", "{0}/report.html"], "exists and is not a comparison page"),
    ],
)
def test_wrong_comparisons_are_refused(pair, refused, argv, said):
    (pair[0] / "report.html").write_text(page(FinishedRun.read(pair[0])))
    before = {path: path.read_bytes() for path in pair[0].iterdir() if path.is_file()}
    assert said in refused(evaluate, "compare", *(word.format(*pair) for word in argv))
    assert before == {path: path.read_bytes() for path in pair[0].iterdir() if path.is_file()}
