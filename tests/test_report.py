"""report.html: its figures against the records, its pictures against the overlays, its verdicts."""

import io
import json
import re
from base64 import b64decode

import pytest
import torch
from made_runs import ATTACKS, DEFENSES, cells, finished_run, write_verdict
from PIL import Image

from lit_purify.errors import InputError
from lit_purify.evaluation import Record
from lit_purify.evaluation.folder import RunFolder
from lit_purify.functional.rendering import PANELS, picture_name
from lit_purify.report import pictures
from lit_purify.report.finished import FinishedRun, radius
from lit_purify.report.html import _signed, drawing, page, write_report
from lit_purify.report.pictures import OUTCOMES, outcome
from lit_purify.report.summary import percent, signed

ONE = {"pgd": ("linf", 0.1)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = finished_run(tmp_path_factory.mktemp("report") / "run")
    write_verdict(path, "audit", passed=False)
    return path


@pytest.fixture(scope="module")
def text(run):
    return page(FinishedRun.read(run))


def test_the_page_is_one_file_and_a_function_of_the_folder(run, text):
    assert text == page(FinishedRun.read(run / "summary.json"))
    links = re.findall(r"(?:src|href)=\"([^\"]+)", text)
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "http:" not in text.replace("http-equiv", "")
    assert "https:" not in text
    assert "<script" not in text
    for command in (
        f"gradcheck --config {run}/config.yaml --run {run}",
        f"--config {run}/config.yaml --run {run}-again",
    ):
        assert f"python eval.py {command}</code>" in text


def test_a_run_in_memory_has_the_same_page_without_commands_and_configuration(tmp_path):
    read = FinishedRun.read(finished_run(tmp_path / "run", attacks=ONE))
    text = page(FinishedRun(read.summary, read.records, {}, views=read.views))
    assert cells(text) == cells(page(read))
    for missing in ("python eval.py", "Configuration", "Audit of the attack"):
        assert missing not in text
        assert missing in page(read)
    assert re.findall('data:image/webp;base64,[^"]+', text) == re.findall('data:image/webp;base64,[^"]+', page(read))


def test_tables_hold_the_figures_of_the_summary(run, text):
    tables = cells(text)
    summary = json.loads((run / "summary.json").read_text())
    by_pair = {(r["defense"], r["attack"]): r for r in summary["results"]}
    headline = {row[0]: row for row in tables["Accuracy in %, under all attacks of each kind"]}
    assert headline["defense"][1:6:2] == [
        f"robust average, {name}" for name in ("L∞ ≤ 8/255", "L∞ ≤ 16/255", "L2 ≤ 0.5")
    ]
    for defense in DEFENSES:
        for column, attack in ((1, "ensemble"), (3, "far"), (5, "other")):
            assert headline[defense][column] == percent(by_pair[defense, attack]["robust"]["average"])
        assert headline[defense][7].startswith(percent(by_pair[defense, "far"]["clean"]["average"]))
    for attack in (*ATTACKS, "ensemble"):
        for row in tables[f"Robust accuracy under {attack} in %, and its cost"][1:]:
            result = by_pair[row[0], attack]
            assert row[1:4] == [percent(result["robust"][rule]) for rule in ("average", "worst", "majority")]
            # Of the attacks only square is not the first of its kind.
            less = [result.get(name, {}).get("average") for name in ("robust_difference", "attack_difference")]
            assert (less[1] is None) == (attack != "square")
            assert row[4:8] == [signed(less[0]), signed(less[1]), result["gradient"], str(result["nfe_attack"])]
            assert row[8:10] == [f"{result['linf']:.4f}", f"{result['l2']:.3f}"]


def test_one_threat_model_has_its_worst_case_and_vote_in_the_headline(tmp_path):
    run = finished_run(tmp_path / "run", attacks=ONE)
    summary = json.loads((run / "summary.json").read_text())
    summary["results"][1]["repeated"] = 3
    (run / "summary.json").write_text(json.dumps(summary))
    tables = cells(page(FinishedRun.read(run)))
    for row, result in zip(
        tables["Accuracy in %, under all attacks of each kind"][1:], summary["results"], strict=True
    ):
        assert row[1:4] == [percent(result["robust"][rule]) for rule in ("average", "worst", "majority")]
        less = signed(result.get("clean_difference", {}).get("average"))
        assert row[5] == f"{percent(result['clean']['average'])} {less}".strip()
    # Figures under skip_lost are marked.
    shown = tables["Robust accuracy under pgd in %, and its cost"]
    assert [row[0].endswith("*") for row in shown] == [False, False, True, False]


def test_figures_in_words():
    """A difference without 0 is bold; radii are in 255ths if that is what was meant."""
    found = ["strong" in _signed(value) for value in ((0.2, 0.1, 0.3), (-0.2, -0.3, -0.1), (0.1, -0.1, 0.3))]
    assert found == [True, True, False]
    radii = {8 / 255: "8/255", 0.5 / 255: "0.001961", 0.15: "0.15", 51 / 255: "0.2", 0.0313: "0.0313"}
    assert [radius(("linf", eps)) for eps in radii] == list(radii.values())
    assert radius(("l2", 8 / 255)) == "0.03137"


def test_a_drawing_has_every_point_in_its_place_with_its_intervals():
    def result(name, clean, robust):
        return {"defense": name, "clean": {"average": clean}, "robust": {"average": robust}}

    found = drawing([result(f"d{k}", (0.6, 0.4, 0.8), (0.2, 0.0, 0.4)) for k in range(40)])
    assert [words for _, words in found["x"]] == ["40", "50", "60", "70", "80"]
    assert [words for _, words in found["y"]] == ["0", "10", "20", "30", "40"]
    # The middle of an area of 400 by 300 from (50, 10).
    assert found["marks"][0]["at"] == (250, 160)
    assert found["marks"][0]["bars"] == "M50.0 160.0H450.0M250.0 310.0V10.0"
    assert len({tuple(style.values()) for style in found["series"].values()}) == 40
    # Two families: the dotted line is that of the better one, which has a point below its line.
    values = {"a/1": (0.8, 0.0), "a/2": (0.6, 0.0), "a/3": (0.4, 0.4), "b": (0.4, 0.2)}
    found = drawing([result(name, [x] * 3, [y] * 3) for name, (x, y) in values.items()])
    assert list(found["series"]) == ["a", "b"]
    assert found["lines"] == [
        ("50.0,10.0 450.0,310.0", "currentColor", True),
        ("50.0,10.0 450.0,310.0", "var(--series-0)", False),
        ("50.0,160.0", "var(--series-1)", False),
    ]


def test_outcomes_by_hand():
    """A tie of the clean votes is wrong."""
    runs = {
        "survived": ("1110", "1111"),
        "shaken": ("1111", "1000"),
        "broken": ("1111", "0022"),
        "wrong": ("1100", "1111"),
    }
    for expected, (clean, attacked) in runs.items():
        record = Record("d", "a", 0, 1, [*map(int, clean)], [*map(int, attacked)], 0.0, 0.0, 0.0)
        assert outcome(record) == expected
    assert list(OUTCOMES) == ["broken", "shaken", "survived", "wrong"]


def opened(address):
    return Image.open(io.BytesIO(b64decode(address.partition(",")[2])))


def test_pictures_are_read_as_they_were_written_and_shown_as_they_are(run, tmp_path):
    views = FinishedRun.read(run).views
    assert len(views) == 2 * 3 * 4
    assert all((view.mask is None) == (view.record.defense != "paper") for view in views)
    view = next(view for view in views if view.mask is not None)
    pictures.write(view, tmp_path)
    (again,) = pictures.read(tmp_path, [each.record for each in views])
    shown = pictures.shown(again, ["a", "b", "c"])
    with Image.open(tmp_path / f"{picture_name(*again.record.key)}.png") as strip:
        for name, left in zip(PANELS, (0, 132, 3 * 132, 4 * 132), strict=True):
            assert torch.equal(getattr(again, name), getattr(view, name))
            pixels = pictures.pil(getattr(again, name))
            assert opened(shown["panels"][name]).convert("RGB").tobytes() == pixels.tobytes()
            cut = strip.crop((left, 0, left + 128, 128))
            assert cut.resize((8, 8), Image.Resampling.NEAREST).tobytes() == pixels.tobytes()
    assert torch.equal(again.mask, view.mask)
    assert opened(shown["mask"]).getchannel("A").tobytes() == pictures.pil(again.mask).tobytes()


def test_every_name_has_files_of_its_own():
    names = ["a", "a.b", "a-b", "a_b", "a/b", "b", "b.c"]
    found = {picture_name(defense, attack, 1) for defense in names for attack in names if "/" not in attack}
    assert len(found) == len(names) * (len(names) - 1)
    assert picture_name("uniform/0.5", "pgd", 12) == "uniform+0,5.pgd.000012"


def badges(text):
    return re.findall(r"<dd>\s*<span class=\"badge ?\w*\">([^<]+)", text)


def test_verdicts_are_shown_whenever_they_came_with_their_samples(run, text, tmp_path):
    assert badges(text) == ["failed on 2 samples", "not checked"]
    assert "Failed: paper: restarts." in text
    path = finished_run(tmp_path / "run", attacks=ONE)
    write_verdict(path, "audit", stale=True)
    write_verdict(path, "gradcheck", samples=[3])
    shown = page(FinishedRun.read(path))
    assert badges(shown) == ["stale: passed on 2 samples, for other settings", "passed on 1 sample"]
    assert "belongs to other settings" in shown
    verdict = json.loads((path / "gradcheck.json").read_text())
    for damaged in (
        "{",
        "[]",
        json.dumps({**verdict, "checks": None}),
        json.dumps({**verdict, "checks": [{"check": 1}]}),
    ):
        (path / "gradcheck.json").write_text(damaged)
        shown = page(FinishedRun.read(path))
        assert badges(shown)[1] == "unreadable"
        assert "Its file is damaged." in shown


def test_files_that_are_missing_or_damaged_are_one_line(tmp_path):
    run = finished_run(tmp_path / "run", attacks=ONE)
    panel = next((run / "overlays/panels").iterdir())
    whole = panel.read_bytes()
    panel.write_bytes(whole[:-40])
    with pytest.raises(InputError, match=r"overlays: .*truncated"):
        write_report(RunFolder(run))
    panel.unlink()
    with pytest.raises(InputError, match=r"\.png: no such file or directory"):
        write_report(RunFolder(run))
    assert not (run / "report.html").exists()
    panel.write_bytes(whole)
    # A run of the Python API has no configuration.
    (run / "config.yaml").unlink()
    assert "python eval.py" not in page(FinishedRun.read(run))


def test_unfinished_folders_are_refused(tmp_path):
    def said(path):
        with pytest.raises(InputError) as error:
            FinishedRun.read(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "summary.json is missing: name a folder that eval.py wrote" in said(tmp_path / "none")
    path = finished_run(tmp_path / "run", attacks=ONE)
    content, lines = (path / "summary.json").read_text(), (path / "records.jsonl").read_text().splitlines()
    (path / "records.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert "59 records instead of the 60 of summary.json" in said(path)
    result = json.loads(content)["results"][0]
    other = {**result["clean"], "worst": [0.5, 0.4]}
    for changes, words in (
        ("{", "Expecting"),
        ('{"schema": 0}', "missing 7 required"),
        ({"another": 1}, "unexpected keyword argument 'another'"),
        ({"results": [{k: v for k, v in result.items() if k != "eot"}]}, "'eot'"),
        ({"results": [{**result, "clean": other}]}, "missing 1 required positional argument: 'high'"),
    ):
        damaged = changes if isinstance(changes, str) else json.dumps({**json.loads(content), **changes})
        (path / "summary.json").write_text(damaged)
        assert said(path).startswith(f"{path / 'summary.json'}: not a summary of this version (")
        assert words in said(path)
        assert said(path).endswith("; run the same eval.py command again")
    (path / "summary.json").unlink()
    assert "finish it with the same eval.py command" in said(path)
    (path / "summary.json").write_text(content)
    (path / "identity.json").unlink()
    assert said(path).startswith(f"{path / 'identity.json'}: cannot be read")
