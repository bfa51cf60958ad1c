import copy
import itertools

import pytest
import torch
from conftest import FixedNoise, GaussianDenoiser, Small, keyed, randomized
from torch import nn

from lit_purify.attacks import PGD, ForeignAttack, Transfer
from lit_purify.data.base import ImageDataset
from lit_purify.defense import (
    DefendedClassifier,
    FreqPurePurifier,
    FullMask,
    GradualPurifier,
    GuidedPurifier,
    HeterogeneousPurifier,
    LikelihoodPurifier,
    LoRIDPurifier,
    NoPurifier,
    ResizedPurifier,
    TopFraction,
    UniformPurifier,
    VariableIntensityPurifier,
    defend,
)
from lit_purify.errors import InputError
from lit_purify.evaluation import Evaluator
from lit_purify.functional.diffusion import noised, to_diffusion
from lit_purify.functional.noise import ATTACK
from lit_purify.functional.schedule import grid
from lit_purify.models import Classifier, ResNetClassifier

TOP = TopFraction(0.3)


def every(denoiser, **options):
    resampled = {
        f"heterogeneous-{kind}": HeterogeneousPurifier(
            denoiser, TOP, 400, 200, 4, kind, 10, resampling_steps=5, **options
        )
        for kind in ("none", "single", "release", "multi")
    }
    return {
        "none": NoPurifier(**options),
        "ddim": UniformPurifier(denoiser, 200, 4, "ddim", **options),
        "ddpm": UniformPurifier(denoiser, 200, 4, "ddpm", **options),
        "sde": UniformPurifier(denoiser, 200, 4, "sde", **options),
        "gradual": GradualPurifier(denoiser, [50, 200], [1, 4], "ddpm", **options),
        "guided": GuidedPurifier(denoiser, 200, 4, 2, 5.0, **options),
        "freqpure": FreqPurePurifier(denoiser, [100, 200], [1, 4], 2.5, **options),
        "lorid": LoRIDPurifier(denoiser, 100, 2, 3, [4, 1, 3, 3], patch=4, stride=2, **options),
        "likelihood": LikelihoodPurifier(denoiser, 150, 150, 3, radius=0.1, **options),
        "variable": VariableIntensityPurifier(denoiser, TOP, 400, 200, 4, **options),
        "resized": ResizedPurifier(denoiser, lambda d: VariableIntensityPurifier(d, TOP, 400, 200, 4), **options),
        **resampled,
    }


NAMES = ["none", "ddim", "ddpm", "sde", "gradual", "guided", "freqpure", "lorid", "likelihood", "variable"]
NAMES += ["resized"] + [f"heterogeneous-{k}" for k in ("none", "single", "release", "multi")]


@pytest.mark.parametrize("name", NAMES)
def test_calls_are_the_stated_ones(name, classifier, images):
    denoiser = GaussianDenoiser(size=8)
    purifier = every(denoiser)[name]
    out = DefendedClassifier(purifier, classifier).trace(images, keyed(6)).purified
    assert out.shape == images.shape
    assert 0.0 <= float(out.min()) <= float(out.max()) <= 1.0
    called = [int(t.max()) for t in denoiser.calls]
    assert len(called) == purifier.nfe
    if name == "heterogeneous-single":
        assert called == [400, 310, 300, 210, 200, 100]
    elif name == "heterogeneous-release":
        assert called == [410, 310, 200, 100]
    elif name == "heterogeneous-multi":
        assert called == [400, 310, 308, 306, 304, 302, 300, 210, 208, 206, 204, 202, 200, 100]
    else:
        assert called == purifier.levels
    assert set(purifier.levels) <= {t if t % 100 == 0 else t - 10 for t in called} | set(called)


def test_heterogeneous_with_a_constant_mask_is_uniform(unet, images, fixed):
    paper, ones = HeterogeneousPurifier(unet, FullMask(), 400, 200, 4, "none"), torch.ones_like(images)
    assert torch.equal(paper(images, fixed, ones), UniformPurifier(unet, 400, 4)(images, fixed))
    assert torch.equal(paper(images, fixed, 0 * ones), UniformPurifier(unet, 200, 2)(images, fixed))


def test_variable_with_a_constant_map_is_ddim(unet, classifier, images):
    ddim = UniformPurifier(unet, 250, 3)(images, keyed(6))
    for high, mask in ((250, TOP(classifier, images, keyed(6))), (400, torch.zeros_like(images))):
        variable = VariableIntensityPurifier(unet, TOP, high, 250, 3)
        assert torch.equal(variable(images, keyed(6), mask), ddim)


