"""report.html and compare.html, made of run folders that no model has written."""

import hashlib
import io
import json
import random
import re
from base64 import b64decode
from html.parser import HTMLParser

import pytest
import torch
import yaml
from PIL import Image
from test_summary import described
from torchvision.utils import save_image

from lit_purify.callbacks.comparison import Comparison
from lit_purify.callbacks.finished import FinishedRun, radius
from lit_purify.callbacks.html import _bins, page
from lit_purify.callbacks.pictures import OUTCOMES, outcome, pictures
from lit_purify.callbacks.summary import summarize
from lit_purify.cli import evaluate
from lit_purify.errors import InputError
from lit_purify.functional.rendering import panels
from lit_purify.functional.statistics import paired_difference, unpaired_difference, wilson
from lit_purify.metrics import Record
from lit_purify.metrics.records import write_records
from lit_purify.run_folder import RunFolder

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked=1'>\"&'</pre>$x_{$"
CLASSES = ["cat", HOSTILE, "dog"]
RUNS = 4
ATTACKS = {"pgd": ("linf", 8 / 255), "square": ("linf", 8 / 255), "far": ("linf", 16 / 255), "other": ("l2", 0.5)}
DEFENSES = ("none", "uniform", "paper")


def finished_run(path, samples=range(10, 30), seed=0, attacks=ATTACKS, **settings):
    """The folder of an evaluation: random predictions, pictures of the first two samples."""
    rng = random.Random(seed)
    folder = RunFolder(path)
    folder.overlays.mkdir(parents=True)
    facts = {"dataset": f"Folder({HOSTILE})", "split": "test", "classes": CLASSES, "samples": len(samples)}
    facts |= {"subset_sha256": "0" * 64, "seed": 0, "runs": RUNS, "chunk": 16, "classifier": f"net, {HOSTILE}.pth"}
    facts |= {"denoiser": "unet", "versions": {"torch": "2"}, "files": {f"{HOSTILE}.pth": "1" * 64}}
    records = []
    for defense in DEFENSES:
        for index in samples:
            clean = [rng.choice([index % 3] * 8 + [0, 1, 2]) for _ in range(RUNS)]
            for attack in attacks:
                attacked = [rng.choice([index % 3] * 3 + [0, 1, 2]) for _ in range(RUNS)]
                records.append(Record(defense, attack, index, index % 3, clean, attacked, 0.03, 0.5, 0.1))
    results = [
        described(d, a, norm=norm, eps=eps, attack_title=HOSTILE, nfe_defense=DEFENSES.index(d) * 2)
        for d in DEFENSES
        for a, (norm, eps) in attacks.items()
    ]
    summary = summarize(records, results, facts, "uniform")
    folder.summary.write_text(json.dumps(summary))
    write_records(folder.records, records)
    settings = {"model.init_args.classifier.path": "net", "model.init_args.classifier.path (sha256)": "1", **settings}
    folder.identity.write_text(json.dumps(settings))
    folder.config.write_text(yaml.safe_dump({"model": HOSTILE}))
    generator = torch.Generator().manual_seed(seed)
    for record in records:
        if record.index < samples[0] + 2:
            images = torch.rand(5, 3, 8, 8, generator=generator).mul(255).round() / 255
            mask = (images[:1, 0] > 0.5).float()
            name = f"{record.defense}.{record.attack}.{record.index:06d}"
            save_image(panels(images, mask, overlay=2), folder.overlays / f"{name}.png")
            if record.defense == "paper":
                save_image(mask, folder.overlays / f"{name}.mask.png")
    return path


def write_verdict(run, command, passed=True, stale=False):
    identity = json.loads((run / "identity.json").read_text())
    digest = hashlib.sha256(json.dumps({} if stale else identity, sort_keys=True).encode()).hexdigest()
    check = {
        "defense": "paper",
        "check": "restarts",
        "figure": None,
        "limit": 0.05,
        "verdict": "pass" if passed else "fail",
    }
    content = {"passed": passed, "samples": [1, 2], "settings_sha256": digest, "attack": "pgd", "runs": 2}
    (run / f"{command}.json").write_text(json.dumps({**content, "checks": [{**check, "reason": HOSTILE}]}))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = finished_run(tmp_path_factory.mktemp("report") / "run")
    write_verdict(path, "audit", passed=False)
    return path


class Cells(HTMLParser):
    """Words of every row of every table, by the table's caption."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.inside = {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag in ("caption", "th", "td"):
            self.inside, self.words = tag, ""
        elif tag == "small" and self.inside:
            self.words += " "
        elif tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        if self.inside:
            self.words += data

    def handle_endtag(self, tag):
        if tag == "caption":
            self.rows = self.tables.setdefault(self.words.strip(), [])
        elif tag in ("th", "td"):
            self.rows[-1].append(self.words.strip())
        if tag in ("caption", "th", "td"):
            self.inside = None


@pytest.fixture(scope="module")
def text(run):
    return page(FinishedRun.read(run))


def test_the_page_is_one_file_and_a_function_of_the_folder(run, text):
    assert text == page(FinishedRun.read(run / "summary.json"))
    links = re.findall(r"(?:src|href)=\"([^\"]+)", text)
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "http:" not in text.replace("http-equiv", "")
    assert "https:" not in text


def test_tables_hold_the_figures_of_the_summary(run, text):
    tables = Cells(text).tables
    summary = json.loads((run / "summary.json").read_text())
    by_pair = {(r["defense"], r["attack"]): r for r in summary["results"]}
    headline = {row[0]: row for row in tables["Accuracy in %, under all attacks of each kind"]}
    for defense in DEFENSES:
        for column, attack in ((1, "ensemble"), (3, "far"), (5, "other")):
            value, low, high = (100 * v for v in by_pair[defense, attack]["robust"]["average"])
            assert headline[defense][column] == f"{value:.1f} [{low:.1f}, {high:.1f}]"
        assert headline[defense][7].startswith(f"{100 * by_pair[defense, 'far']['clean']['average'][0]:.1f} ")
    by_attack = tables["Robust average under each attack, accuracy in %"]
    assert [cell.split()[0] for cell in by_attack[0]] == ["defense", *ATTACKS, "ensemble"]
    for row in by_attack[1:]:
        found = [100 * by_pair[row[0], attack]["robust"]["average"][0] for attack in (*ATTACKS, "ensemble")]
        assert [cell.split()[0] for cell in row[1:]] == [f"{value:.1f}" for value in found]
    # Of the two norms only one has several radii.
    over = tables["Average accuracy in % over the radius"]
    assert over[0][1:] == ["clean", "8/255 pgd, square", "16/255 far"]
    assert [row[3] for row in over[1:]] == [headline[defense][3] for defense in DEFENSES]


def test_agreement_counts_every_sample_once(run, text):
    rows = Cells(text).tables["Samples by the number of right runs"]
    assert rows[0][2:] == ["0", "1", "2", "3", "4"]
    found = {(row[0], row[1]): [int(cell) for cell in row[2:]] for row in rows[1:]}
    assert len(found) == 3 * 4
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    for (defense, shown), counts in found.items():
        attacks = {"clean": ["far"], "L∞ ≤ 8/255": ["pgd", "square"], "L∞ ≤ 16/255": ["far"], "L2 ≤ 0.5": ["other"]}[
            shown
        ]
        field = "clean" if shown == "clean" else "adversarial"
        right = {}
        for r in records:
            if r["defense"] == defense and r["attack"] in attacks:
                count = r[field].count(r["label"])
                right[r["index"]] = min(count, right.get(r["index"], count))
        assert counts == [list(right.values()).count(k) for k in range(5)]


@pytest.mark.parametrize("runs", [1, 2, 12, 13, 20, 128])
def test_every_count_of_right_runs_has_one_column(runs):
    bins = _bins(runs)
    assert [k for low, high in bins for k in range(low, high + 1)] == list(range(runs + 1))
    assert bins[0] == (0, 0)
    assert bins[-1] == (runs, runs)
    assert len(bins) <= 13


def test_radii_are_called_as_they_are_meant():
    assert [radius(("linf", eps)) for eps in (8 / 255, 0.5 / 255, 0.15, 0.3, 51 / 255, 0.0313)] == [
        "8/255",
        "0.001961",
        "0.15",
        "0.3",
        "0.2",
        "0.0313",
    ]
    assert radius(("l2", 0.5)) == "0.5"


@pytest.mark.parametrize(
    ("clean", "attacked", "expected"),
    [
        ([1, 1, 1, 0], [1, 1, 1, 1], "survived"),
        ([1, 1, 1, 1], [1, 0, 0, 0], "shaken"),
        ([1, 1, 1, 1], [0, 0, 2, 2], "broken"),
        ([1, 1, 0, 0], [1, 1, 1, 1], "wrong"),
        ([0, 0, 0, 0], [0, 0, 0, 0], "wrong"),
    ],
)
def test_outcomes_by_hand(clean, attacked, expected):
    assert outcome(Record("d", "a", 0, 1, clean, attacked, 0.0, 0.0, 0.0)) == expected
    assert expected in OUTCOMES


def opened(address):
    return Image.open(io.BytesIO(b64decode(address.partition(",")[2])))


def test_pictures_are_the_panels_of_the_overlays(run):
    found = pictures(FinishedRun.read(run))
    assert len(found) == 2 * 3 * 4
    picture = next(each for each in found if each.record.defense == "paper")
    key = f"paper.{picture.record.attack}.{picture.record.index:06d}"
    with Image.open(run / "overlays" / f"{key}.png") as strip:
        for name, left in (("original", 0), ("adversarial", 132), ("noised", 3 * 132), ("purified", 4 * 132)):
            assert (
                opened(picture.panels[name]).convert("RGB").tobytes()
                == strip.crop((left, 0, left + 128, 128)).tobytes()
            )
    with Image.open(run / "overlays" / f"{key}.mask.png") as mask:
        assert opened(picture.mask).getchannel("A").tobytes() == mask.convert("L").tobytes()
    assert all((each.mask is None) == (each.record.defense != "paper") for each in found)


def test_large_pictures_are_shrunk(tmp_path):
    path = finished_run(tmp_path / "run", attacks={"pgd": ("linf", 0.1)})
    images = torch.rand(5, 3, 300, 300)
    for overlay in (path / "overlays").glob("*0.png"):
        save_image(panels(images, torch.ones(1, 300, 300), overlay=2), overlay)
    picture = pictures(FinishedRun.read(path))[0]
    assert not picture.exact
    assert opened(picture.panels["original"]).size == (192, 192)


def badges(text):
    return re.findall(r"<dd>\s*<span class=\"badge ?\w*\">([^<]+)", text)


def test_verdicts_are_shown_whenever_they_came(run, text, tmp_path):
    assert badges(text) == ["failed", "not checked"]
    assert "Failed: paper: restarts." in text
    path = finished_run(tmp_path / "run", attacks={"pgd": ("linf", 0.1)})
    write_verdict(path, "audit", stale=True)
    write_verdict(path, "gradcheck")
    shown = page(FinishedRun.read(path))
    assert badges(shown) == ["stale: passed for other settings", "passed"]
    assert "made for other settings" in shown
    (path / "gradcheck.json").write_text("{")
    assert badges(page(FinishedRun.read(path)))[1] == "unreadable"


def test_the_configuration_can_be_saved_from_the_page(run, text):
    (address,) = re.findall(r"href=\"data:text/yaml;base64,([^\"]+)", text)
    assert b64decode(address).decode() == (run / "config.yaml").read_text()


def test_unfinished_folders_are_refused(tmp_path):
    def said(path):
        with pytest.raises(InputError) as error:
            FinishedRun.read(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert said(tmp_path / "none").startswith(f"{tmp_path / 'none'}: no such run folder")
    assert "summary.json is missing; give a folder that eval.py has written" in said(tmp_path)
    path = finished_run(tmp_path / "run", attacks={"pgd": ("linf", 0.1)})
    content, lines = (path / "summary.json").read_text(), (path / "records.jsonl").read_text().splitlines()
    (path / "records.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert "19 records of paper under pgd, 20 in summary.json" in said(path)
    for bad, words in (
        ("{", "cannot be read as JSON"),
        ("[]", "not what eval.py writes"),
        ("{}", "not a summary that"),
    ):
        (path / "summary.json").write_text(bad)
        assert words in said(path)
    (path / "summary.json").unlink()
    assert "the same eval.py command finishes it" in said(path)
    (path / "summary.json").write_text(content)
    (path / "identity.json").unlink()
    assert said(path).startswith(f"{path / 'identity.json'}: cannot be read")


# Comparison


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
    assert row.remarks == "not paired"
    assert row.robust.low < row.robust.value < row.robust.high
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


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["{0}"], "compare takes two run folders or more"),
        (["{0}", "{0}/summary.json"], "first: named twice; give each run once"),
        (["{0}", "{0}/overlays"], "no finished evaluation, summary.json is missing"),
        ([], "the following arguments are required: RUN"),
        (["{0}", "{1}", "--out", "x"], "unrecognized arguments: --out x"),
        (["{0}", "{1}", "--output", "{0}/summary.json/page.html"], "choose another file with --output"),
    ],
)
def test_wrong_comparisons_are_refused(pair, capsys, argv, said):
    with pytest.raises(SystemExit) as exit_:
        evaluate(["compare", *(word.format(*pair) for word in argv)])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
