"""Several attacks: what one has broken is not attacked again, and what is reported of all of them is the same."""

from dataclasses import replace
from pathlib import Path

import pytest

import lit_purify as lp
from lit_purify.attacks import Attack
from lit_purify.data import Digits, First

WEIGHTS = Path(__file__).parent.parent / "checkpoints"
ATTACKS = {
    "strong": lp.PGD(eps=0.15, steps=3, step_size=0.08),
    "other": lp.PGD(eps=0.15, steps=1, step_size=0.08, loss="ce"),
    "wide": lp.PGD(eps=0.3, steps=1, step_size=0.08),
    "l2": lp.PGD(norm="l2", eps=0.5, steps=1, step_size=0.08),
    "third": lp.APGD(norm="linf", eps=0.15, steps=2),
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Evaluates the digits in small; also returns how many samples attacks were asked for."""
    classifier = lp.load_classifier(WEIGHTS / "digits_classifier.safetensors")
    denoiser = lp.load_denoiser(WEIGHTS / "digits_denoiser.safetensors")
    defenses = {"none": lp.NoPurifier(), "uniform": lp.UniformPurifier(denoiser, level=100, steps=1)}
    data, asked, call = Digits(subset=First(7)), [], Attack.__call__

    def spy(self, model, image, label, noise, *args, **kwargs):
        asked.extend(label.tolist())
        return call(self, model, image, label, noise, *args, **kwargs)

    monkeypatch.setattr(Attack, "__call__", spy)

    def made(name, skip_lost):
        asked.clear()
        folder = tmp_path / name
        options = {"runs": 4, "chunk": 16, "gallery": 0, "batch_size": 5, "progress": False}
        found = lp.evaluate(
            classifier, defenses, ATTACKS, data.evaluated, folder=folder, skip_lost=skip_lost, **options
        )
        ordered = sorted(found.records, key=lambda record: record.key)
        return len(asked), [replace(record, seconds=0.0) for record in ordered], found.summary["results"]

    made.folder = tmp_path
    return made


def test_what_is_lost_is_not_attacked_again_and_the_ensemble_is_the_same(run):
    all_attacked, everything, results = run("all", skip_lost=False)
    attacked, skipped, others = run("skipped", skip_lost=True)
    by_key = {record.key: record for record in everything}
    repeated = [record for record in skipped if record.lost_to is not None]
    assert repeated
    assert all_attacked == len(by_key) == 2 * 5 * 7
    assert attacked == all_attacked - len(repeated)
    names = list(ATTACKS)
    for record in skipped:
        if record.lost_to is None:
            assert record == by_key[record.key]
        else:
            # Of the same threat model, earlier, and wrong in every run.
            first = by_key[record.defense, record.lost_to, record.index]
            assert record == replace(first, attack=record.attack, lost_to=first.attack)
            assert record.label not in record.adversarial
            assert names.index(record.lost_to) < names.index(record.attack)
            assert not {"wide", "l2"} & {record.attack, record.lost_to}
    for one, other in zip(results, others, strict=True):
        if "attacks" in one:
            same = {key: value for key, value in one.items() if key not in ("seconds", "stopping", "l2", "linf")}
            assert same == {key: other[key] for key in same}
        assert "an earlier attack left wrong" in other["stopping"]
        assert "an earlier attack left wrong" not in one["stopping"]

    # Interrupted after some records, of which later ones repeat earlier ones.
    path = run.folder / "skipped/records.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:23]))
    assert run("skipped", skip_lost=True)[1] == skipped
