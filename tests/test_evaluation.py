"""The evaluation as a user runs it: records, resuming, refusals, report."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT
from lightning.pytorch.callbacks import Callback
from torch import nn

from lit_purify.attacks import FGSM, PGD
from lit_purify.cli import evaluate
from lit_purify.cli.settings import evaluation_parser
from lit_purify.data import Digits
from lit_purify.defense import DefendedClassifier, NoPurifier, UniformPurifier
from lit_purify.evaluation import EvaluationListener, Evaluator, Ledger, read_records
from lit_purify.evaluation.folder import RunFolder
from lit_purify.functional.chunks import logits_in_chunks
from lit_purify.functional.noise import ATTACK, EVALUATION, KeyedNoise
from lit_purify.models import load_classifier, load_denoiser
from lit_purify.private import settings_of
from lit_purify.recorded import path_sha256

CONFIG = f"""
classifier: {ROOT}/checkpoints/digits_classifier.safetensors
denoiser: {ROOT}/checkpoints/digits_denoiser.safetensors
defenses:
  none: NoPurifier
  uniform: {{class_path: UniformPurifier, level: 200, steps: 2}}
  paper:
    class_path: HeterogeneousPurifier
    mask: {{class_path: TopFraction, fraction: 0.3}}
    high: 300
    low: 150
    steps: 2
attacks:
  pgd: {{class_path: PGD, eps: 51/255, steps: 2, step_size: 0.1, eot: 2}}
  pgd-l2: {{class_path: PGD, norm: l2, eps: 1.5, steps: 1, step_size: 1.5}}
