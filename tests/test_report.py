"""report.html: its figures against the records, its pictures against the overlays, its verdicts."""

import io
import json
import re
from base64 import b64decode

import pytest
import torch
from made_runs import ATTACKS, DEFENSES, Cells, finished_run, write_verdict
from PIL import Image
from torchvision.utils import save_image

from lit_purify.errors import InputError
from lit_purify.evaluation import Record
from lit_purify.evaluation.folder import RunFolder
from lit_purify.functional.rendering import panels
from lit_purify.report import plots
from lit_purify.report.finished import FinishedRun, radius
from lit_purify.report.html import _bins, _signed, page, write_report
from lit_purify.report.pictures import OUTCOMES, outcome, pictures
from lit_purify.report.summary import percent, signed


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
        assert "less what the first attack of that kind leaves" in text
        # Of the attacks only one is not the first of its kind.
        less = {attack: by_pair[row[0], attack].get("attack_difference") for attack in ATTACKS}
        assert [attack for attack in ATTACKS if less[attack]] == ["square"]
        assert row[1 + list(ATTACKS).index("square")].endswith(f"] {signed(less['square']['average'])}")
    # Of the two norms only one has several radii.
    over = tables["Average accuracy in % over the radius"]
    assert over[0][1:] == ["clean", "8/255 pgd, square", "16/255 far"]
    assert [row[3] for row in over[1:]] == [headline[defense][3] for defense in DEFENSES]
    assert [row[1] for row in over[1:]] == [percent(by_pair[d, "far"]["clean"]["average"]) for d in DEFENSES]
    for attack in ATTACKS:
        for row in tables[f"Robust accuracy under {attack} in %, and what it took"][1:]:
            result = by_pair[row[0], attack]
            assert row[1:4] == [percent(result["robust"][rule]) for rule in ("average", "worst", "majority")]
            less = result.get("robust_difference")
            assert row[4:7] == [signed(less["average"]) if less else "", result["gradient"], str(result["nfe_attack"])]
            assert row[7:9] == [f"{result['linf']:.4f}", f"{result['l2']:.3f}"]
    for row in tables["L2 ≤ 0.5: accuracy in %"][1:]:
        result = by_pair[row[0], "other"]
        wanted = [draw for rule in ("resubmission", "vote") for draw in result[rule]["robust"][1:]]
        assert row[1:] == [percent(value) for _, *value in wanted]


def test_one_threat_model_has_its_worst_case_and_vote_in_the_headline(tmp_path):
    run = finished_run(tmp_path / "run", attacks={"pgd": ATTACKS["pgd"]})
    summary = json.loads((run / "summary.json").read_text())
    summary["results"][1]["repeated"] = 3
    summary["results"] = [*summary["results"], *({**r, "attack": "square"} for r in summary["results"])]
    (run / "summary.json").write_text(json.dumps(summary))
    records = (run / "records.jsonl").read_text()
    (run / "records.jsonl").write_text(records + records.replace('"pgd"', '"square"'))
    tables = Cells(page(FinishedRun.read(run))).tables
    for row, result in zip(
        tables["Accuracy in %, under all attacks of each kind"][2:], summary["results"], strict=False
    ):
        values = [result["robust"]["worst"], result["robust"]["majority"], result["clean"]["average"]]
        less = result.get("clean_difference")
        shown = [percent(value) for value in values]
        assert row[3:6] == [*shown[:2], shown[2] + (f" {signed(less['average'])}" if less else "")]
    assert "less what the first attack of that kind leaves" not in page(FinishedRun.read(run))
    # Figures under skip_lost are marked.
    shown = tables["Robust average under each attack, accuracy in %"]
    assert [cell.endswith("*") for cell in shown[2][1:]] == [True, True]
    assert not any(cell.endswith("*") for row in (*shown[1:2], *shown[3:]) for cell in row)


def test_a_difference_without_0_is_bold():
    assert ["strong" in _signed(value) for value in ((0.2, 0.1, 0.3), (-0.2, -0.3, -0.1), (0.1, -0.1, 0.3))] == [
        True,
        True,
        False,
    ]


def test_drawings_show_every_series_with_its_intervals(monkeypatch):
    from matplotlib.axes import Axes

    drawn = []

    def errorbar(axes, x, y, yerr, xerr=None, draw=Axes.errorbar, **style):
        drawn.append((x, y, xerr, yerr))
        return draw(axes, x, y, yerr=yerr, xerr=xerr, **style)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    points = [(f"_{k}", (0.8, 0.7, 0.85), (0.4, 0.1, 0.45)) for k in range(12)]
    text = plots.frontier(points, "a < 'b'")
    assert all(f" _{k}<" in text for k in range(12))
    assert 'aria-label="a &lt; &#x27;b&#x27;"' in text
    x, y, xerr, yerr = drawn[0]
    assert (x, y) == (80.0, 40.0)
    assert torch.allclose(torch.tensor([xerr, yerr]), torch.tensor([[[10.0], [5.0]], [[30.0], [5.0]]]))
    assert len({(plots._style(k, "")["color"], plots._style(k, "")["marker"]) for k in range(64)}) == 64
    plots.curves({"d": [(0.8, 0.7, 0.85), (0.4, 0.1, 0.45)]}, [0.0, 1.0], ["clean", "1"], "over")
    assert drawn[-1][1] == [80.0, 40.0]
    assert torch.allclose(torch.tensor(drawn[-1][3]), torch.tensor([[10.0, 30.0], [5.0, 5.0]]))


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


def test_files_that_are_missing_or_damaged_are_one_line(tmp_path):
    run = finished_run(tmp_path / "run")
    strip = next(path for path in sorted((run / "overlays").iterdir()) if ".mask" not in path.name)
    whole = strip.read_bytes()
    strip.write_bytes(whole[:-40])
    with pytest.raises(InputError, match=r"overlays: .*truncated"):
        write_report(RunFolder(run))
    strip.write_bytes(whole)
    (run / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"config\.yaml: no such file or directory"):
        write_report(RunFolder(run))
    assert not (run / "report.html").exists()


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