def test_heterogeneous_noise_is_strong_on_the_mask_and_weak_elsewhere(classifier, images, fixed):
    for kind in (VariableIntensityPurifier, HeterogeneousPurifier):
        purifier = kind(GaussianDenoiser(size=8), TOP, 400, 200, 4)
        trace = DefendedClassifier(purifier, classifier).trace(images, fixed)
        at, u = purifier.denoiser.schedule.at, to_diffusion(images)
        expected = trace.mask * noised(u, at(400), fixed.value) + (1 - trace.mask) * noised(u, at(200), fixed.value)
        torch.testing.assert_close(trace.noised, (expected * 0.5 + 0.5).clamp(0, 1))
        assert trace.mask.sum(dim=(1, 2, 3)).tolist() == [round(0.3 * 64)] * len(images)
        with pytest.raises(InputError, match="this purifier needs a mask"):
            purifier(images, fixed)


def test_ddim_on_gaussian_data_follows_the_closed_form():
    """With the optimal denoiser each step is linear: x_s = a_s m + (x_t - a_t m) k, a factor worked out by hand."""
    denoiser = GaussianDenoiser(size=4)
    image, z = torch.rand(2, 1, 4, 4) * 0.5 + 0.25, torch.randn(2, 1, 4, 4)
    out = UniformPurifier(denoiser, 300, 3)(image, FixedNoise(z))
    m, v, levels = denoiser.mean, denoiser.variance, grid(300, 0, 3)
    abar = [float(denoiser.schedule.at(t)) for t in levels]
    x = abar[0] ** 0.5 * (2 * image.double() - 1) + (1 - abar[0]) ** 0.5 * z.double()
    for t, s in itertools.pairwise(abar):
        total = t * v + 1 - t
        centered = x - t**0.5 * m
        x = s**0.5 * m + centered * (s**0.5 * t**0.5 * v + ((1 - s) * (1 - t)) ** 0.5) / total
    torch.testing.assert_close(out.double(), (x / 2 + 0.5).clamp(0, 1), rtol=1e-5, atol=1e-6)


