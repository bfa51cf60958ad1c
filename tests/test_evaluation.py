"""The evaluation as a user runs it: records, resuming, processes, report."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lit_purify.cli import evaluate
from lit_purify.evaluation import RobustAccuracy, read_records
from lit_purify.evaluation.folder import RunFolder, identify, path_sha256
from lit_purify.functional.statistics import outcomes
from lit_purify.report.html import write_report

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A complete evaluation in small: three defenses, two attacks, nine digits."""
    folder = tmp_path_factory.mktemp("evaluation")
    weights = ROOT / "checkpoints"
    mask = {"class_path": "TopFraction", "init_args": {"fraction": 0.3}}
    heterogeneous = {"mask": mask, "high": 300, "low": 150, "steps": 2}
    settings = {
        "model": {
            "class_path": "RobustnessTask",
            "init_args": {
                "classifier": {
                    "class_path": "lit_purify.models.load_classifier",
                    "init_args": {"path": str(weights / "digits_classifier.safetensors")},
                },
                "denoiser": {
                    "class_path": "lit_purify.models.load_denoiser",
                    "init_args": {"path": str(weights / "digits_denoiser.safetensors")},
                },
                "defenses": {
                    "none": {"class_path": "NoPurifier"},
                    "uniform": {"class_path": "UniformPurifier", "init_args": {"level": 200, "steps": 2}},
                    "paper": {"class_path": "HeterogeneousPurifier", "init_args": heterogeneous},
                },
                "attacks": {
                    "pgd": {
                        "class_path": "PGD",
                        "init_args": {"norm": "linf", "eps": "51/255", "steps": 2, "step_size": 0.1, "eot": 2},
                    },
                    "pgd-l2": {
                        "class_path": "PGD",
                        "init_args": {"norm": "l2", "eps": 1.5, "steps": 1, "step_size": 1.5},
                    },
                },
                "runs": 3,
                "chunk": 16,
                "gallery": 2,
            },
        },
        "data": {
            "class_path": "Digits",
            "init_args": {"batch_size": 4, "subset": {"class_path": "First", "init_args": {"n": 9}}},
        },
        "trainer": {"logger": False},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def records(run):
    """Without what may differ between equal evaluations."""
    found = {}
    for record in read_records(run / "records.jsonl"):
        values = dict(vars(record), seconds=None)
        found[record.key] = values
    return found


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    evaluate(["--config", str(config), "--run", str(run)])
    return run


def test_a_run_leaves_what_the_contract_names(finished):
    found = read_records(finished / "records.jsonl")
    assert len(found) == 3 * 2 * 9
    assert {len(record.clean) for record in found} == {len(record.adversarial) for record in found} == {3}
    # Were nothing broken, the comparisons below would compare little.
    assert any(record.clean != record.adversarial for record in found if record.defense != "none")
    assert len({tuple(record.adversarial) for record in found}) > 10
    summary = json.loads((finished / "summary.json").read_text())
    assert {"schema", "dataset", "samples", "subset_sha256", "seed", "runs", "classifier"} <= set(summary)
    assert (summary["samples"], summary["runs"], summary["dataset"]) == (9, 3, "Digits")
    assert [(r["defense"], r["attack"]) for r in summary["results"]] == [
        (d, a) for d in ("none", "uniform", "paper") for a in ("pgd", "pgd-l2")
    ]
    result = summary["results"][4]
    assert (result["norm"], result["eps"], result["attack_steps"], result["eot"]) == ("linf", 0.2, 2, 2)
    assert (result["gradient"], result["nfe_defense"], result["nfe_attack"]) == ("exact", 3, 3)
    names = {path.name for path in (finished / "overlays").iterdir()}
    assert {"none.pgd.000000.png", "paper.pgd-l2.000001.png", "paper.pgd.000001.mask.png"} <= names
    assert len([n for n in names if n.endswith(".png") and not n.endswith(".mask.png")]) == 3 * 2 * 2


def test_summary_follows_from_the_records(finished):
    summary = json.loads((finished / "summary.json").read_text())
    for result in summary["results"]:
        group = [
            r
            for r in read_records(finished / "records.jsonl")
            if (r.defense, r.attack) == (result["defense"], result["attack"])
        ]
        metric = RobustAccuracy(3)
        for record in group:
            metric.update(torch.tensor([record.adversarial]), torch.tensor([record.label]))
        for rule in ("average", "worst", "majority"):
            value, low, high = result["robust"][rule]
            assert value == pytest.approx(getattr(metric.compute(), rule).value)
            assert low <= value <= high
        if result["defense"] != "none":
            first = [
                r
                for r in read_records(finished / "records.jsonl")
                if (r.defense, r.attack) == ("none", result["attack"])
            ]
            shares = [
                outcomes(torch.tensor([r.adversarial for r in rs]), torch.tensor([r.label for r in rs]))[:, 0].mean()
                for rs in (group, first)
            ]
            assert result["robust_difference"]["average"][0] == pytest.approx(float(shares[0] - shares[1]))


def test_report_is_one_file_that_needs_nothing_else(finished):
    text = (finished / "report.html").read_text()
    # Four panels of each picture, and the masks of one defense.
    assert text.count("data:image/webp;base64,") == 12 * 4 + 4
    assert "<svg" in text
    links = re.findall(r"(?:src|href)=['\"]([^'\"]+)", text)
    assert all(link.startswith(("data:", "#")) for link in links)
    for name in ("none", "uniform", "paper", "pgd-l2"):
        assert name in text


@pytest.mark.parametrize("changed", [False, True])
def test_report_shows_a_verdict_that_came_later(config, finished, tmp_path, changed):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    evaluate(["gradcheck", "--config", str(config), "--run", str(run), "--samples", "1"])
    if changed:
        identity = json.loads((run / "identity.json").read_text())
        (run / "identity.json").write_text(json.dumps({**identity, "model.init_args.seed": 1}))
        write_report(RunFolder(run))
    assert ("stale: passed on 1 sample, for other settings" in (run / "report.html").read_text()) == changed
    assert '<span class="badge survived">passed on 1 sample</span>' in (run / "report.html").read_text() or changed


def test_saved_configuration_repeats_the_run(finished, tmp_path):
    evaluate(["--config", str(finished / "config.yaml"), "--run", str(tmp_path / "again")])
    assert records(tmp_path / "again") == records(finished)


@pytest.mark.parametrize("batch", [1, 9])
def test_records_do_not_depend_on_the_loaders_batch(config, finished, tmp_path, batch):
    evaluate(["--config", str(config), "--run", str(tmp_path / "run"), "--data.init_args.batch_size", str(batch)])
    assert records(tmp_path / "run") == records(finished)


def test_a_sample_alone_and_in_another_order_has_the_same_record(config, finished, tmp_path):
    (tmp_path / "indices.txt").write_text("7\n0\n3\n")
    subset = {"class_path": "IndexFile", "init_args": {"path": str(tmp_path / "indices.txt")}}
    evaluate(["--config", str(config), "--run", str(tmp_path / "run"), f"--data.init_args.subset={json.dumps(subset)}"])
    part = records(tmp_path / "run")
    assert len(part) == 3 * 2 * 3
    assert part.items() <= records(finished).items()


def test_resuming_completes_and_changes_nothing(config, finished, tmp_path, capsys):
    run = tmp_path / "run"
    evaluate(["--config", str(config), "--run", str(run)])
    lines = (run / "records.jsonl").read_text().splitlines(keepends=True)
    kept = lines[:5] + lines[20:31]
    # The last line is torn, as after a kill in the middle of a write.
    (run / "records.jsonl").write_text("".join(kept) + lines[31][:40])
    (run / "summary.json").unlink()
    before = json.loads((finished / "summary.json").read_text())
    evaluate(["--config", str(config), "--run", str(run), "--data.init_args.batch_size", "3"])
    assert f"goes on after {len(kept)} records" in capsys.readouterr().out
    assert records(run) == records(finished)
    after = json.loads((run / "summary.json").read_text())
    for one, other in zip(before["results"], after["results"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_other_settings_are_refused_in_a_used_folder(config, finished, capsys):
    before = (finished / "records.jsonl").read_bytes()
    with pytest.raises(SystemExit) as exit_:
        evaluate(
            ["--config", str(config), "--run", str(finished), "--model.init_args.attacks.pgd.init_args.steps", "3"]
        )
    assert exit_.value.code == 2
    assert "attacks.pgd.init_args.steps: 2 there, 3 here" in capsys.readouterr().err
    assert (finished / "records.jsonl").read_bytes() == before


def test_eps_so_small_that_nothing_changes_leaves_clean_and_robust_equal(config, tmp_path):
    """Clean and adversarial images are classified with the same noise."""
    run = tmp_path / "run"
    steps = [f"--model.init_args.attacks.{name}.init_args.eps=1e-12" for name in ("pgd", "pgd-l2")]
    evaluate(["--config", str(config), "--run", str(run), *steps])
    assert all(record.clean == record.adversarial for record in read_records(run / "records.jsonl"))


def test_processes_do_not_change_the_result(config, finished, tmp_path):
    """Through Lightning's own launcher; test_distributed.py has more of them."""
    run = tmp_path / "run"
    command = [sys.executable, str(ROOT / "eval.py"), "--config", str(config), "--run", str(run)]
    command += ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == f"Report: {run / 'report.html'}"
    assert records(run) == records(finished)
    ours, theirs = (json.loads((r / "summary.json").read_text())["results"] for r in (run, finished))
    for one, other in zip(ours, theirs, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert not list(run.glob("records.rank*"))


def test_files_are_known_wherever_they_are_named(tmp_path):
    (tmp_path / "a").write_text("1")
    named = {"class_path": "load_classifier", "init_args": {"path": str(tmp_path / "a")}}
    settings = {"model": {"init_args": {"defenses": {"d": {"rules": [{"network": named}, {"tau": [1, 2]}]}}}}}
    before = identify(settings)
    assert before["model.init_args.defenses.d.rules.1.tau"] == [1, 2]
    (tmp_path / "a").write_text("2")
    changed = {key for key, value in identify(settings).items() if before[key] != value}
    assert changed == {"model.init_args.defenses.d.rules.0.network.init_args.path (sha256)"}


def test_a_folder_is_known_by_all_its_files(tmp_path):
    """Also by images, such as adversarial ones that an attack shows."""
    folder = tmp_path / "images"
    (folder / "0").mkdir(parents=True)
    hashes = [path_sha256(folder)]
    for name, content in (("0/a.png", b"1"), ("0/a.png", b"2"), ("b.npy", b"2")):
        (folder / name).write_bytes(content)
        hashes.append(path_sha256(folder))
    (folder / "b.npy").rename(folder / "0" / "b.npy")
    hashes.append(path_sha256(folder))
    assert len(set(hashes)) == 5


@pytest.fixture
def left(tiny):
    """A finished evaluation in small: its arguments and its folder."""
    arguments = tiny({"none": {"class_path": "NoPurifier"}})
    evaluate(arguments)
    return arguments, RunFolder(tiny.run)


def refused(arguments, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        evaluate(arguments)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_records_without_their_settings_are_refused(left, capsys):
    arguments, folder = left
    folder.identity.write_text("[]")
    assert "identity.json: damaged" in refused(arguments, capsys)
    folder.identity.unlink()
    assert "holds records, but no identity.json" in refused(arguments, capsys)


@pytest.mark.parametrize("line", ["[]", '{"adversarial": ["1", "1"]', '{"adversarial": [1]'])
def test_lines_that_are_no_records_are_refused(line, left, capsys):
    arguments, folder = left
    first, *others = folder.records.read_text().splitlines(keepends=True)
    changed = line if line == "[]" else json.dumps({**json.loads(first), **json.loads(line + "}")})
    folder.records.write_text("".join([changed + "\n", *others]))
    assert "records.jsonl: line 1 is not a record" in refused(arguments, capsys)


def test_weights_come_from_the_configuration_alone(left, tmp_path, capsys):
    arguments, _ = left
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    assert "ckpt_path: an evaluation has" in refused([*arguments, f"--ckpt_path={tmp_path}/other.ckpt"], capsys)


def test_samples_that_were_left_out_are_missed(tiny, capsys):
    arguments = [*tiny({"none": {"class_path": "NoPurifier"}}), "--data.init_args.batch_size=1"]
    said = refused([*arguments, "--trainer.limit_test_batches=2"], capsys)
    assert "1 of 3 records are missing" in said
    evaluate(arguments)
    assert json.loads((tiny.run / "summary.json").read_text())["samples"] == 3


def test_the_order_of_attacks_counts_where_earlier_ones_spare_later_ones():
    for skip in (False, True):
        orders = [
            {"model": {"init_args": {"skip_lost": skip, "attacks": {name: {"a": 1} for name in names}}}}
            for names in ("xy", "yx")
        ]
        assert (identify(orders[0]) != identify(orders[1])) == skip


@pytest.mark.parametrize("command", [["test"], ["gradcheck", "--samples=1"]])
def test_what_a_run_leaves_repeats_it_elsewhere(command, left, tmp_path):
    """With every command; what is written lies in the folder of the repetition."""
    _, folder = left
    other = tmp_path / "other"
    before = sorted(path.name for path in folder.path.iterdir())
    evaluate([*command, "--config", str(folder.config), "--run", str(other)])
    assert (other / ("gradcheck.json" if len(command) > 1 else "summary.json")).exists()
    assert sorted(path.name for path in folder.path.iterdir()) == before
    assert "save_dir: null" in folder.config.read_text() or "save_dir" not in folder.config.read_text()
