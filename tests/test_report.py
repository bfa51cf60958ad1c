"""report.html: its figures against the records, its pictures against the overlays, its verdicts."""

import io
import json
import re
from base64 import b64decode
from html.parser import HTMLParser

import pytest
import torch
from made_runs import ATTACKS, DEFENSES, finished_run, write_verdict
from PIL import Image
from torchvision.utils import save_image

from lit_purify.callbacks.finished import FinishedRun, radius
from lit_purify.callbacks.html import _bins, page
from lit_purify.callbacks.pictures import OUTCOMES, outcome, pictures
from lit_purify.errors import InputError
from lit_purify.functional.rendering import panels
from lit_purify.metrics import Record


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
    verdict = json.loads((path / "gradcheck.json").read_text())
    for damaged, said in (
        ("{", "cannot be read as JSON"),
        ("[]", "its content is not what eval.py writes there"),
        (json.dumps({**verdict, "checks": None}), "checks is missing"),
        (json.dumps({**verdict, "checks": [{"check": "zeros"}]}), "checks.0.defense is missing"),
    ):
        (path / "gradcheck.json").write_text(damaged)
        shown = page(FinishedRun.read(path))
        assert badges(shown)[1] == "unreadable"
        assert re.search(rf"gradcheck\.json: {said}.*; give the eval.py gradcheck command again", shown)
    # The least that is needed.
    (path / "gradcheck.json").write_text(json.dumps({**verdict, "checks": [{"check": "zeros", "defense": "paper"}]}))
    assert badges(page(FinishedRun.read(path)))[1] == "passed"


def test_commands_name_the_folder_as_it_was_given(run, monkeypatch):
    monkeypatch.chdir(run.parent.parent)
    path = run.relative_to(run.parent.parent)
    text = page(FinishedRun.read(path))
    assert f"python eval.py gradcheck --config {path}/config.yaml --run {path}</code>" in text
    assert f"python eval.py --config {path}/config.yaml --run {path}-again</code>" in text


def test_the_configuration_can_be_saved_from_the_page(run, text):
    (address,) = re.findall(r"href=\"data:text/yaml;base64,([^\"]+)", text)
    assert b64decode(address).decode() == (run / "config.yaml").read_text()


def test_frontiers_of_an_earlier_run_are_not_shown(tmp_path):
    path = finished_run(tmp_path / "run", attacks={"pgd": ("linf", 0.1)})
    (path / "frontier.json").write_text("damaged, and of no matter")
    assert "Frontiers" not in page(FinishedRun.read(path))


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
    for keys, value, words in (
        (["runs"], None, "runs is missing"),
        (["runs"], "8", "runs is not what eval.py writes there"),
        (["results", 1, "eot"], None, "results.1.eot is missing"),
        (["results", 0, "clean", "worst"], [0.5, 0.4], "results.0.clean.worst is not what"),
        (["results", 2, "robust", "average", 1], "low", "results.2.robust.average.1 is not what"),
        (["results", 1], None, "results.1 is missing"),
        (["results", 1, "attack"], "far", "results has none of none under far"),
    ):
        summary = json.loads(content)
        place = summary
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        (path / "summary.json").write_text(json.dumps(summary))
        assert said(path).startswith(f"{path / 'summary.json'}: {words}")
        assert said(path).endswith("; give the eval.py command again")
    (path / "summary.json").unlink()
    assert "the same eval.py command finishes it" in said(path)
    (path / "summary.json").write_text(content)
    (path / "identity.json").unlink()
    assert said(path).startswith(f"{path / 'identity.json'}: cannot be read")
