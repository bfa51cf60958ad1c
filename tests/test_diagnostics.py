"""Fresh replicas and frozen noise: against draws by hand, where both are known, and on every page."""

import json

import flattering as zoo
import pytest
import torch
from made_runs import cells

import lit_purify as lp
from lit_purify.attacks import PGD, Square, Transfer
from lit_purify.attacks.base import single_draw
from lit_purify.cli import evaluate
from lit_purify.defense import NoPurifier
from lit_purify.evaluation import Evaluator, Ledger, Record, read_records
from lit_purify.evaluation.diagnostics import REPLICAS
from lit_purify.evaluation.estimate import network_calls
from lit_purify.functional.chunks import logits_in_chunks
from lit_purify.functional.noise import ATTACK, EVALUATION, FrozenNoise, KeyedNoise
from lit_purify.report.diagnostics import diagnosed
from lit_purify.report.html import diagnoses

EPS = 0.1


def shaken(count=12, attack=None, **arguments):
    """Under one draw a linear classifier, whose noise flips the gradient of a third of the pixels."""
    image, label, _ = zoo.samples(count, 0.05, 0.15)
    attacks = {"pgd": attack or PGD("linf", EPS, 6, 0.04, eot=4)}
    settings = {"runs": 3, "chunk": 16, "progress": False, "diagnostics": True, **arguments}
    return lp.evaluate(zoo.classifier(), {"it": zoo.defense(zoo.Shaken)}, attacks, image, label, **settings)


def test_replicas_and_frozen_noise_are_what_draws_by_hand_give():
    attack, (images, label, _) = PGD("linf", 0.1, 3, 0.05, eot=2), zoo.samples(6, 0.05, 0.15)
    defenses, index = {"it": zoo.defense(zoo.Shaken)}, torch.arange(6) + 10
    evaluator = Evaluator(zoo.classifier(), defenses, {"pgd": attack}, runs=2, chunk=8, seed=4, diagnostics=True)
    ((records, _),) = evaluator.evaluate({"image": images, "label": label, "index": index}, Ledger())
    model, zero = evaluator.defenses["it"], torch.zeros_like(index)
    adversarial = attack(model, images, label, KeyedNoise(4, index, zero, ATTACK), 8)
    logits = logits_in_chunks(model.attacked(), adversarial, KeyedNoise(4, index, zero), list(range(2, 102)), 8)
    averaged = torch.stack([logits[:, :n].double().mean(dim=1).argmax(dim=1) for n in (1, 10, 30, 50, 100)], dim=1)
    assert [record.replicas for record in records] == logits.argmax(dim=2).tolist()
    assert [record.averaged for record in records] == averaged.tolist()
    assert any(len(set(record.replicas)) > 1 for record in records)
    noise = FrozenNoise(4, index, zero, EVALUATION)
    known = PGD("linf", 0.1, 3, 0.05, eot=1)(model, images, label, noise, 8)
    expected = model(known, KeyedNoise(4, index, zero, EVALUATION)).argmax(dim=1)
    assert [record.frozen for record in records] == expected.tolist()


def test_records_without_diagnostics_stay_as_they_were():
    plain, looked = shaken(diagnostics=False), shaken()
    assert all(record.replicas is record.averaged is record.frozen is None for record in plain.records)
    assert "frozen" not in plain.records[0].line()
    assert "diagnostics" not in plain.identity
    assert [r.adversarial for r in plain.records] == [r.adversarial for r in looked.records]
    assert looked.identity["diagnostics"]


def test_what_randomness_alone_defends_is_lost_under_frozen_noise():
    """Of m_i above eps nothing can take a sample whose noise is known to be 1: here some draws shrink the contrast."""
    entry = shaken(attack=PGD("linf", EPS, 2, 0.1, eot=1)).summary["results"][0]
    assert entry["frozen"][0] < entry["robust"]["average"][0] - 0.1
    assert [row[0] for row in entry["replicas"]["vote"]] == list(REPLICAS)
    # A single replica decides alone.
    assert entry["replicas"]["vote"][0] == entry["replicas"]["averaged"][0]


