"""What attacks differentiate: closed forms, finite differences, and that a broken defense is found out."""

import copy
import json
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import FixedNoise, GaussianDenoiser, randomized
from torch.utils.checkpoint import checkpoint

from lit_purify.attacks import PGD, Square, Transfer
from lit_purify.cli import evaluate
from lit_purify.defense import (
    BPDA,
    DefendedClassifier,
    Exact,
    GradualPurifier,
    HeterogeneousPurifier,
    Inverse,
    Mask,
    MinMaxThreshold,
    NoPurifier,
    Ones,
    OtherPurifier,
    RandomArea,
    Rolled,
    SoftmaxThreshold,
    Surrogate,
    TopFraction,
    UniformPurifier,
    VariableIntensityPurifier,
)
from lit_purify.errors import InputError
from lit_purify.evaluation import RobustnessTask
from lit_purify.evaluation.folder import RunFolder
from lit_purify.evaluation.records import Record
from lit_purify.functional import mask as F
from lit_purify.functional.noise import KeyedNoise
from lit_purify.functional.schedule import Schedule, grid
from lit_purify.models import UNet

RULES = [
    MinMaxThreshold(0.4),
    SoftmaxThreshold(0.02),
    TopFraction(0.3),
    Inverse(MinMaxThreshold(0.4)),
    Rolled(MinMaxThreshold(0.4)),
]


def keyed(count):
    return KeyedNoise(0, torch.arange(count), torch.zeros(count, dtype=torch.int64))


def gradient(function, image):
    leaf = image.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return found


def directional(function, image, step=1e-6):
    """A random direction, and the central difference along it."""
    direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(5), dtype=image.dtype)
    with torch.no_grad():
        high, low = (function(image + sign * step * direction).sum() for sign in (1, -1))
    return direction, float((high - low) / (2 * step))