runs: 3
chunk: 16
gallery: 2
data: {{class_path: Digits, batch_size: 4, subset: {{class_path: First, n: 6}}}}
trainer: {{logger: false}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A complete evaluation in small: three defenses, two attacks, six digits."""
    path = tmp_path_factory.mktemp("evaluation") / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def records(run):
    """Without what may differ between equal evaluations."""
    found = {}
    for record in read_records(run / "records.jsonl"):
        values = dict(vars(record), seconds=None)
        found[record.key] = values
    return found


def results(run):
    found = json.loads((run / "summary.json").read_text())["results"]
    return [{**each, "seconds": 0} for each in found]


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    evaluate(["--config", str(config), "--run", str(run)])
    return run


def test_a_run_leaves_what_the_contract_names(finished):
    found = read_records(finished / "records.jsonl")
    assert len(found) == 3 * 2 * 6
    assert {len(record.clean) for record in found} == {len(record.adversarial) for record in found} == {3}
    # Were nothing broken, the comparisons below would compare little.
    assert any(record.clean != record.adversarial for record in found if record.defense != "none")
    assert len({tuple(record.adversarial) for record in found}) > 10
    summary = json.loads((finished / "summary.json").read_text())
    assert {"schema", "dataset", "samples", "subset_sha256", "seed", "runs", "classifier"} <= set(summary)
    assert (summary["samples"], summary["runs"], summary["dataset"]) == (6, 3, "Digits")
    assert [(r["defense"], r["attack"]) for r in summary["results"]] == [
        (d, a) for d in ("none", "uniform", "paper") for a in ("pgd", "pgd-l2")
    ]
    result = summary["results"][4]
    assert (result["norm"], result["eps"], result["attack_steps"], result["eot"]) == ("linf", 0.2, 2, 2)
    assert (result["gradient"], result["nfe_defense"], result["nfe_attack"]) == ("exact", 3, 3)
    names = {path.name for path in (finished / "overlays").iterdir()}
    assert {"none.pgd.000000.png", "paper.pgd-l2.000001.png", "paper.pgd.000001.mask.png"} <= names
    assert len([n for n in names if n.endswith(".png") and not n.endswith(".mask.png")]) == 3 * 2 * 2


def test_saved_configuration_repeats_the_run_in_batches_of_another_size(finished, tmp_path):
    """Without its second attack, which is dropped by a flag, and with the clean images that the first one shares."""
    run = tmp_path / "again"
    flags = ["--data.batch_size", "9", "--attacks.pgd-l2", "null", "--defenses.uniform=null"]
    evaluate(["--config", str(finished / "config.yaml"), "--run", str(run), *flags])
    expected = {key: r for key, r in records(finished).items() if key[0] != "uniform" and key[1] == "pgd"}
    assert records(run) == expected
    assert set(yaml.safe_load((run / "config.yaml").read_text())["defenses"]) == {"none", "paper"}


def test_a_sample_alone_and_in_another_order_has_the_same_record(config, finished, tmp_path):
    (tmp_path / "indices.txt").write_text("5\n0\n")
    subset = json.dumps({"class_path": "IndexFile", "path": str(tmp_path / "indices.txt")})
    flags = ["--data.batch_size=1", f"--data.subset={subset}"]
    evaluate(["--config", str(config), "--run", str(tmp_path / "run"), *flags])
    part = records(tmp_path / "run")
    assert len(part) == 3 * 2 * 2
    assert part.items() <= records(finished).items()


def test_resuming_completes_and_changes_nothing(config, finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    lines = (run / "records.jsonl").read_text().splitlines(keepends=True)
    # As a killed run of three processes leaves it; the last line is torn in the middle of a write.
    (run / "records.jsonl").write_text("".join(lines[:5]) + lines[31][:40])
    (run / "records.rank2.jsonl").write_text("".join(lines[20:31]))
    for path in (run / "summary.json", run / "report.html", run / "overlays" / "paper.pgd.000001.png"):
        path.unlink()
    evaluate(["--config", str(config), "--run", str(run), "--data.batch_size", "3"])
    assert "resumes after 16 records" in capsys.readouterr().out
    assert records(run) == records(finished)
    assert results(run) == results(finished)
    assert {path.name for path in run.rglob("*")} == {path.name for path in finished.rglob("*")}


def test_other_settings_are_refused_in_a_used_folder(config, finished, refused, capsys):
    """At most five differences are named, those that somebody set; what it would take is said in any case."""
    before = (finished / "records.jsonl").read_bytes()
    arguments = ["--config", str(config), "--run", str(finished), "--seed", "3", "--runs", "1", "--attacks.pgd", "FGSM"]
    arguments += [f"--defenses.{name}.{key}=4" for name in ("uniform", "paper") for key in ("steps",)]
    said = refused(evaluate, *arguments, "--data.subset.n=1", "--attacks.pgd-l2.steps=3")
    assert said.count(" there, ") == 5
    assert "; 2 more)" in said
    assert "attacks.pgd: lit_purify.attacks.pgd.PGD there, lit_purify.attacks.fgsm.FGSM here" in said
    evaluate([*arguments, "--dry_run"])
    assert "its records are ignored\nDigits (test)" in (said := capsys.readouterr().out)
    assert "36 records, 0 of them exist already" in said
    assert (finished / "records.jsonl").read_bytes() == before


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


def test_the_order_of_attacks_counts_where_earlier_ones_spare_later_ones(unet, classifier):
    attacks = {"x": FGSM(), "y": FGSM("l2", 1.0)}
    for skip in (False, True):
        orders = [
            Evaluator(classifier, {"none": NoPurifier()}, {name: attacks[name] for name in names}, skip_lost=skip)
            for names in ("xy", "yx")
        ]
        assert (orders[0].identity() != orders[1].identity()) == skip


@pytest.fixture
def left(tiny):
    """A finished evaluation in small: its arguments and its folder."""
    arguments = tiny({"none": "NoPurifier"})
    evaluate(arguments)
    return arguments, RunFolder(tiny.run)


def test_records_without_their_settings_are_refused(left, refused):
    arguments, folder = left
    folder.identity.write_text("[]")
    assert "identity.json: damaged" in refused(evaluate, *arguments)
    folder.identity.unlink()
    assert "holds records, but no identity.json" in refused(evaluate, *arguments)


@pytest.mark.parametrize("line", ["[]", '{"defense": "no', '{"adversarial": ["1", "1"]', '{"adversarial": [1]'])
def test_lines_that_are_no_records_are_refused(line, left, refused):
    arguments, folder = left
    first, *others = folder.records.read_text().splitlines(keepends=True)
    changed = json.dumps({**json.loads(first), **json.loads(line + "}")}) if "adversarial" in line else line
    folder.records.write_text("".join([changed + "\n", *others]))
    assert "records.jsonl: line 1 is not a record" in refused(evaluate, *arguments)


class Lonely(Callback):
    def on_evaluated(self, trainer, task, records, views):
        pass


class Heard(Lonely, EvaluationListener):
    pass


def test_a_callback_that_would_never_be_called_is_refused(tiny, refused):
    arguments = tiny({"none": "NoPurifier"})
    said = refused(evaluate, *arguments, "--trainer.callbacks", "[test_evaluation.Lonely]")
    assert "Lonely: on_evaluated would never be called: let the class inherit" in said
    evaluate([*arguments, "--trainer.callbacks", "[test_evaluation.Heard]"])


class Odd(nn.Module):
    """A network whose logits lie in an object or a tuple."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(64, 10)

    def forward(self, image):
        logits = self.linear(image.flatten(1))
        return SimpleNamespace(logits=logits) if self.kind == "object" else (logits, None)


@pytest.mark.parametrize("flags", [[], ["--dry_run"]])
def test_outputs_that_are_no_logits_are_refused_before_anything_is_computed(flags, tiny, refused):
    """Which ones: test_classifier.py."""
    network = {"class_path": "test_evaluation.Odd", "kind": "tuple"}
    other = json.dumps({"class_path": "Classifier", "network": network, "size": 8, "num_classes": 10, "channels": 1})
    arguments = [*tiny({"none": "NoPurifier"}), "--classifier", other]
    assert "returns tuple for 1 images" in refused(evaluate, *arguments, *flags)
    assert not tiny.run.exists()
    evaluate([*arguments, "--classifier.network.kind=object"])


@pytest.mark.parametrize("command", [["test"], ["gradcheck", "--samples=1"]])
def test_what_a_run_leaves_repeats_it_elsewhere(command, left, tmp_path):
    """With every command; what is written lies in the folder of the repetition."""
    _, folder = left
    other = tmp_path / "other"
    before = sorted(path.name for path in folder.path.iterdir())
    evaluate([*command, "--config", str(folder.config), "--run", str(other)])
    assert (other / ("gradcheck.json" if len(command) > 1 else "summary.json")).exists()
    assert sorted(path.name for path in folder.path.iterdir()) == before
    # It states every setting, and defaults too.
    settings = {name.partition(".")[0] for name in settings_of(evaluation_parser())}
    assert settings - {"help", "config", "print_config", "run"} == set(yaml.safe_load(folder.config.read_text()))
    assert "save_dir: null" in folder.config.read_text() or "save_dir" not in folder.config.read_text()


def test_records_are_what_attack_and_runs_give_by_hand():
    """The attack's noise is of its own stream, and the attacked image is the one that is classified."""
    split = Digits().split("test")
    images = torch.stack([split.read(i) for i in range(6)])
    classifier = load_classifier(ROOT / "checkpoints/digits_classifier.safetensors")
    unet = load_denoiser(ROOT / "checkpoints/digits_denoiser.safetensors")
    attack = PGD("linf", 0.2, 3, 0.1, eot=2)
    purifier = UniformPurifier(unet, 200, 2)
    evaluator = Evaluator(classifier, {"uniform": purifier}, {"pgd": attack}, runs=5, chunk=8, seed=4)
    index, label = torch.arange(6) + 10, classifier(images).argmax(dim=1)
    ((records, _),) = evaluator.evaluate({"image": images, "label": label, "index": index}, Ledger())
    model, zero = DefendedClassifier(purifier, classifier), torch.zeros_like(index)
    adversarial = attack(model, images, label, KeyedNoise(4, index, zero, ATTACK), 8)
    noise = KeyedNoise(4, index, zero, EVALUATION)
    clean, broken = (
        logits_in_chunks(model.attacked(), x, noise, [0, 1, 2, 3, 4], 8).argmax(dim=2) for x in (images, adversarial)
    )
    assert [record.clean for record in records] == clean.tolist()
    assert [record.adversarial for record in records] == broken.tolist()
    assert not torch.equal(clean, broken)
