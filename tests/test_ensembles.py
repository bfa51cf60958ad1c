"""Several attacks: what one has broken is not attacked again, and what is reported of all of them is the same."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lit_purify.attacks import Attack
from lit_purify.cli import evaluate
from lit_purify.evaluation import read_records

ROOT = Path(__file__).parent.parent
PGD = {"norm": "linf", "eps": 0.15, "step_size": 0.08, "loss": "margin"}
ATTACKS = {
    "strong": {"class_path": "PGD", "init_args": {**PGD, "steps": 3}},
    "other": {"class_path": "PGD", "init_args": {**PGD, "steps": 1, "loss": "ce"}},
    "wide": {"class_path": "PGD", "init_args": {**PGD, "steps": 1, "eps": 0.3}},
    "l2": {"class_path": "PGD", "init_args": {**PGD, "steps": 1, "norm": "l2", "eps": 0.5}},
    "third": {"class_path": "APGD", "init_args": {"norm": "linf", "eps": 0.15, "steps": 2}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the digits in small: the samples that every attack was asked for, and the run's folder."""
    folder = tmp_path_factory.mktemp("ensembles")
    settings = yaml.safe_load((ROOT / "configs/eval/digits.yaml").read_text())
    arguments = settings["model"]["init_args"]
    for network in ("classifier", "denoiser"):
        arguments[network]["init_args"]["path"] = str(ROOT / arguments[network]["init_args"]["path"])
    arguments |= {"defenses": {name: arguments["defenses"][name] for name in ("none", "uniform")}}
    arguments["defenses"]["uniform"]["init_args"]["steps"] = 1
    arguments |= {"attacks": ATTACKS, "baseline": "none", "runs": 4, "chunk": 16, "gallery": 0}
    settings["data"]["init_args"] = {"batch_size": 5, "subset": {"class_path": "First", "init_args": {"n": 7}}}
    settings["trainer"] = {"logger": False, "accelerator": "cpu"}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings, sort_keys=False))

    def made(name, *flags):
        asked, call = [], Attack.__call__

        def spy(self, model, image, label, noise, chunk=64):
            asked.extend(noise.index.tolist())
            return call(self, model, image, label, noise, chunk)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Attack, "__call__", spy)
            evaluate(["--config", str(config), "--run", str(folder / name), *flags])
        return len(asked), folder / name

    return made


def results(folder):
    return json.loads((folder / "summary.json").read_text())["results"]


def lines(folder):
    return [replace(record, seconds=0.0) for record in read_records(folder / "records.jsonl")]


def test_what_is_lost_is_not_attacked_again_and_the_ensemble_is_the_same(run):
    skip = ("--model.init_args.skip_lost", "true")
    all_attacked, everything = run("all")
    attacked, skipped = run("skipped", *skip)
    by_key = {record.key: record for record in lines(everything)}
    repeated = [record for record in lines(skipped) if record.lost_to is not None]
    assert repeated
    assert all_attacked == len(by_key) == 2 * 5 * 7
    assert attacked == all_attacked - len(repeated)
    names = list(ATTACKS)
    for record in lines(skipped):
        if record.lost_to is None:
            assert record == by_key[record.key]
        else:
            # Of the same threat model, earlier, and wrong in every run.
            first = by_key[record.defense, record.lost_to, record.index]
            assert record == replace(first, attack=record.attack, lost_to=first.attack)
            assert record.label not in record.adversarial
            assert names.index(record.lost_to) < names.index(record.attack)
            assert record.attack not in ("wide", "l2")
            assert record.lost_to not in ("wide", "l2")
    for one, other in zip(results(everything), results(skipped), strict=True):
        if "attacks" in one:
            same = {key: value for key, value in one.items() if key not in ("seconds", "stopping", "l2", "linf")}
            assert same == {key: other[key] for key in same}
        assert "an earlier attack left wrong" in other["stopping"]
        assert "an earlier attack left wrong" not in one["stopping"]

    # Interrupted after some records, of which later ones repeat earlier ones.
    _, again = run("again", *skip)
    kept = (again / "records.jsonl").read_text().splitlines(keepends=True)[:23]
    (again / "records.jsonl").write_text("".join(kept))
    run("again", *skip)
    assert lines(again) == lines(skipped)