class Given(Mask):
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
    rule = Given(lambda image: on.expand(len(image), -1, -1, -1))
    if name in ("ddim", "ddpm"):
        purifier = UniformPurifier(denoiser, None, 300, 5, name, recompute)
        inside = outside = walked(ddim_slope if name == "ddim" else ddpm_slope, grid(300, 0, 5))
    elif name == "variable":
        purifier = VariableIntensityPurifier(denoiser, None, rule, 300, 90, 4, recompute)
        inside, outside = (walked(ddim_slope, grid(t, 0, 4)) for t in (300, 90))
    else:
        kind = {"paper": "single", "release": "release"}[name]
        purifier = HeterogeneousPurifier(denoiser, None, rule, 300, 150, 4, kind, 20, recompute=recompute)
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
    out = purifier(gray, noise)
    assert 0.0 < float(out.min()) <= float(out.max()) < 1.0
    found = gradient(lambda image: weight * purifier(image, noise), gray)
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


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_mask_gradient_agrees_with_finite_differences_of_the_relaxed_mask(rule, classifier64, gray):
    weight = torch.randn(gray.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    views = {}
    for kind in ("straight_through", "soft"):
        purifier = HeterogeneousPurifier(GaussianDenoiser(size=8), classifier64, rule, 200, 100, 4)
        mask = Exact(kind).attacked(DefendedClassifier(purifier, classifier64)).model.purifier.mask
        views[kind] = mask(classifier64, gray, keyed(2))
        found = gradient(lambda image, mask=mask: weight * mask(classifier64, image, keyed(2)), gray)
        assert float(found.abs().sum()) > 0
        if isinstance(rule, TopFraction):
            # The quantile is held: it does not move with the image.
            score = F.minmax_normalize(F.saliency(classifier64.features(gray), (8, 8))).amax(dim=1, keepdim=True)
            ordered = score.flatten(1).sort(descending=True).values
            held = ordered[:, 18:20].mean(dim=1).reshape(-1, 1, 1, 1)

            def function(image, held=held):
                maps = F.minmax_normalize(F.saliency(classifier64.features(image), (8, 8)))
                return weight * torch.sigmoid((maps.amax(dim=1, keepdim=True) - held) / 0.1)
        else:

            def function(image):
                return weight * rule.relaxed(classifier64, image, keyed(2), 0.1)

        direction, difference = directional(function, gray)
        assert difference == pytest.approx(float((found * direction).sum()), rel=1e-5)
    assert torch.equal(views["straight_through"], rule(classifier64, gray, keyed(2)))
    assert not torch.equal(views["soft"], views["straight_through"])


def purifiers(denoiser, classifier, rule):
    return {
        "paper": HeterogeneousPurifier(denoiser, classifier, rule, 400, 200, 4),
        "variable": VariableIntensityPurifier(denoiser, classifier, rule, 400, 200, 4),
    }


@pytest.mark.parametrize("name", ["paper", "variable"])
def test_straight_through_has_the_bits_of_the_frozen_mask_forward_and_more_gradient(name, unet, classifier, images):
    defended = DefendedClassifier(purifiers(unet, classifier, TopFraction(0.3))[name], classifier)
    frozen, through = (Exact(kind).attacked(defended) for kind in ("frozen", "straight_through"))
    assert frozen.model is defended
    assert torch.equal(through.model(images, keyed(6)), defended(images, keyed(6)))
    leaf = images.clone().requires_grad_()
    assert torch.equal(through.model(leaf, keyed(6)), defended(images, keyed(6)))
    first, second = (gradient(lambda image, m=view.model: m(image, keyed(6)), images) for view in (frozen, through))
    assert not torch.allclose(first, second, rtol=1e-3)


@pytest.mark.parametrize("name", ["paper", "variable"])
def test_mask_gradient_of_a_whole_defense_agrees_with_finite_differences(name, unet, classifier64, gray):
    """Of the soft function itself; and of the hard mask moved by as much as the soft one moves."""
    unet64, rule = copy.deepcopy(unet).double(), MinMaxThreshold(0.4)
    defended = DefendedClassifier(purifiers(unet64, classifier64, rule)[name], classifier64)

    def soft(image):
        return rule.relaxed(classifier64, image, keyed(2), 0.1)

    hard, before = rule(classifier64, gray, keyed(2)), soft(gray).detach()
    moved = defended.purifier.with_mask(Given(lambda image: hard + soft(image) - before))
    functions = {
        "straight_through": DefendedClassifier(moved, classifier64),
        "soft": Exact("soft").attacked(defended).model,
    }
    for kind, function in functions.items():
        view = Exact(kind).attacked(defended).model
        found = gradient(lambda image, view=view: view(image, keyed(2)).square(), gray)
        direction, difference = directional(lambda image, f=function: f(image, keyed(2)).square(), gray)
        assert difference == pytest.approx(float((found * direction).sum()), rel=1e-5)


# Views of a defense


@pytest.mark.parametrize("how", [Exact(), Exact("soft"), Surrogate(2), BPDA()])
def test_every_view_tells_where_the_defense_looks(how, unet, classifier, images):
    """Of the defense, not of what stands in for it."""
    rule = MinMaxThreshold(0.4)
    masked = DefendedClassifier(HeterogeneousPurifier(unet, classifier, rule, 200, 100, 4), classifier)
    expected = rule.relaxed(classifier, images, keyed(6), 0.1)
    assert torch.equal(how.attacked(masked).attention(images, keyed(6)), expected)
    assert how.attacked(masked).defended is masked
    assert (
        Exact().attacked(DefendedClassifier(NoPurifier(unet, classifier), classifier)).attention(images, None) is None
    )


def test_bpda_is_exact_forward_and_the_identity_backward(unet, classifier, images):
    defended = DefendedClassifier(UniformPurifier(unet, classifier, 300, 3), classifier)
    view = BPDA().attacked(defended)
    assert (view.gradient, view.mask_gradient, view.nfe) == ("bpda", "none", 3)
    leaf = images.clone().requires_grad_()
    out = view.model(leaf, keyed(6))
    assert torch.equal(out, defended(images, keyed(6)))
    (found,) = torch.autograd.grad(out.square().sum(), leaf)
    purified = defended.purifier(images, keyed(6))
    assert torch.equal(found, gradient(lambda image: classifier(image).square(), purified))


def test_bpda_may_go_forward_through_fewer_steps(unet, classifier, images):
    view = BPDA(steps=1).attacked(DefendedClassifier(UniformPurifier(unet, classifier, 300, 3), classifier))
    cheap = DefendedClassifier(UniformPurifier(unet, classifier, 300, 1), classifier)
    assert (view.gradient, view.nfe) == ("bpda", 1)
    assert torch.equal(view(images, keyed(6)), cheap(images, keyed(6)))


def test_another_purifier_may_stand_in_for_the_defense(unet, classifier, images):
    defended = DefendedClassifier(GradualPurifier(unet, classifier, [30, 50], [3, 5], "ddpm"), classifier)
    other = partial(UniformPurifier, level=50, steps=1)
    view = OtherPurifier(other).attacked(defended)
    assert (view.gradient, view.nfe, view.levels, view.defended) == ("surrogate", 1, [50], defended)
    assert torch.equal(
        view(images, keyed(6)), DefendedClassifier(other(unet, classifier), classifier)(images, keyed(6))
    )


def test_surrogate_is_the_same_purifier_with_fewer_steps(unet, classifier, images):
    full = purifiers(unet, classifier, TopFraction(0.3)) | {
        "ddpm": UniformPurifier(unet, classifier, 400, 4, "ddpm"),
        "multi": HeterogeneousPurifier(unet, classifier, TopFraction(0.3), 400, 200, 4, "multi", 10, 5),
        "none": NoPurifier(unet, classifier),
    }
    few = {
        "paper": HeterogeneousPurifier(unet, classifier, TopFraction(0.3), 400, 200, 2),
        "variable": VariableIntensityPurifier(unet, classifier, TopFraction(0.3), 400, 200, 2),
        "ddpm": UniformPurifier(unet, classifier, 400, 2, "ddpm"),
        "multi": HeterogeneousPurifier(unet, classifier, TopFraction(0.3), 400, 200, 2, "multi", 10, 5),
        "none": NoPurifier(unet, classifier),
    }
    for name, purifier in full.items():
        view = Surrogate(2).attacked(DefendedClassifier(purifier, classifier))
        expected = DefendedClassifier(few[name], classifier)
        assert torch.equal(view.model(images, keyed(6)), expected(images, keyed(6)))
        assert (view.gradient, view.nfe, view.levels) == ("surrogate", few[name].nfe, few[name].levels)
        assert view.remark is None


class Rounding(UniformPurifier):
    """A sampler whose grid rounds the level it starts from: the trap of int(n * strength)."""

    def with_steps(self, steps):
        return Rounding(self.denoiser, self.classifier, self.start[0] // (100 // steps) * (100 // steps), steps)


def test_a_surrogate_that_starts_elsewhere_is_warned_of(unet, classifier, capsys):
    attacks = {"pgd": PGD("linf", 0.1, 1, 0.1)}
    gradients = {"pgd": Surrogate(3)}
    task = RobustnessTask(
        classifier, unet, {"round": lambda d, c: Rounding(d, c, 250, 10)}, attacks, gradients=gradients
    )
    assert task.describe()[0]["attack_levels"] == [231, 154, 77]
    task.trainer = SimpleNamespace(is_global_zero=True)
    task.check, task._data = (
        lambda data: None,
        lambda: SimpleNamespace(evaluated=SimpleNamespace(positions=torch.arange(6))),
    )
    task.setup("test")
    assert "pgd on round: the surrogate of 3 steps noises to [231], the defense to [250]" in capsys.readouterr().err


def test_results_name_what_was_differentiated(unet, classifier):
    make = {
        "none": NoPurifier,
        "paper": lambda d, c: HeterogeneousPurifier(d, c, TopFraction(0.3), 400, 200, 4),
        "random": lambda d, c: VariableIntensityPurifier(d, c, RandomArea(Ones()), 400, 200, 4),
    }
    pgd = PGD("linf", 0.1, 1, 0.1)
    attacks = dict.fromkeys(("plain", "through", "soft", "few", "few_soft", "bpda"), pgd)
    attacks |= {"square": Square("linf", 0.1, 2), "transfer": Transfer(pgd), "blind": Transfer(Square("linf", 0.1, 2))}
    gradients = {
        "through": Exact("straight_through"),
        "soft": Exact("soft"),
        "few": Surrogate(2),
        "few_soft": Surrogate(2, "soft"),
        "bpda": BPDA(),
    }
    found = {
        (r["defense"], r["attack"]): (r["gradient"], r["mask_gradient"], r["nfe_attack"], r["nfe_defense"])
        for r in RobustnessTask(classifier, unet, make, attacks, gradients=gradients).describe()
    }
    assert found == {
        ("none", "plain"): ("exact", "none", 0, 0),
        ("none", "through"): ("exact", "none", 0, 0),
        ("none", "soft"): ("exact", "none", 0, 0),
        ("none", "few"): ("surrogate", "none", 0, 0),
        ("none", "few_soft"): ("surrogate", "none", 0, 0),
        ("none", "bpda"): ("bpda", "none", 0, 0),
        ("none", "square"): ("none", "none", 0, 0),
        ("none", "transfer"): ("surrogate", "none", 0, 0),
        ("none", "blind"): ("none", "none", 0, 0),
        ("paper", "plain"): ("exact", "frozen", 6, 6),
        ("paper", "through"): ("exact", "straight_through", 6, 6),
        ("paper", "soft"): ("surrogate", "soft", 6, 6),
        ("paper", "few"): ("surrogate", "frozen", 3, 6),
        ("paper", "few_soft"): ("surrogate", "soft", 3, 6),
        ("paper", "bpda"): ("bpda", "none", 6, 6),
        ("paper", "square"): ("none", "none", 6, 6),
        ("paper", "transfer"): ("surrogate", "none", 0, 6),
        ("paper", "blind"): ("none", "none", 0, 6),
        ("random", "plain"): ("exact", "frozen", 4, 4),
        ("random", "through"): ("exact", "frozen", 4, 4),
        ("random", "soft"): ("exact", "frozen", 4, 4),
        ("random", "few"): ("surrogate", "frozen", 2, 4),
        ("random", "few_soft"): ("surrogate", "frozen", 2, 4),
        ("random", "bpda"): ("bpda", "none", 4, 4),
        ("random", "square"): ("none", "none", 4, 4),
        ("random", "transfer"): ("surrogate", "none", 0, 4),
        ("random", "blind"): ("none", "none", 0, 4),
    }


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"pdg": Exact()}, "'pdg' is not among the attacks pgd, transfer"),
        ({"transfer": Exact()}, "transfer is handed the bare classifier"),
        ({"pgd": Surrogate(1)}, "pgd on paper: steps = 1"),
        ({"pgd": Surrogate(0)}, "pgd on paper: steps = 0"),
    ],
)
def test_impossible_gradients_are_refused(gradients, message, unet, classifier):
    pgd = PGD("linf", 0.1, 1, 0.1)
    make = {"paper": lambda d, c: HeterogeneousPurifier(d, c, TopFraction(0.3), 400, 200, 4)}
    with pytest.raises(InputError, match=message):
        RobustnessTask(classifier, unet, make, {"pgd": pgd, "transfer": Transfer(pgd)}, gradients=gradients)
    with pytest.raises(InputError, match="temperature = 0"):
        Exact("soft", temperature=0)
    with pytest.raises(InputError, match="use frozen, straight_through or soft"):
        Exact("hard")


