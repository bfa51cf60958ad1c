"""What attacks differentiate: closed forms, finite differences, and that a broken defense is found out."""

import copy
import json
from itertools import pairwise

import flattering as zoo
import pytest
import torch
from conftest import Curved, FixedNoise, GaussianDenoiser, keyed
from torch.utils.checkpoint import checkpoint

import lit_purify as lp
from lit_purify.cli import evaluate
from lit_purify.defense.masks import RelaxedMask
from lit_purify.errors import InputError
from lit_purify.evaluation import Evaluator, Ledger
from lit_purify.functional import mask as F
from lit_purify.functional.noise import ATTACK
from lit_purify.functional.schedule import Schedule, grid

RULES = [
    lp.MinMaxThreshold(0.4),
    lp.SoftmaxThreshold(0.02),
    lp.TopFraction(0.3),
    lp.InvertedMask(lp.MinMaxThreshold(0.4)),
    lp.ShiftedMask(lp.MinMaxThreshold(0.4)),
]


def gradient(function, image):
    leaf = image.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return found


def agrees(found, function, image, step=1e-6):
    """Compares a gradient with the central difference along a random direction."""
    direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(5), dtype=image.dtype)
    with torch.no_grad():
        high, low = (function(image + sign * step * direction).sum() for sign in (1, -1))
    return float((high - low) / (2 * step)) == pytest.approx(float((found * direction).sum()), rel=1e-5)


class Given(lp.Mask):
    """The mask that a function of the image gives."""

    def __init__(self, function):
        self.function = function

    def __call__(self, classifier, image, noise):
        return self.function(image)

    build = __call__


@pytest.fixture(scope="module")
def classifier64(classifier):
    return copy.deepcopy(classifier).double()


@pytest.fixture(scope="module")
def gray():
    """Mid-gray, so that the final clipping leaves every pixel differentiable."""
    return 0.4 + 0.2 * torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


# Closed forms: on Gaussian data with the optimal denoiser every purifier is linear in each pixel.

ABAR = Schedule.linear().abar.tolist()
VARIANCE = 0.02


def ddim_slope(t, s):
    a, b = ABAR[t], ABAR[s]
    return ((a * b) ** 0.5 * VARIANCE + ((1 - a) * (1 - b)) ** 0.5) / (a * VARIANCE + 1 - a)


def ddpm_slope(t, s):
    """Through the posterior of x_s given x_t and the expected clean image (Ho et al. 2020, eq. 7)."""
    a, b = ABAR[t], ABAR[s]
    of_clean, of_noised = b**0.5 * (1 - a / b) / (1 - a), (a / b) ** 0.5 * (1 - b) / (1 - a)
    return of_noised + of_clean * a**0.5 * VARIANCE / (a * VARIANCE + 1 - a)


def walked(slope, levels):
    out = ABAR[levels[0]] ** 0.5
    for t, s in pairwise(levels):
        out *= slope(t, s)
    return out


def mended(t, jump):
    return (ABAR[t + jump] / ABAR[t]) ** 0.5 * ddim_slope(t + jump, t)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "paper", "release", "variable"])
