"""What notebooks call: the same records as the command line, resumed folders, and one line for what cannot be."""

import inspect
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import WEIGHTS, Curved, GaussianDenoiser
from torch import nn
from torch.utils.data import TensorDataset

import lit_purify as lp
from lit_purify import cli
from lit_purify.data import Digits, First, ImageDataset
from lit_purify.errors import InputError
from lit_purify.evaluation import Evaluator, read_records
from lit_purify.evaluation.diagnostics import denoising

LABELS = torch.arange(6)
CONFIG = f"""
classifier: {WEIGHTS["classifier"]}
denoiser: {WEIGHTS["denoiser"]}
defenses:
  none: NoPurifier
  paper:
    class_path: HeterogeneousPurifier
    mask: {{class_path: TopFraction, fraction: 0.3}}
    high: 300
    low: 150
    steps: 2
attacks: {{pgd: {{class_path: PGD, eps: 0.15, steps: 2, eot: 2}}}}
runs: 3
chunk: 16
seed: 7
data: {{class_path: Digits, subset: {{class_path: First, n: 5}}}}
trainer: {{logger: false, accelerator: cpu}}
"""


def digits(**changes):
    """The same settings in Python."""
    defenses = {
        "none": lp.NoPurifier(),
        "paper": lp.HeterogeneousPurifier(
            lp.load_denoiser(WEIGHTS["denoiser"]), mask=lp.TopFraction(0.3), high=300, low=150, steps=2
        ),
    }
    attacks = {"pgd": lp.PGD(eps=0.15, steps=2, eot=2)}
    given = {"defenses": defenses, "attacks": attacks, "images": Digits(subset=First(5)).evaluated}
    given |= {"runs": 3, "chunk": 16, "seed": 7, "progress": False, **changes}
    return lp.evaluate(lp.load_classifier(WEIGHTS["classifier"]), **given)


def timeless(records):
    return [dict(vars(record), seconds=None) for record in records]


def untimed(summary):
    return {**summary, "results": [{**result, "seconds": None} for result in summary["results"]]}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The records that eval.py writes."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "config.yaml").write_text(CONFIG)
    cli.evaluate(["--config", str(folder / "config.yaml"), "--run", str(folder / "run")])
    return timeless(read_records(folder / "run" / "records.jsonl"))


def test_records_are_those_of_the_command_line(written):
    """Of a datamodule's split, of tensors and of pairs, in batches of any size."""
    split = Digits(subset=First(5)).evaluated
    images, labels = torch.stack([row["image"] for row in split]), torch.tensor([row["label"] for row in split])
    assert timeless(digits().records) == written
    assert timeless(digits(images=images, labels=labels, batch_size=3).records) == written
    assert timeless(digits(images=TensorDataset(images, labels)).records) == written
    # A sample is known by its position in the split, whatever else is evaluated.
    some = replace(split, positions=np.array([4, 2]))
    assert timeless(digits(images=some).records) == [record for record in written if record["index"] in (2, 4)]


class Interrupted(lp.PGD):
    """Fails in its second batch."""

    calls = 0

    def perturb(self, *args):
        Interrupted.calls += 1
        if Interrupted.calls == 3:
            raise KeyboardInterrupt
        return super().perturb(*args)


def test_a_folder_resumes_and_refuses_other_settings(written, tmp_path, monkeypatch):
    run, attacks = tmp_path / "run", {"pgd": Interrupted(eps=0.15, steps=2, eot=2)}
    monkeypatch.setattr(Interrupted, "calls", 0)
    with pytest.raises(KeyboardInterrupt):
        digits(folder=run, attacks=attacks, batch_size=2)
    assert len(read_records(run / "records.jsonl")) == 4
    result = digits(folder=run, attacks=attacks, batch_size=2)
    assert Interrupted.calls == 3 + 4
    assert timeless(result.records) == timeless(read_records(run / "records.jsonl")) == written
    assert json.loads((run / "summary.json").read_text()) == result.summary
    in_memory = digits(attacks=attacks, batch_size=2).summary
    assert untimed(in_memory) == untimed(result.summary)
    assert "<html" in (run / "report.html").read_text()
    assert len(list((run / "overlays").glob("*.pgd.00000?.png"))) == 2 * 5
    with pytest.raises(InputError) as error:
        digits(folder=run, attacks={"pgd": lp.FGSM()}, runs=4, chunk=8, seed=1, gradients={"pgd": lp.BPDA()})
    assert str(error.value).startswith(f"{run} holds a run with other settings (")
    assert str(error.value).count(" there, ") <= 5
    # What changes no record is no other setting.
    assert timeless(digits(folder=run, attacks=attacks, batch_size=5, gallery=0).records) == written