def test_attacks_are_handed_what_is_configured(unet, classifier, images):
    """What the attack is called with, told from its output."""
    seen = {}

    class Spy(PGD):
        def perturb(self, model, image, label, noise, chunk):
            seen[len(seen)] = model(image, noise)
            return image

    class Bare(Spy):
        target = "classifier"

    make = {"uniform": lambda d, c: UniformPurifier(d, c, 300, 4)}
    attacks = {"exact": Spy("linf", 0.1, 1, 0.1), "few": Spy("linf", 0.1, 1, 0.1), "bare": Bare("linf", 0.1, 1, 0.1)}
    task = RobustnessTask(classifier, unet, make, attacks, runs=1, gradients={"few": Surrogate(2)})
    batch = {"image": images, "label": torch.zeros(6, dtype=torch.int64), "index": torch.arange(6)}
    for name in attacks:
        task._evaluate("uniform", name, batch)
    noise = KeyedNoise(0, torch.arange(6), torch.zeros(6, dtype=torch.int64), stream=1)
    for row, steps in enumerate((4, 2)):
        purifier = UniformPurifier(unet, classifier, 300, steps)
        assert torch.equal(seen[row], DefendedClassifier(purifier, classifier)(images, noise))
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
        purifier(image.clone().requires_grad_(), keyed(len(image)))
    return total


