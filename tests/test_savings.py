"""Work that is left out, because what it would give is known: results are the same bit for bit with it and without."""

import pytest
import torch
from conftest import Curved, Small, keyed
from flattering import Shaken, Shown
from test_purifiers import every

import lit_purify as lp
from lit_purify.evaluation import Evaluator, Ledger, Record
from lit_purify.functional.chunks import AttackedFunction, draws_in_chunks, logits_in_chunks
from lit_purify.functional.losses import cross_entropy_loss

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


def saved(model, image, calls):
    """Asserts that nothing differs; the rows of the classifier with the savings, and without."""
    used = []
    # Of the second nothing is known but that it can be called.
    for each in (lp.Exact().attacked(model).function, AttackedFunction(model)):
        before = calls["classifier"]
        used.append((seen(each, image), calls["classifier"] - before))
    (with_, few), (without, many) = used
    assert all(torch.equal(one, other) for one, other in zip(with_, without, strict=True))
    return few, many


def test_a_deterministic_defense_is_asked_twice(classifier, images, calls):
    """Six images: of 8 runs 48 rows without, of 2 runs 12; of 4 draws 24 and of 2 draws 12; in whole chunks."""
    few, many = saved(lp.DefendedClassifier(lp.NoPurifier(), classifier), images, calls)
    assert (few, many) == (16 + 16, 48 + 32)


class Slanted(Shown):
    """The image itself; its gradient alone is drawn anew."""

    def shown(self, image, noise):
        drawn = image * noise.normal(0, image)
        return image + (drawn - drawn.detach())


@pytest.mark.parametrize("purifier", [Shaken(), Slanted()], ids=["outputs", "gradients"])
def test_a_defense_that_only_says_it_is_deterministic_is_asked_for_every_run(purifier, classifier, images, calls):
    model = lp.DefendedClassifier(purifier, classifier)
    assert model.deterministic
    saved(model, images, calls)


