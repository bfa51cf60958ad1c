"""Attacks and defenses of other libraries."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import keyed
from torch import nn

import lit_purify as lp
from lit_purify.attacks import PGD, ForeignAttack
from lit_purify.data import Digits
from lit_purify.defense import DefendedClassifier, ForeignDefense, UniformPurifier, defend
from lit_purify.errors import InputError
from lit_purify.evaluation import Evaluator, Ledger
from lit_purify.functional.noise import ATTACK

EPS = 0.15


@pytest.fixture(scope="module")
def digits():
    """A shipped purifier and classifier, and eight digits."""
    split = Digits().split("test")
    items = [split[k] for k in range(8)]
    classifier = lp.load_classifier("checkpoints/digits_classifier.safetensors")
    purifier = UniformPurifier(lp.load_denoiser("checkpoints/digits_denoiser.safetensors"), 100, 2)
    return classifier, purifier, torch.stack([i["image"] for i in items]), torch.tensor([i["label"] for i in items])


def official(model, images, labels):
    """The official AutoAttack, as its page calls it."""
    from pyautoattack import AutoAttack

    attack = AutoAttack(model, eps=EPS, version="custom", attacks=["apgd-ce"], seed=0)
    attack.apgd.n_iter, attack.apgd.n_restarts, attack.apgd.eot_iter = 5, 1, 2
    return attack.run_standard_evaluation(images, labels, batch_size=8)[0]


def foolbox(model, images, labels):
    library = pytest.importorskip("foolbox")
    attack = library.attacks.LinfPGD(steps=5)
    return attack(library.PyTorchModel(model, bounds=(0, 1)), images, labels, epsilons=EPS)[1]


def restoring(model, images, labels):
    """As torchattacks does: asks a parameter for the device, and restores the mode that it found."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    start = images.to(device) + EPS * (2 * torch.rand_like(images) - 1)
    leaf = start.clamp(0, 1).requires_grad_()
    nn.functional.cross_entropy(model(leaf), labels).backward()
    model.train(training)
    return (leaf.detach() + EPS * leaf.grad.sign()).clamp(images - EPS, images + EPS).clamp(0, 1).cpu().numpy()


@pytest.mark.parametrize("function", [official, foolbox, restoring])
def test_attacks_of_other_libraries_run_on_a_purifier(function, digits):
    classifier, purifier, images, labels = digits
    defended, attack = DefendedClassifier(purifier, classifier), ForeignAttack(function, "linf", EPS)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    found = attack(defended, images, labels, keyed(8, stream=ATTACK))
    # Drawn from the samples' keys, and from no state that others see.
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    torch.rand(1)
    assert torch.equal(attack(defended, images, labels, keyed(8, stream=ATTACK)), found)
    assert not torch.equal(attack(defended, images, labels, replace(keyed(8, stream=ATTACK), seed=1)), found)
    assert 0.5 * EPS < float((found - images).abs().max()) <= EPS + 1e-6
    assert (attack.gradient, attack.title) == ("theirs", f"{function.__name__} (another library)")


def test_an_attack_of_another_library_is_evaluated_like_ours(digits):
    classifier, purifier, images, labels = digits
    attacks = {"ours": PGD(eps=EPS, steps=1), "theirs": ForeignAttack(restoring, eps=EPS)}
    result = lp.evaluate(classifier, {"uniform": purifier}, attacks, images, labels, runs=2, progress=False)
    assert [row["gradient"] for row in result.summary["results"][:2]] == ["exact", "theirs"]
    assert len(result.records) == 16
    again = lp.evaluate(classifier, {"uniform": purifier}, attacks, images, labels, runs=2, progress=False)
    assert [r.adversarial for r in again.records] == [r.adversarial for r in result.records]


def test_the_attacked_module_draws_anew_at_every_call_and_takes_any_number_of_rows(digits):
    classifier, purifier, images, labels = digits
    outputs = []

    def asking(model, x, y):
        outputs.extend([model(x), model(x), model(torch.cat([x, x, x[:3]]))])
        assert isinstance(model, nn.Module)
        assert not model.training
        return x

    ForeignAttack(asking)(DefendedClassifier(purifier, classifier), images, labels, keyed(8), chunk=4)
    assert not torch.equal(outputs[0], outputs[1])
    assert outputs[2].shape == (19, 10)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda model, x, y: (x + 0.2).clamp(0, 1), r"far left the threat model \(linf <= 0.15, .* in rows \[0, 1, "),
        (lambda model, x, y: x + 2.0, "far left the threat model"),
        (lambda model, x, y: x * torch.nan, "far left the threat model"),
        (lambda model, x, y: x[:3], r"far returned \(3, 1, 8, 8\): return \(8, 1, 8, 8\), as given"),
        (lambda model, x, y: (x, x), "far returned a tuple: return images"),
    ],
)
def test_what_breaks_the_contract_is_said_in_one_line(function, message, digits):
    classifier, _, images, labels = digits
    with pytest.raises(InputError, match=message) as error:
        ForeignAttack(function, "linf", EPS, name="far")(classifier, images, labels)
    assert "\n" not in str(error.value)


class Jittered(nn.Module):
    """Somebody else's defense: adds noise from torch's generator."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier, self.dropout = classifier, nn.Dropout(0.5)

    def forward(self, x):
        return self.classifier(self.dropout(x + 0.2 * torch.randn_like(x)))


def test_a_random_module_is_a_defense_that_repeats_by_key(digits):
    classifier, purifier, images, labels = digits
    model = defend("theirs", Jittered(classifier), classifier)
    assert isinstance(model, ForeignDefense)
    state = torch.get_rng_state()
    first = model(images, keyed(8))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(images, keyed(8)), first)
    assert not torch.equal(model(images, keyed(8, run=1)), first)
    assert not torch.equal(model(images), model(images))
    attacks = {"pgd": PGD(eps=EPS, steps=3, eot=2), "theirs": ForeignAttack(restoring, eps=EPS)}
    defenses = {"uniform": purifier, "theirs": Jittered(classifier).train()}
    batch = {"image": images, "label": labels, "index": torch.arange(8)}
    found = [
        [(r.clean, r.adversarial) for records, _ in evaluator.evaluate(batch, Ledger()) for r in records]
        for evaluator in (Evaluator(classifier, defenses, attacks, runs=4) for _ in range(2))
    ]
    assert found[0] == found[1]
    assert any(len(set(clean)) > 1 or len(set(broken)) > 1 for clean, broken in found[0][16:])
    checked = lp.gradcheck(classifier, defenses, images, labels, samples=2)
    assert checked.passed, str(checked)
    assert [f.verdict for f in checked if f.defense == "theirs"] == ["not applicable", *4 * ["pass"]]