def test_memory_of_the_exact_gradient_grows_by_little_more_than_the_input_of_each_step(unet, classifier, images):
    """Ten times the steps: peak memory is what is kept and the activations of one call."""
    images = images[:2]
    size = images.numel() * images.element_size()
    activations = kept_bytes(UniformPurifier(unet, classifier, 200, 1, recompute=False), images)
    makers = {
        "ddim": lambda steps: UniformPurifier(unet, classifier, 200, steps),
        "ddpm": lambda steps: UniformPurifier(unet, classifier, 200, steps, "ddpm"),
        "paper": lambda steps: HeterogeneousPurifier(unet, classifier, TopFraction(0.3), 200, 100, steps, "none"),
        "variable": lambda steps: VariableIntensityPurifier(unet, classifier, TopFraction(0.3), 200, 100, steps),
    }
    for name, make in makers.items():
        few, many = (kept_bytes(make(steps), images) for steps in (5, 50))
        per_step = (many - few) / 45
        # The map of levels, int64, is twice the size of a gray image; the masks counted at every use are one tensor.
        assert per_step <= {"ddim": 1.1, "ddpm": 1.1, "paper": 3.1, "variable": 7.1}[name] * size, name
        assert per_step < activations / 10


def test_recomputation_replays_dropout(classifier, images):
    """A denoiser in training mode draws from torch's generator."""
    network = randomized(UNet(channels=1, size=8, width=8, multipliers=[1], blocks=1, dropout=0.5)).train()
    found = []
    for recompute in (True, False):
        torch.manual_seed(0)
        purifier = UniformPurifier(network, classifier, 200, 3, recompute=recompute)
        found.append(gradient(lambda image, p=purifier: p(image, keyed(6)).square(), images))
    assert torch.equal(*found)