MASKS = {
    "top": lp.TopFraction(0.3),
    "minmax": lp.MinMaxThreshold(0.5),
    "softmax": lp.SoftmaxThreshold(0.01),
    "inverse": lp.InvertedMask(lp.TopFraction(0.3)),
    "ones": lp.FullMask(),
    "random": lp.RandomArea(lp.TopFraction(0.3)),
    "inverse of random": lp.InvertedMask(lp.RandomArea(lp.TopFraction(0.3))),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_computed_once_for_all_draws(name, unet, classifier, images, calls):
    """Six images fit a chunk: one call of the classifier for the masks instead of one for each of 3 and 2 chunks."""
    model = lp.DefendedClassifier(lp.VariableIntensityPurifier(unet, MASKS[name], 300, 150, 2), classifier)
    few, many = saved(model, images, calls)
    # Masks that are drawn differ between runs; others may not need the classifier.
    assert many - few == (3 + 2 - 1 - 1) * CHUNK * (name in ("top", "minmax", "softmax", "inverse"))
    # Handed in, the same mask gives the same bits.
    noise = keyed(6, run=2)
    assert torch.equal(model(images, noise, model.masked(images, noise)), model(images, noise))


def test_a_mask_of_another_image_is_not_taken_for_that_of_the_image(unet, classifier, images):
    """A mask is handed to its own rows, also where chunks split and pad them."""
    model = lp.DefendedClassifier(lp.VariableIntensityPurifier(unet, lp.TopFraction(0.3), 300, 150, 2), classifier)
    images = images[[0, 1, 2, 3, 4, 5, 2, 1, 0]] * torch.linspace(1.0, 0.2, 9).reshape(-1, 1, 1, 1)
    asked = []

    class Noting(lp.NoPurifier):
        mask, deterministic = model.purifier.mask, False

        def trace(self, image, noise, mask=None):
            asked.append((image.detach(), mask))
            return model.purifier.trace(image, noise, mask)

    seen(lp.DefendedClassifier(Noting(), classifier).attacked(), images)
    assert len(asked) == 5 + 3
    assert all(torch.equal(mask, lp.TopFraction(0.3)(classifier, image, None)) for image, mask in asked)


@pytest.mark.parametrize("name", ["none", "gradual", "resized", "variable", "heterogeneous-single"])
def test_activations_of_the_last_call_alone_are_kept(name, unet, classifier, images, calls):
    """The backward pass makes each call anew but the last; the gradient is that of making all anew."""
    purifier, recomputed = every(unet)[name], every(unet)[name]
    recomputed.calling = lambda last: recomputed
    leaf, mask = images.clone().requires_grad_(), lp.TopFraction(0.3)(classifier, images, None)
    (gradient,) = torch.autograd.grad(purifier(leaf, keyed(6), mask).square().sum(), leaf)
    assert calls["denoiser"] == 6 * max(0, 2 * purifier.nfe - 1)
    (other,) = torch.autograd.grad(recomputed(leaf, keyed(6), mask).square().sum(), leaf)
    assert torch.equal(gradient, other)


@pytest.fixture
def evaluated(images):
    """Evaluates three images: the records without their times, and how many rows the denoiser was called with."""
    denoiser, classifier = Curved(), Small()
    attacks = {"pgd": lp.PGD("linf", 0.1, 2, 0.1, eot=2), "fgsm": lp.FGSM("linf", 0.2), "l2": lp.FGSM("l2", 0.5)}
    attacks["transfer"] = lp.Transfer(lp.PGD("linf", 0.1, 3, 0.1))
    every = {"none": lp.NoPurifier(), "uniform": lp.UniformPurifier(denoiser, 200, 2)}
    every["map"] = lp.VariableIntensityPurifier(denoiser, lp.TopFraction(0.3), 300, 150, 2)
    batch = {"image": images[:3], "label": torch.arange(3), "index": torch.arange(3)}

    def evaluate(*names, defenses=("none", "uniform")):
        rows = [0]
        named = ({name: every[name] for name in defenses}, {name: attacks[name] for name in names})
        hook = denoiser.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
        found = list(Evaluator(classifier, *named, runs=4, chunk=16).evaluate(batch, Ledger()))
        hook.remove()
        return [{**vars(record), "seconds": 0.0} for records, _ in found for record in records], sum(rows)

    return evaluate


def test_clean_runs_are_made_once_for_all_attacks(evaluated):
    together, few = evaluated("pgd", "fgsm", "l2")
    alone = [evaluated(name) for name in ("pgd", "fgsm", "l2")]
    apart = [record for made, _ in alone for record in made]
    key = lambda record: (record["defense"], record["attack"], record["index"])  # noqa: E731
    assert sorted(together, key=key) == sorted(apart, key=key)
    # Of uniform: a chunk for the 12 clean runs, in 2 steps, under two of three attacks.
    assert sum(rows for _, rows in alone) - few == 2 * 2 * 16


def test_what_is_kept_is_of_the_same_classifier_chunk_and_sample(classifier, images):
    """Of samples some may be there already, and chunks shrink when memory runs out."""
    other, attack, kept = Small(seed=1), lp.Transfer(lp.PGD("linf", 0.1, 3, 0.1)), {}
    asked, perturb = [], attack.perturb
    attack.perturb = lambda *args: asked.append((len(args[1]), args[4])) or perturb(*args)
    evaluator = Evaluator(classifier, {"none": lp.NoPurifier(), "other": other}, {"transfer": attack}, runs=2, chunk=16)

    def some(rows):
        return {"image": images[rows], "label": torch.arange(6)[rows], "index": torch.arange(6)[rows]}

    found = [
        evaluator._perturbed(name, "transfer", some(rows), kept, chunk)
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


def test_only_an_earlier_attack_spares_a_later_one(classifier):
    """Of a run that was interrupted, the record of a later one may be there alone."""
    attacks = {"first": lp.FGSM("linf", 0.1), "second": lp.FGSM("linf", 0.1)}
    evaluator, ledger = Evaluator(classifier, {"none": lp.NoPurifier()}, attacks, runs=1, skip_lost=True), Ledger()
    ledger.add([Record("none", "second", 3, 0, [0], [1], 0.1, 0.1, 0.0)])
    assert evaluator._lost_before("none", "first", 3, ledger) is None
    ledger.add([Record("none", "first", 4, 0, [0], [1], 0.1, 0.1, 0.0, chunk=8)])
    assert evaluator._lost_before("none", "second", 4, ledger).lost_to == "first"
    # Clean runs in chunks of another size may differ by rounding.
    assert list(ledger.clean) == [("none", 3, None), ("none", 4, 8)]