def test_ddpm_keeps_the_data_distribution():
    """Gaussian data noised to any level and sampled back by DDPM in many steps is distributed as before."""
    denoiser = GaussianDenoiser(mean=0.0, variance=0.1, size=16)
    generator = torch.Generator().manual_seed(0)
    image = (0.1**0.5 * torch.randn(64, 1, 16, 16, generator=generator)) / 2 + 0.5
    out = UniformPurifier(denoiser, 300, 300, "ddpm")(image, keyed(64))
    u = 2 * out - 1
    assert float(u.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(u.var()) == pytest.approx(0.1, rel=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_gradient_has_the_same_bits(name, unet, classifier, images):
    gradients, outputs = [], []
    for recompute in (True, False):
        model = DefendedClassifier(every(unet, recompute=recompute)[name], classifier)
        leaf = images.clone().requires_grad_()
        out = model(leaf, keyed(len(images)))
        out.logsumexp(dim=1).sum().backward()
        gradients.append(leaf.grad)
        outputs.append(out.detach())
    assert torch.equal(*outputs)
    if name == "likelihood":
        # Second derivatives are added up in another order.
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(*gradients)
    assert float(gradients[0].abs().sum()) > 0


@pytest.mark.parametrize(
    "name", ["sde", "gradual", "guided", "freqpure", "lorid", "likelihood", "resized", "heterogeneous-multi"]
)
def test_gradient_agrees_with_finite_differences(name, unet, classifier):
    """Of those without a closed form, in float64. The hard mask does not move under so small a change."""
    unet64, classifier64 = copy.deepcopy(unet).double(), copy.deepcopy(classifier).double()
    model = DefendedClassifier(every(unet64)[name], classifier64)
    generator = torch.Generator().manual_seed(0)
    # Mid-gray, so that the final clipping to [0, 1] leaves most pixels differentiable.
    image = 0.4 + 0.2 * torch.rand(2, 1, 8, 8, generator=generator, dtype=torch.float64)
    leaf = image.clone().requires_grad_()
    model(leaf, keyed(2)).square().sum().backward()
    direction = torch.randn(image.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        high, low = (model(image + sign * 1e-6 * direction, keyed(2)).square().sum() for sign in (1, -1))
    assert float((high - low) / 2e-6) == pytest.approx(float((leaf.grad * direction).sum()), rel=1e-5)


def test_defended_classifier_without_a_key_is_randomized(unet, classifier, images):
    model = DefendedClassifier(UniformPurifier(unet, 300, 2), classifier)
    torch.manual_seed(0)
    first, second = model(images), model(images)
    torch.manual_seed(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, model(images))


class Normalized(nn.Module):
    """A classifier with batch normalization."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
        self.net(torch.rand(8, 1, 8, 8))

    def forward(self, x):
        return self.net(x)


def test_a_defense_stays_in_evaluation_mode(unet, images):
    """Some attack libraries set the mode that they found: batch normalization must not learn from an attack."""
    network = Normalized()
    for defense in (UniformPurifier(unet, 100, 2), NoPurifier(), network, Classifier(network, 8, 10, 1)):
        model = defend("it", defense, Classifier(network, 8, 10, 1))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert model.train() is model
        assert not any(module.training for module in model.modules())
        nn.ModuleList([model]).train()
        adversarial = ForeignAttack(trains, eps=0.1)(model, images, torch.arange(6))
        assert not torch.equal(adversarial, images)
        assert not any(module.training for module in model.modules())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def trains(model, images, labels):
    """An attack that puts its model into training mode, and never back."""
    model.train()
    leaf = images.requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), labels), leaf)
    return (leaf + 0.1 * gradient.sign()).clamp(0, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: UniformPurifier(d, 0, 1), "level = 0"),
        (lambda d: UniformPurifier(d, 1001, 4), "level = 1001"),
        (lambda d: UniformPurifier(d, 3, 4), "steps = 4"),
        (lambda d: UniformPurifier(d, 100, 0), "steps = 0"),
        (lambda d: HeterogeneousPurifier(d, TOP, 100, 200, 4), "low = 200"),
        (lambda d: HeterogeneousPurifier(d, TOP, 100, 100, 4), "low = 100"),
        (lambda d: HeterogeneousPurifier(d, TOP, 995, 100, 4, jump=10), "1005"),
        (lambda d: HeterogeneousPurifier(d, TOP, 4, 2, 8), "whole levels"),
        (lambda d: VariableIntensityPurifier(d, TOP, 1001, 200, 4), "high = 1001"),
        (lambda d: HeterogeneousPurifier(d, TOP, 200, 100, 1), "steps = 1"),
        (lambda d: HeterogeneousPurifier(d, TOP, 300, 100, 3, "multi", jump=10, resampling_steps=20), "steps = 20"),
        (lambda d: VariableIntensityPurifier(d, TOP, 100, 200, 4), "low = 200"),
        (lambda d: VariableIntensityPurifier(d, TOP, 100, -1, 4), "low = -1"),
    ],
)
def test_impossible_settings_are_refused(make, message, unet):
    with pytest.raises(InputError, match=message):
        make(unet)


def test_another_classifier_is_attacked_as_itself(unet, classifier, images):
    """Also by attacks on bare classifiers; and it is checked and frozen like the first."""
    other = Small(seed=1)
    other.requires_grad_(True)
    pgd = PGD("linf", 0.1, steps=3, step_size=0.05, loss="ce")
    evaluator = Evaluator(classifier, {"none": NoPurifier(), "other": other}, {"pgd": pgd, "transfer": Transfer(pgd)})
    label, noise = torch.arange(6), keyed(6, stream=ATTACK)
    batch = {"image": images, "label": label, "index": torch.arange(6)}
    for attack in ("pgd", "transfer"):
        found = [evaluator._perturbed(name, attack, batch, {}, 6) for name in evaluator.defenses]
        assert not torch.equal(*found)
        assert torch.equal(found[1], pgd(other, images, label, noise, 6))
    assert torch.equal(evaluator.defenses["other"](images, noise), other(images))
    assert not any(p.requires_grad for p in evaluator.parameters())
    data = ImageDataset.of(images, label, [str(k) for k in range(10)])
    evaluator.check(data)
    wrong = randomized(ResNetClassifier(depth=8, size=8, num_classes=9, channels=1, width=4))
    with pytest.raises(InputError, match=r"defenses\.other: the data has 10 classes .* classifier has 9"):
        Evaluator(classifier, {"other": wrong}, {"pgd": pgd}).check(data)
    with pytest.raises(InputError, match="x is a function: use a purifier or a module"):
        defend("x", lambda image: image, classifier)


def test_rounds_go_on_from_what_the_round_before_has_left(unet, images, fixed):
    x = to_diffusion(images)
    for level in (40, 300):
        x = noised(x, unet.schedule.at(level), fixed.normal(0, x))
        x = UniformPurifier(unet, level, 1).ddim(x, level, 0)
    purified = GradualPurifier(unet, [40, 300], [1, 1])(images, fixed)
    torch.testing.assert_close(purified, (x / 2 + 0.5).clamp(0, 1))
    with pytest.raises(InputError, match="2 rounds, steps 1"):
        GradualPurifier(unet, [40, 300], [1])


def test_rounds_draw_noise_of_their_own(images):
    """A denoiser that takes nothing away: what is left of two rounds has the variance of both."""
    denoiser = GaussianDenoiser(size=8)
    denoiser.forward = lambda x, t: torch.zeros_like(x)
    twice = GradualPurifier(denoiser, [1, 1], [1, 1]).trace(images, keyed(6))
    once = GradualPurifier(denoiser, [1], [1]).trace(images, keyed(6))
    spread = [(trace.purified - images)[images.sub(0.5).abs() < 0.4].square().mean() for trace in (once, twice)]
    assert float(spread[1] / spread[0]) == pytest.approx(2.0, rel=0.35)


def test_resized_purifies_at_the_size_of_the_denoiser(classifier, images):
    denoiser = GaussianDenoiser(size=16)
    purifier = ResizedPurifier(denoiser, lambda d: VariableIntensityPurifier(d, TOP, 2, 1, 1))
    purifier.check_image(images)
    trace = DefendedClassifier(purifier, classifier).trace(images, keyed(6))
    # The rule sees the small image; enlarged, its mask is what was purified by.
    assert torch.equal(trace.mask, TOP(classifier, images, keyed(6)))
    assert {t.shape[-1] for t in denoiser.calls} == {16}
    assert torch.equal(denoiser.calls[0][:, :, ::2, ::2] == 2, trace.mask > 0.5)
    assert trace.purified.shape == trace.noised.shape == images.shape
    other = purifier.with_mask(FullMask()).without_recomputation().with_steps(2)
    assert other.mask.__class__ is other.purifier.mask.__class__ is FullMask
    assert (other.nfe, other.purifier.recompute, purifier.nfe) == (2, False, 1)
    with pytest.raises(InputError, match=r"\(1, 16, 16\), the data has \(3, 16, 16\)"):
        purifier.check_image(images.expand(-1, 3, -1, -1))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "sde"])
def test_other_steps_change_nothing_else(sampler, unet, images):
    for made, steps in (
        (GradualPurifier(unet, [50, 200], [1, 4], sampler, False), [2, 2]),
        (UniformPurifier(unet, 200, 4, sampler, False), [2]),
    ):
        other = made.with_steps(2)
        wanted = GradualPurifier(unet, [rounds[0] for rounds in made.grids], steps, sampler)
        assert (other.recompute, made.without_recomputation().with_steps(2).recompute) == (False, False)
        assert torch.equal(other(images, keyed(6)), wanted(images, keyed(6)))


def test_the_walk_may_end_above_0(unet):
    purifier = HeterogeneousPurifier(unet, TOP, 201, 101, 4, "release", 3, end=1)
    assert (purifier.levels, purifier.lower[-1]) == ([201, 151, 101, 51], 1)
    assert purifier.with_steps(2).lower == [101, 1]
    # The share of the steps above low is rounded.
    assert HeterogeneousPurifier(unet, TOP, 100, 60, 4).levels == [100, 80, 60, 30]
    with pytest.raises(InputError, match="end = 101 < low < high = 201"):
        HeterogeneousPurifier(unet, TOP, 201, 101, 4, end=101)


@pytest.mark.parametrize("kind", ["none", "single", "release", "multi"])
def test_heterogeneous_follows_its_docstring(kind, unet, classifier, images):
    """Written a second time, plainly: x0 from eps, then back; fresh noise at every draw."""
    high, low, steps, jump, small = 300, 100, 5, 12, 4
    purifier = HeterogeneousPurifier(unet, TOP, high, low, steps, kind, jump, small)
    u, abar, step = 2 * images - 1, unet.schedule.abar.tolist(), -1
    mask = TOP(classifier, images, keyed(6))

    def draw():
        nonlocal step
        step += 1
        return keyed(6).normal(step, u)

    def at(t):
        return abar[t] ** 0.5 * u + (1 - abar[t]) ** 0.5 * draw()

    def merged(x, t):
        return torch.where(mask > 0, x, at(t))

    def back(x, t, s):
        eps = unet(x, torch.full((6,), t))
        clean = (x - (1 - abar[t]) ** 0.5 * eps) / abar[t] ** 0.5
        return abar[s] ** 0.5 * clean + (1 - abar[s]) ** 0.5 * eps

    def jumped(x, t):
        ratio = abar[t + jump] / abar[t]
        return ratio**0.5 * x + (1 - ratio) ** 0.5 * draw()

    def mended(x, t, walk):
        x = jumped(x, t)
        for k, (a, b) in enumerate(itertools.pairwise(walk)):
            x = back(merged(x, a) if k else x, a, b)
        return x

    def walk(t):
        return [t + 12, t + 9, t + 6, t + 3, t] if kind == "multi" else [t + 12, t]

    x = at(high)
    draw()  # the picture's
    for t, s in ((300, 233), (233, 167), (167, 100)):
        x = merged(x, t)
        if kind == "release":
            x = back(jumped(x, t), t + jump, s)
            continue
        if kind != "none" and t < high:
            x = mended(x, t, walk(t))
        x = back(x, t, s)
    if kind != "release":
        x = merged(x, low)
        if kind != "none":
            x = mended(x, low, walk(low))
    x = back(back(x, 100, 50), 50, 0)
    torch.testing.assert_close(purifier(images, keyed(6), mask), (x / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)