# gradcheck


class Detached(UniformPurifier):
    """Cut: the gradient does not go through the denoiser."""

    def predict(self, x, t):
        return super().predict(x.detach(), t)


class OtherNoiseInTheBackward(UniformPurifier):
    """Draws at every call, and puts nothing in place of the draw when it is called again."""

    def predict(self, x, t):
        level, calls = torch.full((len(x),), t), []

        def run(x):
            calls.append(1)
            return self.denoiser(x + (0.3 if len(calls) == 1 else 0.0), level)

        return checkpoint(run, x, use_reentrant=False) if self.recompute and x.requires_grad else run(x)


class NotKeyed(UniformPurifier):
    """Draws from torch's generator."""

    def trace(self, image, noise):
        return super().trace(image, FixedNoise(torch.randn_like(image)))


class Quantized(UniformPurifier):
    """Rounds what it purified to bytes."""

    def forward(self, image, noise):
        return (super().forward(image, noise) * 255).round() / 255


def uniform(class_path="UniformPurifier"):
    return {"class_path": class_path, "init_args": {"level": 200, "steps": 2}}


def masked(class_path):
    mask = {"class_path": "MinMaxThreshold", "init_args": {"tau": 0.5}}
    return {"class_path": class_path, "init_args": {"mask": mask, "high": 200, "low": 100, "steps": 2}}


SOUND = {
    "none": {"class_path": "NoPurifier"},
    "uniform": uniform(),
    "paper": masked("HeterogeneousPurifier"),
    "variable": masked("VariableIntensityPurifier"),
}
CHECKS = ["recomputed", "finite_differences", "replayed", "nonzero", "zero_share"]


