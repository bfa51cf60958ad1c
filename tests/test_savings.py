"""Work that is left out, because what it would give is known: results are the same bit for bit with it and without."""

import pytest
import torch
from conftest import Curved, randomized
from flattering import Shaken
from test_purifiers import every, keyed

from lit_purify.attacks import FGSM, PGD, Transfer
from lit_purify.data import Digits, First
from lit_purify.defense import (
    DefendedClassifier,
    Exact,
    Inverse,
    MinMaxThreshold,
    NoPurifier,
    Ones,
    OtherClassifier,
    RandomArea,
    SoftmaxThreshold,
    TopFraction,
    Trace,
    UniformPurifier,
    VariableIntensityPurifier,
    Zeros,
)
from lit_purify.evaluation import Record, RobustnessTask
from lit_purify.evaluation.estimate import EstimatingTrainer
from lit_purify.functional.chunks import draws_in_chunks, logits_in_chunks
from lit_purify.functional.losses import cross_entropy_loss
from lit_purify.models import ResNetClassifier

CHUNK, RUNS = 16, [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.fixture
def calls(classifier, unet):
    """Counts rows that the classifier and the denoiser are called with."""
    rows = {"classifier": 0, "denoiser": 0}

    def count(name):
        def hook(module, inputs):
            rows[name] += len(inputs[0])

        return hook

    handles = [classifier.network.register_forward_pre_hook(count("classifier"))]
    handles.append(unet.register_forward_pre_hook(count("denoiser")))
    yield rows
    for handle in handles:
        handle.remove()


def seen(model, image):
    """What an evaluation and an attack learn."""
    label, noise = torch.arange(len(image)), keyed(len(image))
    draws = draws_in_chunks(model, cross_entropy_loss, image, label, noise, RUNS[:4], CHUNK)
    return [logits_in_chunks(model, image, noise, RUNS, CHUNK), *draws]


def whole(model):
    """The same, of which nothing is known but that it can be called."""
    return lambda image, noise: model(image, noise)


def saved(model, image, calls):
    """Asserts that nothing differs; the rows of the classifier with the savings, and without."""
    used = []
    for each in (Exact().attacked(model), whole(model)):
        before = calls["classifier"]
        used.append((seen(each, image), calls["classifier"] - before))
    (with_, few), (without, many) = used
    assert all(torch.equal(one, other) for one, other in zip(with_, without, strict=True))
    return few, many


def test_a_deterministic_defense_is_asked_twice(unet, classifier, images, calls):
    """Six images: of 8 runs 48 rows without, of 2 runs 12; of 4 draws 24 and of 2 draws 12; in whole chunks."""
    few, many = saved(DefendedClassifier(NoPurifier(unet, classifier), classifier), images, calls)
    assert (few, many) == (16 + 16, 48 + 32)


def test_a_defense_that_only_says_it_is_deterministic_is_asked_for_every_run(unet, classifier, images, calls):
    model = DefendedClassifier(Shaken(unet, classifier), classifier)
    assert model.deterministic
    saved(model, images, calls)
    logits = logits_in_chunks(model, images, keyed(6), RUNS, CHUNK)
    assert len(torch.unique(logits[0, :, 0])) == len(RUNS)


class Slanted(NoPurifier):
    """The image itself; its gradient alone is drawn anew."""

    def trace(self, image, noise):
        drawn = image * noise.normal(0, image)
        return Trace(image + (drawn - drawn.detach()), image)


def test_a_defense_of_equal_outputs_and_other_gradients_is_asked_for_every_run(unet, classifier, images, calls):
    model = DefendedClassifier(Slanted(unet, classifier), classifier)
    assert model.deterministic
    saved(model, images, calls)


MASKS = {
    "top": TopFraction(0.3),
    "minmax": MinMaxThreshold(0.5),
    "softmax": SoftmaxThreshold(0.01),
    "inverse": Inverse(TopFraction(0.3)),
    "ones": Ones(),
    "zeros": Zeros(),
    "random": RandomArea(TopFraction(0.3)),
    "inverse of random": Inverse(RandomArea(TopFraction(0.3))),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_computed_once_for_all_draws(name, unet, classifier, images, calls):
    """Six images fit a chunk: one call of the classifier for the masks instead of one for each of 3 and 2 chunks."""
    purifier = VariableIntensityPurifier(unet, classifier, MASKS[name], 300, 150, 2)
    few, many = saved(DefendedClassifier(purifier, classifier), images, calls)
    # Masks that are drawn differ between runs; others may not need the classifier.
    assert many - few == (3 + 2 - 1 - 1) * CHUNK * (name in ("top", "minmax", "softmax", "inverse"))


class Elsewhere(VariableIntensityPurifier):
    """Makes its mask from another image than it is given."""

    def trace(self, image, noise):
        return super().trace(1.0 - image, noise)


def test_a_mask_of_another_image_is_not_taken_for_that_of_the_image(unet, classifier, images, calls):
    saved(DefendedClassifier(Elsewhere(unet, classifier, TopFraction(0.3), 300, 150, 2), classifier), images, calls)


@pytest.mark.parametrize("name", every(Curved(), ResNetClassifier(8, 8, 10, 1, 4)))
def test_activations_of_the_last_call_alone_are_kept(name, unet, classifier, images, calls):
    """The backward pass makes each call anew but the last; the gradient is that of making all anew."""
    purifier = every(unet, classifier)[name]
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(purifier(leaf, keyed(6)).square().sum(), leaf)
    assert calls["denoiser"] == 6 * max(0, 2 * purifier.nfe - 1)
    recomputed = every(unet, classifier)[name]
    recomputed.calling = lambda last: recomputed
    (other,) = torch.autograd.grad(recomputed(leaf, keyed(6)).square().sum(), leaf)
    assert torch.equal(gradient, other)


@pytest.fixture
def evaluated():
    """Evaluates three digits: the records without their times, and how many rows the denoiser was called with."""
    denoiser, classifier = randomized(Curved()), randomized(ResNetClassifier(8, 8, 10, 1, 4))
    attacks = {"pgd": PGD("linf", 0.1, 2, 0.1, eot=2), "fgsm": FGSM("linf", 0.2), "l2": FGSM("l2", 0.5)}
    attacks["transfer"] = Transfer(PGD("linf", 0.1, 3, 0.1))
    every = {"none": NoPurifier, "uniform": lambda d, c: UniformPurifier(d, c, 200, 2)}
    every["map"] = lambda d, c: VariableIntensityPurifier(d, c, TopFraction(0.3), 300, 150, 2)
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)

    def evaluate(*names, defenses=("none", "uniform")):
        rows, made = [0], []
        defenses = {name: every[name] for name in defenses}
        task = RobustnessTask(classifier, denoiser, defenses, {n: attacks[n] for n in names}, runs=4, chunk=16)
        note = task._note
        task._note = lambda record: (made.append({**vars(record), "seconds": 0.0}), note(record))
        hook = denoiser.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
        trainer = EstimatingTrainer(accelerator="cpu", inference_mode=False, use_distributed_sampler=False, **off)
        trainer.test(task, Digits(subset=First(3)), verbose=False)
        hook.remove()
        return made, sum(rows)

    return evaluate


def test_clean_runs_are_made_once_for_all_attacks(evaluated):
    together, few = evaluated("pgd", "fgsm", "l2")
    alone = [evaluated(name) for name in ("pgd", "fgsm", "l2")]
    apart = [record for made, _ in alone for record in made]
    key = lambda record: (record["defense"], record["attack"], record["index"])  # noqa: E731
    assert sorted(together, key=key) == sorted(apart, key=key)
    # Of uniform: a chunk for the 12 clean runs, in 2 steps, under two of three attacks.
    assert sum(rows for _, rows in alone) - few == 2 * 2 * 16


def test_an_attack_on_the_bare_classifier_is_made_once_for_all_defenses(evaluated, monkeypatch):
    asked, perturb = [], Transfer.perturb
    monkeypatch.setattr(Transfer, "perturb", lambda *args: asked.append(len(args[2])) or perturb(*args))
    names = ("none", "uniform", "map")
    together, _ = evaluated("transfer", defenses=names)
    assert asked == [3]
    assert together == [record for name in names for record in evaluated("transfer", defenses=[name])[0]]
    assert asked == 4 * [3]


def test_what_is_kept_is_of_the_same_classifier_chunk_and_sample(unet, classifier, images):
    """Of samples some may be there already, and chunks shrink when memory runs out."""
    other = randomized(ResNetClassifier(8, 8, 10, 1, 4), seed=1)
    make = {"none": NoPurifier, "other": lambda d, c: OtherClassifier(d, c, other)}
    attacks = {"transfer": Transfer(PGD("linf", 0.1, 3, 0.1))}
    asked, perturb = [], attacks["transfer"].perturb
    attacks["transfer"].perturb = lambda *args: asked.append((len(args[1]), args[4])) or perturb(*args)
    batch = {"image": images, "label": torch.arange(6), "index": torch.arange(6)}

    def task():
        return RobustnessTask(classifier, unet, make, attacks, runs=2, chunk=16, gallery=0)

    def some(rows):
        return {name: values[rows] for name, values in batch.items()}

    kept = task()
    found = [
        kept._perturbed(name, "transfer", some(rows), chunk)
        for name, rows, chunk in (
            ("none", [0, 1], 16),
            ("none", [0, 1, 2], 16),
            ("none", [1], 16),
            ("none", [1], 8),
            ("other", [1], 16),
        )
    ]
    # A batch of which one is new is attacked as a whole; the third asks for what is there.
    assert asked == [(2, 16), (3, 16), (1, 8), (1, 16)]
    assert torch.equal(found[2], found[1][1:2])
    assert not torch.equal(found[4], found[2])
    kept._evaluate_in_chunks("none", "transfer", some([0]), 16)
    records, _ = kept._evaluate_in_chunks("none", "transfer", some([0]), 8)
    assert records[0].chunk == 8
    assert {(defense, index, chunk) for defense, index, chunk in kept._clean} == {("none", 0, None), ("none", 0, 8)}


def test_only_an_earlier_attack_spares_a_later_one(unet, classifier):
    """Of a run that was interrupted, the record of a later one may be there alone."""
    attacks = {"first": FGSM("linf", 0.1), "second": FGSM("linf", 0.1)}
    task = RobustnessTask(classifier, unet, {"none": NoPurifier}, attacks, runs=1, skip_lost=True)
    task.resume([Record("none", "second", 3, 0, [0], [1], 0.1, 0.1, 0.0)], count=True)
    assert task._lost_before("none", "first", 3) is None
    task.resume([Record("none", "first", 4, 0, [0], [1], 0.1, 0.1, 0.0)], count=True)
    assert task._lost_before("none", "second", 4).lost_to == "first"