def test_gradient_on_gaussian_data_follows_the_closed_form(name, recompute, gray):
    denoiser, on = GaussianDenoiser(mean=0.0, variance=VARIANCE, size=8), torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    on[..., :4] = 1.0
    if name in ("ddim", "ddpm"):
        purifier = lp.UniformPurifier(denoiser, 300, 5, name, recompute)
        inside = outside = walked(ddim_slope if name == "ddim" else ddpm_slope, grid(300, 0, 5))
    elif name == "variable":
        purifier = lp.VariableIntensityPurifier(denoiser, lp.FullMask(), 300, 90, 4, recompute)
        inside, outside = (walked(ddim_slope, grid(t, 0, 4)) for t in (300, 90))
    else:
        kind = {"paper": "single", "release": "release"}[name]
        purifier = lp.HeterogeneousPurifier(denoiser, lp.FullMask(), 300, 150, 4, kind, 20, recompute=recompute)
        below = ddim_slope(150, 75) * ddim_slope(75, 0)
        if name == "paper":
            at_low = mended(150, 20) * below
            inside = ABAR[300] ** 0.5 * ddim_slope(300, 225) * mended(225, 20) * ddim_slope(225, 150) * at_low
            outside = ABAR[150] ** 0.5 * at_low
        else:
            forth = {t: (ABAR[t + 20] / ABAR[t]) ** 0.5 for t in (300, 225)}
            inside = ABAR[300] ** 0.5 * forth[300] * ddim_slope(320, 225)
            inside *= forth[225] * ddim_slope(245, 150) * below
            outside = ABAR[225] ** 0.5 * forth[225] * ddim_slope(245, 150) * below
    noise = FixedNoise(0.1 * torch.randn(gray.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    weight = torch.randn(gray.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    out = purifier(gray, noise, on)
    assert 0.0 < float(out.min()) <= float(out.max()) < 1.0
    found = gradient(lambda image: weight * purifier(image, noise, on), gray)
    torch.testing.assert_close(found, weight * (on * inside + (1 - on) * outside), rtol=1e-10, atol=0)


# Masks


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_relaxed_mask_is_the_hard_one_at_temperature_zero(rule, classifier, images):
    hard, soft = rule(classifier, images, keyed(6)), rule.relaxed(classifier, images, keyed(6), 1e-9)
    # At a plateau of equal saliency the hard rule takes the first pixels, the relaxed one all by half.
    assert float(((hard - soft).abs() > 0.01).float().mean()) < 0.05
    warm = rule.relaxed(classifier, images, keyed(6), 0.1)
    assert 0.0 <= float(warm.min()) < float(warm.max()) <= 1.0
    assert float(((warm > 0.01) & (warm < 0.99)).float().mean()) > 0.1
    # Two maps below their thresholds can make a union above 1/2.
    assert float(((warm > 0.5).float() - hard).abs().mean()) < 0.15


def test_relaxed_union_and_quantile_by_hand():
    maps = torch.tensor([0.2, 0.7, 0.5, 0.9]).reshape(1, 2, 1, 2)
    s = torch.sigmoid((maps - 0.6) / 0.25)
    expected = torch.stack([s[0, :, 0, k].sum() - s[0, :, 0, k].prod() for k in range(2)])
    torch.testing.assert_close(F.soft_threshold_union(maps, 0.6, 0.25).flatten(), expected)
    score = torch.tensor([0.1, 0.8, 0.6, 0.4]).reshape(1, 1, 2, 2)
    expected = torch.sigmoid((score - 0.5) / 0.2)
    torch.testing.assert_close(F.soft_top_fraction(score, 0.5, 0.2), expected)


@pytest.mark.parametrize(
    "rule", [r for r in RULES if not isinstance(r, lp.TopFraction)], ids=lambda r: type(r).__name__
)
def test_mask_gradient_agrees_with_finite_differences_of_the_relaxed_mask(rule, classifier64, gray):
    weight = torch.randn(gray.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    views = {}
    for kind in ("straight_through", "soft"):
        mask = RelaxedMask(rule, kind == "soft", 0.1)
        views[kind] = mask(classifier64, gray, keyed(2))
        found = gradient(lambda image, mask=mask: weight * mask(classifier64, image, keyed(2)), gray)
        assert float(found.abs().sum()) > 0
        assert agrees(found, lambda image: weight * rule.relaxed(classifier64, image, keyed(2), 0.1), gray)
    assert torch.equal(views["straight_through"], rule(classifier64, gray, keyed(2)))
    assert not torch.equal(views["soft"], views["straight_through"])


KINDS = {"paper": lp.HeterogeneousPurifier, "variable": lp.VariableIntensityPurifier}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_straight_through_has_the_bits_of_the_frozen_mask_forward_and_more_gradient(kind, unet, classifier, images):
    defended = lp.DefendedClassifier(kind(unet, lp.TopFraction(0.3), 400, 200, 4), classifier)
    frozen, through = (lp.Exact(how).attacked(defended).function for how in ("frozen", "straight_through"))
    for image in (images, images.clone().requires_grad_()):
        assert torch.equal(through(image, keyed(6)), defended(images, keyed(6)))
    first, second = (gradient(lambda image, f=f: f(image, keyed(6)), images) for f in (frozen, through))
    assert torch.equal(first, gradient(lambda image: defended(image, keyed(6)), images))
    assert not torch.allclose(first, second, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_mask_gradient_of_a_whole_defense_agrees_with_finite_differences(kind, unet, classifier64, gray):
    """Of the soft function itself; and of the hard mask moved by as much as the soft one moves."""
    rule = lp.MinMaxThreshold(0.4)
    defended = lp.DefendedClassifier(kind(copy.deepcopy(unet).double(), rule, 400, 200, 4), classifier64)

    def soft(image):
        return rule.relaxed(classifier64, image, keyed(2), 0.1)

    hard, before = rule(classifier64, gray, keyed(2)), soft(gray).detach()
    moved = defended.purifier.with_mask(Given(lambda image: hard + soft(image) - before))
    functions = {
        "straight_through": lp.DefendedClassifier(moved, classifier64),
        "soft": lp.Exact("soft").attacked(defended).function,
    }
    for how, function in functions.items():
        view = lp.Exact(how).attacked(defended).function
        found = gradient(lambda image, view=view: view(image, keyed(2)).square(), gray)
        assert agrees(found, lambda image, f=function: f(image, keyed(2)).square(), gray)


# Views of a defense


@pytest.mark.parametrize("how", [lp.Exact(), lp.Exact("soft"), lp.Surrogate(2), lp.BPDA()])
def test_every_view_tells_where_the_defense_looks(how, unet, classifier, images):
    """Of the defense, not of what stands in for it."""
    rule = lp.MinMaxThreshold(0.4)
    masked = lp.DefendedClassifier(lp.HeterogeneousPurifier(unet, rule, 200, 100, 4), classifier)
    view = how.attacked(masked)
    assert torch.equal(view.function.relaxed(images, keyed(6)), rule.relaxed(classifier, images, keyed(6), 0.1))
    assert view.defended is masked
    assert lp.Exact().attacked(lp.DefendedClassifier(lp.NoPurifier(), classifier)).function.relaxed is None


def test_a_mask_that_is_handed_in_changes_no_bit(unet, classifier, images):
    """Of outputs and gradients, in every view that takes one."""
    defended = lp.DefendedClassifier(lp.HeterogeneousPurifier(unet, lp.TopFraction(0.3), 400, 200, 4), classifier)
    for how in (lp.Exact(), lp.Surrogate(2), lp.BPDA()):
        function = how.attacked(defended).function
        mask = function.mask(images, keyed(6))
        assert torch.equal(mask, lp.TopFraction(0.3)(classifier, images, None))
        known, unknown = (lambda image, f=function, m=m: f.logits(image, keyed(6), m) for m in (mask, None))
        assert torch.equal(known(images), unknown(images))
        assert torch.equal(gradient(known, images), gradient(unknown, images))
    # A mask that is drawn, or has a gradient of its own, cannot be.
    assert lp.Exact("straight_through").attacked(defended).function.mask is None
    random = defended.purifier.with_mask(lp.RandomArea(lp.TopFraction(0.3)))
    assert lp.DefendedClassifier(random, classifier).attacked().mask is None


def test_bpda_is_exact_forward_and_the_identity_backward(unet, classifier, images):
    defended = lp.DefendedClassifier(lp.UniformPurifier(unet, 300, 3), classifier)
    view = lp.BPDA().attacked(defended)
    assert (view.gradient, view.mask_gradient, view.nfe) == ("bpda", "none", 3)
    leaf = images.clone().requires_grad_()
    out = view.function(leaf, keyed(6))
    assert torch.equal(out, defended(images, keyed(6)))
    (found,) = torch.autograd.grad(out.square().sum(), leaf)
    purified = defended.purifier(images, keyed(6))
    assert torch.equal(found, gradient(lambda image: classifier(image).square(), purified))
    # Forward in fewer steps.
    view, cheap = (
        lp.BPDA(steps=1).attacked(defended),
        lp.DefendedClassifier(lp.UniformPurifier(unet, 300, 1), classifier),
    )
    assert (view.gradient, view.nfe) == ("bpda", 1)
    assert torch.equal(view.function(images, keyed(6)), cheap(images, keyed(6)))


def test_another_purifier_may_stand_in_for_the_defense(unet, classifier, images):
    defended = lp.DefendedClassifier(lp.GradualPurifier(unet, [30, 50], [3, 5], "ddpm"), classifier)
    other = lp.UniformPurifier(unet, 50, 1)
    for given in (other, lambda denoiser: lp.UniformPurifier(denoiser, 50, 1)):
        view = lp.SurrogatePurifier(given).attacked(defended)
        assert (view.gradient, view.nfe, view.levels, view.defended) == ("surrogate", 1, [50], defended)
        found = view.function(images, keyed(6))
        assert torch.equal(found, lp.DefendedClassifier(other, classifier)(images, keyed(6)))


@pytest.mark.parametrize("name", ["paper", "variable", "ddpm", "multi", "resized", "none"])
def test_surrogate_is_the_same_purifier_with_fewer_steps(name, unet, classifier, images):
    rule = lp.TopFraction(0.3)
    make = {
        "paper": lambda steps: lp.HeterogeneousPurifier(unet, rule, 400, 200, steps),
        "variable": lambda steps: lp.VariableIntensityPurifier(unet, rule, 400, 200, steps),
        "ddpm": lambda steps: lp.UniformPurifier(unet, 400, steps, "ddpm"),
        "multi": lambda steps: lp.HeterogeneousPurifier(unet, rule, 400, 200, steps, "multi", 10, 5),
        "resized": lambda steps: lp.ResizedPurifier(unet, lp.UniformPurifier(unet, 400, steps)),
        "none": lambda steps: lp.NoPurifier(),
    }[name]
    view, few = lp.Surrogate(2).attacked(lp.DefendedClassifier(make(4), classifier)), make(2)
    assert torch.equal(view.function(images, keyed(6)), lp.DefendedClassifier(few, classifier)(images, keyed(6)))
    assert (view.gradient, view.nfe, view.levels) == ("surrogate", few.nfe, few.levels)
    assert view.remark is None


class Rounding(lp.UniformPurifier):
    """A sampler whose grid rounds the level it starts from: the trap of int(n * strength)."""

    def with_steps(self, steps):
        return Rounding(self.denoiser, self.start[0] // (100 // steps) * (100 // steps), steps)


def test_a_surrogate_that_starts_elsewhere_is_warned_of(unet, classifier):
    defenses, attacks = {"round": Rounding(unet, 250, 10)}, {"pgd": lp.PGD("linf", 0.1, 1, 0.1)}
    evaluator = Evaluator(classifier, defenses, attacks, {"pgd": lp.Surrogate(3)})
    assert evaluator.describe()[0]["attack_levels"] == [231, 154, 77]
    assert evaluator.remarks() == ["pgd on round: the surrogate with 3 steps noises to [231], the defense to [250]"]


def test_results_name_what_was_differentiated(unet, classifier):
    defenses = {
        "none": lp.NoPurifier(),
        "paper": lp.HeterogeneousPurifier(unet, lp.TopFraction(0.3), 400, 200, 4),
        "random": lp.VariableIntensityPurifier(unet, lp.RandomArea(lp.FullMask()), 400, 200, 4),
    }
    pgd = lp.PGD("linf", 0.1, 1, 0.1)
    gradients = {
        "through": lp.Exact("straight_through"),
        "soft": lp.Exact("soft"),
        "few": lp.Surrogate(2),
        "bpda": lp.BPDA(),
    }
    attacks = {"plain": pgd, **dict.fromkeys(gradients, pgd), "square": lp.Square("linf", 0.1, 2)}
    attacks |= {"transfer": lp.Transfer(pgd)}
    found = {
        (r["attack"], r["defense"]): (r["gradient"], r["mask_gradient"], r["nfe_attack"])
        for r in Evaluator(classifier, defenses, attacks, gradients).describe()
    }
    expected = {
        "plain": [("exact", "none", 0), ("exact", "frozen", 6), ("exact", "frozen", 4)],
        "through": [("exact", "none", 0), ("exact", "straight_through", 6), ("exact", "frozen", 4)],
        "soft": [("exact", "none", 0), ("surrogate", "soft", 6), ("exact", "frozen", 4)],
        "few": [("surrogate", "none", 0), ("surrogate", "frozen", 3), ("surrogate", "frozen", 2)],
        "bpda": [("bpda", "none", 0), ("bpda", "none", 6), ("bpda", "none", 4)],
        "square": [("none", "none", 0), ("none", "none", 6), ("none", "none", 4)],
        "transfer": [("surrogate", "none", 0)] * 3,
    }
    assert found == {(a, d): row for a, rows in expected.items() for d, row in zip(defenses, rows, strict=True)}


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"pdg": lp.Exact()}, "'pdg' is not among the attacks pgd, transfer"),
        ({"transfer": lp.Exact()}, "transfer attacks the bare classifier"),
        ({"pgd": lp.Surrogate(1)}, "pgd on paper: steps = 1"),
        ({"pgd": lp.Surrogate(0)}, "pgd on paper: steps = 0"),
    ],
)
def test_impossible_gradients_are_refused(gradients, message, unet, classifier):
    pgd = lp.PGD("linf", 0.1, 1, 0.1)
    defenses = {"paper": lp.HeterogeneousPurifier(unet, lp.TopFraction(0.3), 400, 200, 4)}
    with pytest.raises(InputError, match=message):
        Evaluator(classifier, defenses, {"pgd": pgd, "transfer": lp.Transfer(pgd)}, gradients)
    with pytest.raises(InputError, match="temperature = 0"):
        lp.Exact("soft", temperature=0)
    with pytest.raises(InputError, match="use frozen, straight_through or soft"):
        lp.Exact("hard")


def test_attacks_are_handed_what_is_configured(unet, classifier, images):
    """What the attack is called with, told from its output."""
    seen = []

    class Spy(lp.PGD):
        def perturb(self, model, image, label, noise, chunk):
            seen.append(model(image, noise))
            return image

    class Bare(Spy):
        target = "classifier"

    attacks = {"exact": Spy("linf", 0.1, 1, 0.1), "few": Spy("linf", 0.1, 1, 0.1), "bare": Bare("linf", 0.1, 1, 0.1)}
    evaluator = Evaluator(classifier, {"uniform": lp.UniformPurifier(unet, 300, 4)}, attacks, {"few": lp.Surrogate(2)})
    batch = {"image": images, "label": torch.zeros(6, dtype=torch.int64), "index": torch.arange(6)}
    list(evaluator.evaluate(batch, Ledger()))
    for found, steps in zip(seen, (4, 2), strict=False):
        model = lp.DefendedClassifier(lp.UniformPurifier(unet, 300, steps), classifier)
        assert torch.equal(found, model(images, keyed(6, stream=ATTACK)))
    assert torch.equal(seen[2], classifier(images))


# Memory and replay


def kept_bytes(purifier, image):
    """Bytes of the tensors that a forward pass keeps for the backward pass."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        purifier(image.clone().requires_grad_(), keyed(len(image)), (image > 0.5).float())
    return total


@pytest.mark.parametrize("name", ["ddim", "ddpm", "guided", "freqpure", "paper", "variable"])
def test_memory_of_the_exact_gradient_grows_by_little_more_than_the_input_of_each_step(name, unet, images):
    """Ten times the steps: peak memory is what is kept and the activations of one call."""
    images = images[:2]
    size = images.numel() * images.element_size()
    make = {
        "ddim": lambda steps: lp.UniformPurifier(unet, 200, steps),
        "ddpm": lambda steps: lp.UniformPurifier(unet, 200, steps, "ddpm"),
        "guided": lambda steps: lp.GuidedPurifier(unet, 200, steps, 1, 5.0),
        "freqpure": lambda steps: lp.FreqPurePurifier(unet, [200], [steps], 2.5),
        "paper": lambda steps: lp.HeterogeneousPurifier(unet, lp.TopFraction(0.3), 200, 100, steps, "none"),
        "variable": lambda steps: lp.VariableIntensityPurifier(unet, lp.TopFraction(0.3), 200, 100, steps),
    }[name]
    few, many = (kept_bytes(make(steps), images) for steps in (5, 50))
    per_step = (many - few) / 45
    # The map of levels, int64, is twice the size of a gray image; the masks counted at every use are one tensor.
    # FreqPure keeps its clean estimate, and counts the round's input again.
    most = {"ddim": 1.1, "ddpm": 1.1, "guided": 1.1, "freqpure": 3.1, "paper": 3.1, "variable": 7.1}
    assert per_step <= most[name] * size
    assert per_step < kept_bytes(lp.UniformPurifier(unet, 200, 1, recompute=False), images) / 10


# gradcheck


class Detached(lp.UniformPurifier):
    """Cut: the gradient does not go through the denoiser."""

    def predict(self, x, t):
        return super().predict(x.detach(), t)


class OtherNoiseInTheBackward(lp.UniformPurifier):
    """Draws at every call, and puts nothing in place of the draw when it is called again."""

    def predict(self, x, t):
        level, calls = torch.full((len(x),), t), []

        def run(x):
            calls.append(1)
            return self.denoiser(x + (0.3 if len(calls) == 1 else 0.0), level)

        return checkpoint(run, x, use_reentrant=False) if self.recompute and x.requires_grad else run(x)


class NotKeyed(lp.UniformPurifier):
    """Draws from torch's generator."""

    def trace(self, image, noise, mask=None):
        return super().trace(image, FixedNoise(torch.randn_like(image)))


class Off(zoo.Shown):
    """The gradient of one pixel in 64 is off by one in a hundred."""

    def shown(self, image, noise):
        wrong = torch.zeros_like(image)
        wrong[:, :, 3, 3] = 0.01
        return image + wrong * (image - image.detach())


SOUND = {
    "none": lp.NoPurifier(),
    "uniform": lp.UniformPurifier(Curved(), 200, 2),
    "paper": lp.HeterogeneousPurifier(Curved(), lp.MinMaxThreshold(0.5), 200, 100, 2),
    "variable": lp.VariableIntensityPurifier(Curved(), lp.MinMaxThreshold(0.5), 200, 100, 2),
}
CHECKS = ["recomputed", "finite_differences", "replayed", "nonzero", "zero_share"]


def test_gradcheck_passes_sound_defenses(classifier, images):
    found = lp.gradcheck(classifier, SOUND, images, torch.arange(6), samples=2)
    assert [(f.defense, f.check, f.verdict) for f in found] == [(d, c, "pass") for d in SOUND for c in CHECKS]
    assert (found.passed, found.conclusion) == (True, "passed, 20 checks")
    assert found.json()["samples"] == [0, 1]
    with pytest.raises(InputError, match="samples = 0: use at least 1"):
        lp.gradcheck(classifier, SOUND, images, torch.arange(6), samples=0)


@pytest.mark.parametrize(
    ("broken", "failed"),
    [
        (Detached, {"finite_differences"}),
        (OtherNoiseInTheBackward, {"recomputed", "finite_differences"}),
        (NotKeyed, {"recomputed", "finite_differences", "replayed"}),
        (zoo.Quantized, {"nonzero", "zero_share"}),
        (zoo.Cut, {"finite_differences", "nonzero", "zero_share"}),
        (zoo.Misleading, {"finite_differences"}),
        (Off, {"finite_differences"}),
    ],
)
def test_gradcheck_finds_broken_purifiers(broken, failed, classifier, images):
    purifier = broken(Curved(), *((200, 2) if issubclass(broken, lp.UniformPurifier) else ()))
    defenses = {"uniform": SOUND["uniform"], "broken": purifier}
    found = lp.gradcheck(classifier, defenses, images, torch.arange(6), samples=2)
    assert {(f.defense, f.check) for f in found.failed} == {("broken", check) for check in failed}
    assert found.conclusion.startswith("FAILED: not to be believed: broken (")


def test_gradcheck_does_not_blame_the_kinks_of_a_network():
    """The shipped classifier has so many that a step of 1e-6 crosses one in most directions."""
    classifier = lp.load_classifier("checkpoints/cifar10_classifier.safetensors")
    count = 8
    images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = lp.gradcheck(classifier, lp.NoPurifier(), images, torch.arange(count) % 10, samples=count)
    assert found.passed, str(found)


def test_the_command_writes_its_verdict(tiny, capsys):
    arguments = tiny({"none": "NoPurifier", "broken": {"class_path": "flattering.Misleading"}})
    with pytest.raises(SystemExit) as exit_:
        evaluate(["gradcheck", *arguments, "--samples", "2"])
    assert exit_.value.code == 1
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1] == "gradcheck: FAILED: not to be believed: broken (finite_differences)"
    assert [line.split()[1:3] for line in lines[1:-1]] == [[d, c] for d in ("none", "broken") for c in CHECKS]
    found = json.loads((tiny.run / "gradcheck.json").read_text())
    assert (found["passed"], found["samples"], len(found["checks"])) == (False, [0, 1], 10)
    assert {path.name for path in tiny.run.iterdir()} == {"gradcheck.json"}