def test_editors_know_all_arguments():
    """By name and type; a path is also a string."""
    for name in set(lp.__all__) - {"Denoiser", "InputError", "NotApplicableError", "Result"}:
        for parameter in inspect.signature(getattr(lp, name)).parameters.values():
            assert parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD), name
            assert parameter.annotation not in (parameter.empty, "Any", "Path", "Path | None"), f"{name}: {parameter}"


class Theirs(nn.Module):
    """A network of somebody's own, that lies in training mode."""

    def __init__(self, classes=10, mode="tensor"):
        super().__init__()
        self.mode, self.norm, self.linear = mode, nn.BatchNorm2d(1), nn.Linear(64, classes)

    def forward(self, image):
        found = self.linear(self.norm(image).flatten(1))
        return {"tensor": found, "detached": found.detach(), "tuple": (found,)}[self.mode]


@pytest.fixture(scope="module")
def result(unet, images):
    torch.manual_seed(0)
    network = Theirs()
    other = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 10))
    defenses = {"none": lp.NoPurifier(), "uniform": lp.UniformPurifier(unet, 100, 1), "other": other}
    attacks = {"pgd": lp.PGD(eps=0.1, steps=1), "noise": lp.ForeignAttack(lambda model, x, y: x, eps=0.1, name="mine")}
    found = lp.evaluate(network, defenses, attacks, images, LABELS, runs=2, chunk=16, progress=False)
    assert not network.training
    return found


def test_any_module_is_a_classifier_or_a_defense(result):
    text = str(result)
    assert all(word in text for word in ("none", "uniform", "other", "pgd", "mine (another library)", "Theirs"))
    assert f"<pre>{text[:9]}" in result._repr_html_()
    assert repr(result) == text
    assert {row["gradient"] for row in result.summary["results"] if row["attack"] == "noise"} == {"theirs"}
    assert len(result.records) == 3 * 2 * len(LABELS)
    assert [(r.index, r.defense, r.attack) for r in result.records] == sorted(
        (r.index, r.defense, r.attack) for r in result.records
    )
    assert len(result.views) == 3 * 2 * len(LABELS)


def test_what_a_result_is_written_to(result, tmp_path):
    lines = result.to_csv().splitlines()
    assert lines[0].startswith(
        "defense,attack,norm,eps,gradient,nfe_defense,nfe_attack,clean_average,clean_average_low"
    )
    assert lines[1].startswith("none,pgd,linf,0.1,exact,0,0,")
    assert len(lines) == 1 + len(result.summary["results"])
    result.save_report(tmp_path / "report.html")
    assert "mine (another library)" in (tmp_path / "report.html").read_text()