def test_gradcheck_passes_sound_defenses_and_touches_no_records(tiny, capsys):
    arguments = tiny(SOUND)
    evaluate(["gradcheck", *arguments, "--samples", "2"])
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1] == "gradcheck: passed, 20 of 20 checks"
    assert [line.split()[:3] for line in lines[1:-1]] == [["passed", d, c] for d in SOUND for c in CHECKS]
    found = json.loads((tiny.run / "gradcheck.json").read_text())
    assert (found["passed"], found["samples"], len(found["checks"])) == (True, [0, 1], 20)
    assert {path.name for path in tiny.run.iterdir()} == {"gradcheck.json"}
    # The evaluation takes the folder over, and its settings are those that were checked.
    evaluate(arguments)
    before = (tiny.run / "records.jsonl").read_bytes(), (tiny.run / "identity.json").read_bytes()
    evaluate(["gradcheck", *arguments, "--samples", "1"])
    assert before == ((tiny.run / "records.jsonl").read_bytes(), (tiny.run / "identity.json").read_bytes())
    again = json.loads((tiny.run / "gradcheck.json").read_text())
    assert (again["samples"], again["settings_sha256"]) == ([0], found["settings_sha256"])


@pytest.mark.parametrize(
    ("broken", "failed"),
    [
        ("Detached", {"finite_differences"}),
        ("OtherNoiseInTheBackward", {"recomputed", "finite_differences", "replayed"}),
        ("NotKeyed", {"recomputed", "finite_differences", "replayed"}),
        ("Quantized", {"nonzero", "zero_share"}),
    ],
)
def test_gradcheck_finds_broken_purifiers(broken, failed, tiny, capsys):
    arguments = tiny({"uniform": uniform(), "broken": uniform(f"test_gradients.{broken}")})
    with pytest.raises(SystemExit) as exit_:
        evaluate(["gradcheck", *arguments, "--samples", "2"])
    assert exit_.value.code == 1
    assert capsys.readouterr().out.strip().splitlines()[-1] == f"gradcheck: FAILED, {10 - len(failed)} of 10 checks"
    found = json.loads((tiny.run / "gradcheck.json").read_text())
    assert found["passed"] is False
    assert {c["check"] for c in found["checks"] if not c["passed"] and c["defense"] == "broken"} == failed
    assert all(c["passed"] for c in found["checks"] if c["defense"] == "uniform")


def test_gradcheck_refuses_bad_input_in_one_line(tiny, capsys):
    with pytest.raises(SystemExit) as exit_:
        evaluate(["gradcheck", *tiny(SOUND), "--samples", "0"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.strip().endswith("error: samples = 0: use at least 1")


def test_an_evaluation_states_its_gradients(tiny):
    gradients = {"pgd": {"class_path": "Surrogate", "init_args": {"steps": 2, "mask": "straight_through"}}}
    defense = masked("HeterogeneousPurifier")
    defense["init_args"]["steps"] = 4
    evaluate(tiny({"paper": defense}, gradients=gradients))
    (result,) = json.loads((tiny.run / "summary.json").read_text())["results"]
    assert (result["gradient"], result["mask_gradient"]) == ("surrogate", "straight_through")
    assert (result["nfe_defense"], result["nfe_attack"], result["attack_levels"]) == (6, 3, [200, 100])
    with pytest.raises(SystemExit):
        evaluate(tiny({"paper": defense}))


def test_a_run_from_before_gradients_could_be_set_goes_on(tmp_path):
    """Its identity lacks the key; where none is set now, nothing has changed."""
    folder, settings = RunFolder(tmp_path), {"model": {"init_args": {"seed": 0}}}
    folder.claim(yaml.safe_dump(settings), write=True)
    record = Record("none", "pgd", 0, 1, [1], [1], 0.1, 0.1, 1.0)
    folder.records.write_text(record.line())
    settings["model"]["init_args"]["gradients"] = None
    folder.claim(yaml.safe_dump(settings), write=False)
    settings["model"]["init_args"]["gradients"] = {"pgd": {"class_path": "lit_purify.defense.gradients.BPDA"}}
    with pytest.raises(InputError, match="gradients"):
        folder.claim(yaml.safe_dump(settings), write=False)
