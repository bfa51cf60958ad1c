"""What --dry_run expects of an evaluation is what the evaluation then takes, by a clock that counts network calls."""

import re

import pytest
import torch
from conftest import GaussianDenoiser

from lit_purify.attacks import APGD, FGSM, PGD, CarliniWagnerL2, MaskShift, Square, Transfer
from lit_purify.data import Digits, First
from lit_purify.defense import (
    HeterogeneousPurifier,
    NoPurifier,
    OtherClassifier,
    Surrogate,
    TopFraction,
    UniformPurifier,
)
from lit_purify.evaluation import Record, RobustnessTask, estimate
from lit_purify.evaluation.estimate import EstimatingTrainer, duration, network_calls
from lit_purify.models import Classifier

DEFENSES = {
    "none": NoPurifier,
    "uniform": lambda d, c: UniformPurifier(d, c, 200, 3),
    "paper": lambda d, c: HeterogeneousPurifier(d, c, TopFraction(0.3), 300, 150, 2),
}
ATTACKS = {
    "last": PGD("linf", 0.1, steps=3, step_size=0.05, eot=3),
    "best": PGD("l2", 0.5, steps=3, step_size=0.1, eot=2, select="best"),
    "apgd": APGD("linf", 0.1, steps=4, eot=2),
    "fgsm": FGSM("linf", 0.1),
    "cw": CarliniWagnerL2(0.5, steps=3, searches=2),
    "square": Square("linf", 0.1, steps=4, eot=2),
    "transfer": Transfer(APGD("linf", 0.1, steps=4)),
}
SHIFT = MaskShift("linf", 0.1, steps=3, step_size=0.05, shift_steps=2, eot=3)


@pytest.fixture
def setting(monkeypatch):
    """Makes an evaluation in batches of 4 and 1, its trainer and data, and a clock.

    By the clock a call of the denoiser takes a second, one of the classifier a fifth; computed anew is called anew.
    """
    denoiser = GaussianDenoiser(size=8)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(72, 10))
    classifier = Classifier(network, size=8, num_classes=10, channels=1, blocks=["0"])
    clock = {"now": 0.0, "rows": 0}

    def tick(module, inputs):
        clock["now"] += 1.0 if module is denoiser else 0.2
        clock["rows"] += len(inputs[0]) * (module is denoiser)

    for module in (denoiser, network):
        # Before: a repeated pass ends when it has what it needs.
        module.register_forward_pre_hook(tick)
    monkeypatch.setattr(estimate, "perf_counter", lambda: clock["now"])

    def make(*attacks, chunk=5, n=5, runs=3):
        gradients = {"last": Surrogate(2)} if "last" in attacks else None
        named = {name: ATTACKS[name] for name in attacks}
        task = RobustnessTask(
            classifier, denoiser, DEFENSES, named, runs=runs, chunk=chunk, gallery=0, gradients=gradients
        )
        off = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)
        trainer = EstimatingTrainer(accelerator="cpu", inference_mode=False, use_distributed_sampler=False, **off)
        return task, trainer, Digits(batch_size=4, subset=First(n))

    return make, clock


@pytest.mark.parametrize("attack", ATTACKS)
def test_expected_is_what_it_takes(setting, attack):
    make, clock = setting
    task, trainer, data = make(attack)
    expected = sum(trainer.estimate(task, data).values())
    clock["now"] = 0.0
    trainer.test(task, data, verbose=False)
    assert expected == pytest.approx(clock["now"], rel=0.02)


def test_an_attack_on_bare_classifiers_is_made_once_for_each_of_them(setting, monkeypatch):
    """And by the first defense of it that has something left."""
    make, clock = setting
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(72, 10))
    network.register_forward_pre_hook(lambda *_: clock.update(now=clock["now"] + 0.2))
    other = Classifier(network, size=8, num_classes=10, channels=1, blocks=["0"])
    monkeypatch.setitem(DEFENSES, "other", lambda d, c: OtherClassifier(d, c, other))
    task, trainer, data = make("transfer")
    trainer.records = [
        Record("none", "transfer", i, int(data.evaluated[i]["label"]), [0] * 3, [0] * 3, 0.0, 0.0, 0.0)
        for i in range(5)
    ]
    expected = sum(trainer.estimate(task, data).values())
    task.resume(trainer.records, count=True)
    clock["now"] = 0.0
    trainer.test(task, data, verbose=False)
    assert expected == pytest.approx(clock["now"], rel=0.02)


def test_an_attack_on_masks_is_measured_through_its_view(setting, monkeypatch):
    """Its steps on the mask call the classifier alone; they are not counted as queries, only timed with the others."""
    make, clock = setting
    monkeypatch.setitem(ATTACKS, "shift", SHIFT)
    task, trainer, data = make("shift")
    expected = sum(trainer.estimate(task, data).values())
    clock["now"] = 0.0
    trainer.test(task, data, verbose=False)
    assert expected == pytest.approx(clock["now"], rel=0.2)


def test_what_is_there_costs_nothing_more(setting, capsys):
    make, _ = setting
    task, trainer, data = make("last", "fgsm")

    def record(defense, attack, index):
        return Record(defense, attack, index, 0, [0], [0], 0.0, 0.0, 0.0)

    whole = trainer.estimate(task, data)
    trainer.records = [
        *(record(*pair, i) for pair in task.pairs for i in range(4)),
        *(record("paper", "last", i) for i in range(4, 5)),
        record("paper", "last", 99),
    ]
    capsys.readouterr()
    left = trainer.estimate(task, data)
    assert left["paper", "last"] == 0.0
    # The last batch, of 1 sample, pads its chunks.
    assert 0.0 < left["uniform", "last"] < whole["uniform", "last"]
    said = capsys.readouterr().out
    assert "30 records, 25 of them there already" in said
    assert re.search(r"paper +last .* done +0 s", said)


def test_processes_share_the_samples(setting, monkeypatch):
    make, _ = setting
    task, trainer, data = make("fgsm")
    alone = trainer.estimate(task, data)
    monkeypatch.setattr(EstimatingTrainer, "world_size", 5)
    shared = trainer.estimate(task, data)
    task, trainer, data = make("fgsm", n=1)
    monkeypatch.setattr(EstimatingTrainer, "world_size", 1)
    assert shared == pytest.approx(trainer.estimate(task, data))
    assert all(0.0 < shared[pair] < alone[pair] for pair in alone)


@pytest.mark.parametrize("attack", ["last", "best", "square"])
def test_network_calls_are_those_that_are_made(setting, attack):
    """One sample, one row a chunk: nothing is padded. What is differentiated is called twice, but for the last step."""
    make, clock = setting
    task, trainer, data = make(attack, chunk=1, n=1)
    described = task.describe()
    said = [network_calls(each, task.runs) for each in described]
    kept = sum(each["queries"]["backward"] for each in described if each["nfe_attack"])
    trainer.test(task, data, verbose=False)
    assert clock["rows"] == sum(forward + backward for forward, backward in said) - kept


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7380, "2 h 3 min"), (200000, "2 d 7 h")],
)
def test_duration(seconds, said):
    assert duration(seconds) == said