def test_a_frame_has_a_row_for_each_result(result):
    pytest.importorskip("pandas")
    frame = result.to_frame()
    assert len(frame) == len(result.summary["results"])
    assert frame.loc[0, "robust_average"] == pytest.approx(result.summary["results"][0]["robust"]["average"][0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": None}, "labels are missing"),
        ({"labels": LABELS + 5}, "label 10 of sample 5 is outside 0 .. 9"),
        ({"labels": LABELS[:3]}, r"labels have shape \(3,\): give one for each of the 6 images"),
        ({"labels": LABELS / 2}, "labels are torch.float32: give integers"),
        ({"images": 255 * torch.ones(6, 1, 8, 8)}, r"images must be in \[0, 1\], found 255 .. 255"),
        ({"images": torch.zeros(6, 8, 8, dtype=torch.uint8)}, "give floats"),
        ({"images": torch.zeros(6, 3, 8, 8)}, r"classifier: Theirs does not take images of shape \(3, 8, 8\)"),
        ({"images": torch.zeros(6, 1, 8, 8).numpy()}, "images are ndarray: give a tensor"),
        ({"images": object()}, "give a tensor and labels, or a dataset"),
        ({"classifier": Theirs(mode="detached")}, "logits have no gradient"),
        ({"classifier": Theirs(mode="tuple")}, "Theirs gives tuple for one image"),
        ({"classifier": Theirs(classes=1), "labels": 0 * LABELS}, r"Theirs gives \(1, 1\) for one image, not logits"),
        ({"classifier": Theirs(classes=2), "labels": LABELS % 2}, "the dlr loss needs 3 classes"),
        ({"defenses": {"a": 3}}, "a is a int: use a purifier or a module that returns logits"),
        ({"defenses": {}}, "defenses is empty"),
        ({"attacks": {"pgd": 3}}, "attacks: pgd is a int: use an attack"),
        ({"baseline": "b"}, "baseline = 'b' is not among the defenses"),
        ({"runs": 0}, "runs = 0: use at least 1"),
        ({"gradients": {"b": lp.BPDA()}}, "gradients: 'b' is not among the attacks"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(changes, said, images):
    given = {"classifier": Theirs(), "defenses": {"none": lp.NoPurifier()}, "attacks": {"pgd": lp.PGD(loss="dlr")}}
    given |= {"images": images, "labels": LABELS, "progress": False, **changes}
    with pytest.raises(InputError, match=said) as error:
        lp.evaluate(**given)
    assert "\n" not in str(error.value)


def test_purified_images_are_those_of_the_purifier(classifier, unet, images):
    masked = lp.HeterogeneousPurifier(unet, mask=lp.TopFraction(0.3), high=300, low=150, steps=2)
    one, other = (lp.purify(masked, images, classifier, chunk=chunk) for chunk in (4, 16))
    assert one.purified.shape == images.shape
    assert one.mask.shape == (6, 1, 8, 8)
    assert 0 <= one.purified.min() <= one.purified.max() <= 1
    torch.testing.assert_close(one.purified, other.purified)
    assert not torch.equal(one.purified, lp.purify(masked, images, classifier, run=1).purified)
    assert lp.purify(lp.UniformPurifier(unet, 100, 1), images).mask is None
    with pytest.raises(InputError, match="mask is made from a classifier's attention: give one"):
        lp.purify(masked, images)
    for other in (images.numpy(), [0.5]):
        with pytest.raises(InputError, match=r"give a tensor, such as torch\.from_numpy"):
            lp.purify(masked, other, classifier)


def test_the_result_says_how_well_the_denoiser_denoises(classifier, images):
    """Of Gaussian pixels with mean 0.2 and variance 0.05 the optimal denoiser's error has a closed form."""
    denoiser, level = GaussianDenoiser(variance=0.05, size=8), 100
    normal = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    u = (0.2 + 0.05**0.5 * normal).clamp(-1, 1)
    data = ImageDataset.of((u + 1) / 2, torch.arange(64) % 10, [str(k) for k in range(10)])
    attacks = {"pgd": lp.PGD(eps=0.1, steps=1)}
    untrained = Curved()
    defenses = {"best": lp.UniformPurifier(denoiser, level, 1), "none": lp.UniformPurifier(untrained, level, 1)}
    found = denoising(Evaluator(classifier, defenses, attacks).defenses, data, seed=0, samples=64)
    abar = float(denoiser.schedule.at(level))
    # Var(eps | x) with a^2 = abar and v = 0.05.
    assert found["best"] == [level, pytest.approx(abar * 0.05 / (abar * 0.05 + 1 - abar), rel=0.1)]
    assert found["none"][1] > 0.8
    result = lp.evaluate(classifier, defenses, attacks, images[:2], LABELS[:2], runs=1, chunk=16, progress=False)
    assert re.search(r"warning: .*none hardly denoise these samples", str(result))


def test_what_a_first_try_gives_is_taken(classifier, unet, images, tmp_path, capsys):
    """Tensors as a pair, one attack in a mapping, a report in a new folder; steps that cannot cross eps are said."""
    attacks, given = {"pgd": lp.PGD(eps=0.1, steps=1)}, (images, LABELS)
    pair = lp.evaluate(classifier, {"none": lp.NoPurifier()}, attacks, given, runs=1, chunk=16, progress=False)
    apart = lp.evaluate(classifier, {"none": lp.NoPurifier()}, attacks, *given, runs=1, chunk=16, progress=False)
    assert [r.adversarial for r in pair.records] == [r.adversarial for r in apart.records]
    pair.save_report(tmp_path / "new" / "report.html")
    assert (tmp_path / "new" / "report.html").stat().st_size > 1000
    with pytest.raises(InputError, match="audit takes one attack, not 2"):
        lp.audit(classifier, lp.NoPurifier(), {**attacks, "other": attacks["pgd"]}, given)
    lp.PGD(eps=0.123, steps=2, step_size=0.01)
    assert "2 steps of 0.01 cannot cross eps = 0.123" in capsys.readouterr().err