def test_they_do_not_depend_on_batches_or_an_interruption(tmp_path):
    whole = shaken(count=6)
    again = shaken(count=6, batch_size=4, folder=tmp_path)
    strip = [{**vars(record), "seconds": 0} for record in whole.records]
    assert [{**vars(record), "seconds": 0} for record in again.records] == strip
    lines = (tmp_path / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_text("".join(lines[:3]))
    resumed = shaken(count=6, folder=tmp_path)
    assert [{**vars(record), "seconds": 0} for record in resumed.records] == strip
    assert [record.frozen for record in read_records(tmp_path / "records.jsonl")] == [r.frozen for r in whole.records]


def test_attacks_still_choose_at_random_under_frozen_noise():
    """Square breaks every margin far below eps, unless all its proposals are one square."""
    image, label, _ = zoo.samples(6, 0.02, 0.03)
    attack = {"square": Square("linf", EPS, 150, p=0.3)}
    result = lp.evaluate(
        zoo.classifier(), NoPurifier(), attack, image, label, runs=2, progress=False, diagnostics=True
    ).summary["results"][0]
    assert result["robust"]["average"][0] == result["frozen"][0] == 0.0


def test_an_attack_on_the_bare_classifier_knows_no_noise():
    attack = Transfer(PGD("linf", EPS, 3, 0.05))
    result = shaken(attack=attack)
    for record in result.records:
        assert record.frozen == record.adversarial[0]
    assert single_draw(attack) is attack


def test_the_vote_of_replicas_and_its_share_by_hand():
    """Of one sample 4 of the first 10 draws are right, and 6 of them for one other class: lost; a tie is lost."""

    def record(right, averaged, frozen):
        replicas = [1] * right + [2] * (10 - right) + [1] * 90
        return Record("d", "a", 0, 1, [1], [1], 0, 0, 0, replicas=replicas, averaged=averaged, frozen=frozen)

    found = diagnosed([record(4, [1, 2, 1, 1, 1], 2), record(6, [1, 1, 1, 1, 1], 1)])
    assert [row[:2] for row in found["replicas"]["vote"]] == [[1, 1.0], [10, 0.5], [30, 1.0], [50, 1.0], [100, 1.0]]
    assert [row[1] for row in found["replicas"]["averaged"]] == [1.0, 0.5, 1.0, 1.0, 1.0]
    assert found["frozen"][0] == 0.5
    assert diagnosed([Record("d", "a", 0, 1, [1], [1], 0, 0, 0)]) == {}


def test_calls_of_a_dry_run_count_the_looks():
    described = shaken().summary["results"][0] | {"nfe_defense": 5, "nfe_attack": 5, "evaluations": 1}
    asked = (6 * 4 + 6) * 5
    assert network_calls(described, 3) == (asked + (3 + 101) * 5, asked)


def test_pages_and_tables_show_both(tiny, capsys):
    purifier = {"class_path": "UniformPurifier", "level": 20, "steps": 1}
    evaluate([*tiny({"it": purifier, "none": "NoPurifier"}), "--diagnostics", "true"])
    printed, page = capsys.readouterr().out, (tiny.run / "report.html").read_text()
    entry = json.loads((tiny.run / "summary.json").read_text())["results"][0]
    pairs = zip(entry["replicas"]["averaged"], entry["replicas"]["vote"], strict=True)
    row = " ".join(f"{f'{100 * a[1]:.1f} / {100 * b[1]:.1f}':>11}" for a, b in pairs)
    assert f"it          {row}  {100 * entry['frozen'][0]:6.1f}" in printed
    shown = cells(page)["Fresh replicas and frozen noise under pgd, robust accuracy in %"]
    assert shown[0] == ["defense", "replicas decide by", *map(str, REPLICAS), "frozen noise"]
    assert [line[:2] for line in shown[1:]] == [
        [name, way] for name in ("it", "none") for way in ("averaged logits", "vote")
    ]
    assert shown[1][2].startswith(f"{100 * entry['replicas']['averaged'][0][1]:.1f} ")
    assert page.count("<figure><svg") == 3
    assert "fresh replicas</text>" in page


def test_a_drawing_of_replicas_has_its_lines_in_place():
    rows = [[count, 0.4 + k / 10, 0.32 + k / 10, 0.48 + k / 10] for k, count in enumerate(REPLICAS)]
    result = {"defense": "it", "frozen": [0.2, 0.1, 0.3], "robust": {"average": [0.5, 0.4, 0.6]}}
    replicas, frozen = diagnoses([{**result, "replicas": {"averaged": rows, "vote": rows[::-1]}}])
    assert replicas["x"] == [(50, "1"), (150, "10"), (250, "30"), (350, "50"), (450, "100")]
    # From 30 to 90 %: 5 pixels a point.
    assert replicas["lines"][0] == ("50,260.0 150,210.0 250,160.0 350,110.0 450,60.0", "var(--series-0)", False)
    assert replicas["lines"][1][2]
    assert frozen["marks"][0]["title"] == "it: frozen noise 20.0 %, fresh noise 50.0 %"
    assert pytest.approx(frozen["marks"][0]["at"]) == (250, 160)
