"""What --dry_run expects of an evaluation is what the evaluation then takes, by a clock that counts network calls."""

import re

import pytest
import torch
from conftest import GaussianDenoiser

import lit_purify as lp
from lit_purify.data import Digits, First
from lit_purify.evaluation import Evaluator, Ledger, Record, estimate
from lit_purify.evaluation.estimate import Estimate
from lit_purify.models import Classifier

DEFENSES = {
    "none": lambda d: lp.NoPurifier(),
    "uniform": lambda d: lp.UniformPurifier(d, 200, 3),
    "paper": lambda d: lp.HeterogeneousPurifier(d, mask=lp.TopFraction(0.3), high=300, low=150, steps=2),
}
ATTACKS = {
    "last": lp.PGD("linf", 0.1, steps=3, step_size=0.05, eot=3),
    "best": lp.PGD("l2", 0.5, steps=3, step_size=0.1, eot=2, select="best"),
    "apgd": lp.APGD("linf", 0.1, steps=4, eot=2),
    "fgsm": lp.FGSM("linf", 0.1),
    "cw": lp.CarliniWagnerL2(0.5, steps=3, searches=2),
    "square": lp.Square("linf", 0.1, steps=4, eot=2),
    "transfer": lp.Transfer(lp.APGD("linf", 0.1, steps=4)),
    "shift": lp.PGD("linf", 0.1, steps=3, step_size=0.05, shift_steps=2, eot=3),
}


def network():
    return torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(72, 10))


def as_classifier(of):
    return Classifier(of, size=8, num_classes=10, channels=1, blocks=["0"])


def record(defense, attack, index, label=0):
    return Record(defense, attack, index, label, [0] * 3, [0] * 3, 0.0, 0.0, 0.0)


class Setting:
    """Evaluations in batches of 4 and 1, and a clock.

    By the clock a call of the denoiser takes a second, one of a classifier a fifth; computed again is called again.
    """

    def __init__(self):
        self.now, self.rows, self.denoiser, self.others = 0.0, 0, GaussianDenoiser(size=8), []
        self.timed(self.denoiser)
        self.classifier = as_classifier(self.timed(network()))

    def timed(self, module):
        # Before: a repeated pass ends when it has what it needs.
        module.register_forward_pre_hook(self.tick)
        return module

    def tick(self, module, inputs):
        self.now += 1.0 if module is self.denoiser else 0.2
        self.rows += len(inputs[0]) * (module is self.denoiser)

    def make(self, *attacks, chunk=5, n=5, runs=3, others=None):
        gradients = {"last": lp.Surrogate(2)} if "last" in attacks else None
        defenses = {name: make(self.denoiser) for name, make in DEFENSES.items()} | (others or {})
        named = {name: ATTACKS[name] for name in attacks}
        evaluator = Evaluator(self.classifier, defenses, named, gradients, runs=runs, chunk=chunk)
        return evaluator, Digits(subset=First(n)).evaluated

    def taken(self, evaluator, data, done=()):
        """Seconds of an evaluation by the clock."""
        ledger = Ledger()
        ledger.add(done)
        self.now, self.rows = 0.0, 0
        for first in range(0, len(data), 4):
            items = [data[k] for k in range(first, min(first + 4, len(data)))]
            batch = {"image": torch.stack([item["image"] for item in items])}
            batch |= {key: torch.tensor([item[key] for item in items]) for key in ("label", "index")}
            list(evaluator.evaluate(batch, ledger))
        return self.now


@pytest.fixture
def setting(monkeypatch):
    made = Setting()
    monkeypatch.setattr(estimate, "perf_counter", lambda: made.now)
    return made


def seconds(evaluator, data, *arguments):
    return Estimate(evaluator, data, 4, *arguments).seconds


@pytest.mark.parametrize("attack", ATTACKS)
def test_expected_is_what_it_takes(setting, attack):
    """An attack on masks takes its steps on the mask besides, which are not counted as queries."""
    evaluator, data = setting.make(attack)
    expected = sum(seconds(evaluator, data).values())
    assert expected == pytest.approx(setting.taken(evaluator, data), rel=0.2 if attack == "shift" else 0.02)


def test_an_attack_on_bare_classifiers_is_made_once_for_each_of_them(setting):
    """And by the first defense of it that has something left."""
    evaluator, data = setting.make("transfer", others={"other": as_classifier(setting.timed(network()))})
    done = [record("none", "transfer", int(i), int(data.labels[i])) for i in data.positions]
    expected = sum(seconds(evaluator, data, {each.key for each in done}).values())
    assert expected == pytest.approx(setting.taken(evaluator, data, done), rel=0.02)


def test_what_is_there_costs_nothing_more(setting):
    evaluator, data = setting.make("last", "fgsm")
    whole = seconds(evaluator, data)
    done = {record(*pair, i).key for pair in evaluator.pairs for i in range(4)}
    left = Estimate(evaluator, data, 4, done | {("paper", "last", 4), ("paper", "last", 99)})
    assert left.seconds["paper", "last"] == 0.0
    # The last batch, of 1 sample, pads its chunks.
    assert 0.0 < left.seconds["uniform", "last"] < whole["uniform", "last"]
    said = str(left)
    assert "30 records, 25 of them exist already" in said
    assert re.search(r"paper +last .* done +0 s", said)


def test_processes_share_the_samples(setting):
    alone, shared = (seconds(*setting.make("fgsm"), (), world) for world in (1, 5))
    assert shared == pytest.approx(seconds(*setting.make("fgsm", n=1)))
    assert all(0.0 < shared[pair] < alone[pair] for pair in alone)


def test_a_chunk_is_suggested_that_memory_has_room_for(setting, monkeypatch):
    """By a memory of which the weights take 100 bytes, and each row of a call 7."""
    evaluator, data = setting.make("last", chunk=16, n=40)
    assert Estimate(evaluator, data, 40).largest is None
    rows = []
    evaluator.classifier.network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    monkeypatch.setattr(estimate, "reset_peak_memory", lambda device: rows.clear())
    monkeypatch.setattr(estimate, "peak_memory", lambda device: 100 + 7 * max(rows))
    # 40 samples in 3 draws or runs are 120 rows.
    for free, fits in ((10**6, 64), ((100 + 7 * 32) / 0.9, 32), ((100 + 7 * 31) / 0.9, 16), (100, 1)):
        monkeypatch.setattr(estimate, "room", lambda device, free=free: free)
        found = Estimate(evaluator, data, 40)
        assert found.largest == fits
        assert (f"chunk: {fits} instead of 16" in str(found)) == (fits != 16)
