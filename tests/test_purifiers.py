import itertools

import pytest
import torch
from conftest import FixedNoise, GaussianDenoiser, randomized

from lit_purify.attacks import PGD, Transfer
from lit_purify.data import Digits, First
from lit_purify.defense import (
    DefendedClassifier,
    GradualPurifier,
    HeterogeneousPurifier,
    NoPurifier,
    Ones,
    OtherClassifier,
    ResizedPurifier,
    TopFraction,
    UniformPurifier,
    VariableIntensityPurifier,
    Zeros,
)
from lit_purify.errors import InputError
from lit_purify.evaluation import RobustnessTask
from lit_purify.functional.diffusion import noised, to_diffusion
from lit_purify.functional.noise import ATTACK, KeyedNoise
from lit_purify.functional.schedule import grid
from lit_purify.models import ResNetClassifier

TOP = TopFraction(0.3)


def keyed(count, run=0):
    return KeyedNoise(0, torch.arange(count), torch.full((count,), run))


def every(denoiser, classifier, **options):
    resampled = {
        f"heterogeneous-{kind}": HeterogeneousPurifier(
            denoiser, classifier, TOP, 400, 200, 4, kind, 10, resampling_steps=5, **options
        )
        for kind in ("none", "single", "release", "multi")
    }
    return {
        "none": NoPurifier(denoiser, classifier, **options),
        "ddim": UniformPurifier(denoiser, classifier, 200, 4, "ddim", **options),
        "ddpm": UniformPurifier(denoiser, classifier, 200, 4, "ddpm", **options),
        "sde": UniformPurifier(denoiser, classifier, 200, 4, "sde", **options),
        "gradual": GradualPurifier(denoiser, classifier, [50, 200], [1, 4], "ddpm", **options),
        "variable": VariableIntensityPurifier(denoiser, classifier, TOP, 400, 200, 4, **options),
        "resized": ResizedPurifier(
            denoiser, classifier, lambda d, c: VariableIntensityPurifier(d, c, TOP, 400, 200, 4), **options
        ),
        **resampled,
    }


NAMES = ["none", "ddim", "ddpm", "sde", "gradual", "variable", "resized"]
NAMES += [f"heterogeneous-{k}" for k in ("none", "single", "release", "multi")]


@pytest.mark.parametrize("name", NAMES)
def test_nfe_counts_the_calls(name, classifier, images):
    denoiser = GaussianDenoiser(size=8)
    purifier = every(denoiser, classifier)[name]
    out = purifier(images, keyed(len(images)))
    assert len(denoiser.calls) == purifier.nfe
    assert out.shape == images.shape
    assert 0.0 <= float(out.min()) <= float(out.max()) <= 1.0


@pytest.mark.parametrize("name", NAMES)
def test_called_levels_are_the_stated_ones(name, classifier, images):
    denoiser = GaussianDenoiser(size=8)
    purifier = every(denoiser, classifier)[name]
    purifier(images, keyed(len(images)))
    called = [int(t.max()) for t in denoiser.calls]
    if name == "heterogeneous-single":
        assert called == [400, 310, 300, 210, 200, 100]
    elif name == "heterogeneous-release":
        assert called == [410, 310, 200, 100]
    elif name == "heterogeneous-multi":
        assert called == [400, 310, 308, 306, 304, 302, 300, 210, 208, 206, 204, 202, 200, 100]
    else:
        assert called == purifier.levels
    assert set(purifier.levels) <= {t if t % 100 == 0 else t - 10 for t in called} | set(called)


def test_heterogeneous_with_all_ones_is_uniform_from_high(unet, classifier, images, fixed):
    paper = HeterogeneousPurifier(unet, classifier, Ones(), 400, 200, 4, "none")
    assert torch.equal(paper(images, fixed), UniformPurifier(unet, classifier, 400, 4)(images, fixed))


def test_heterogeneous_with_all_zeros_is_uniform_from_low(unet, classifier, images, fixed):
    paper = HeterogeneousPurifier(unet, classifier, Zeros(), 400, 200, 4, "none")
    assert torch.equal(paper(images, fixed), UniformPurifier(unet, classifier, 200, 2)(images, fixed))


@pytest.mark.parametrize("mask", [Ones(), Zeros(), TOP])
def test_variable_with_a_constant_map_is_ddim(mask, unet, classifier, images):
    level = 250
    variable = VariableIntensityPurifier(unet, classifier, mask, level, level, 3)
    ddim = UniformPurifier(unet, classifier, level, 3)
    assert torch.equal(variable(images, keyed(6)), ddim(images, keyed(6)))
    assert torch.equal(
        VariableIntensityPurifier(unet, classifier, Zeros(), 400, level, 3)(images, keyed(6)), ddim(images, keyed(6))
    )


def test_heterogeneous_noise_is_strong_on_the_mask_and_weak_elsewhere(classifier, images, fixed):
    for purifier in (
        VariableIntensityPurifier(GaussianDenoiser(size=8), classifier, TOP, 400, 200, 4),
        HeterogeneousPurifier(GaussianDenoiser(size=8), classifier, TOP, 400, 200, 4),
    ):
        trace = purifier.trace(images, fixed)
        at, u = purifier.denoiser.schedule.at, to_diffusion(images)
        expected = trace.mask * noised(u, at(400), fixed.value) + (1 - trace.mask) * noised(u, at(200), fixed.value)
        torch.testing.assert_close(trace.noised, (expected * 0.5 + 0.5).clamp(0, 1))
        assert trace.mask.sum(dim=(1, 2, 3)).tolist() == [round(0.3 * 64)] * len(images)


def test_ddim_on_gaussian_data_follows_the_closed_form():
    """With the optimal denoiser each step is linear: x_s = a_s m + (x_t - a_t m) k, a factor worked out by hand."""
    denoiser = GaussianDenoiser(size=4)
    image, z = torch.rand(2, 1, 4, 4) * 0.5 + 0.25, torch.randn(2, 1, 4, 4)
    out = UniformPurifier(denoiser, None, 300, 3)(image, FixedNoise(z))
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
    out = UniformPurifier(denoiser, None, 600, 600, "ddpm")(image, keyed(64))
    u = 2 * out - 1
    assert float(u.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(u.var()) == pytest.approx(0.1, rel=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_gradient_has_the_same_bits(name, unet, classifier, images):
    gradients, outputs = [], []
    for recompute in (True, False):
        model = DefendedClassifier(every(unet, classifier, recompute=recompute)[name], classifier)
        leaf = images.clone().requires_grad_()
        out = model(leaf, keyed(len(images)))
        out.logsumexp(dim=1).sum().backward()
        gradients.append(leaf.grad)
        outputs.append(out.detach())
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(gradients[0], gradients[1])
    assert float(gradients[0].abs().sum()) > 0


@pytest.mark.parametrize("name", NAMES)
def test_gradient_agrees_with_finite_differences(name, unet, classifier):
    """In float64, along random directions. The mask is hard: it does not move under so small a change."""
    unet64, classifier64 = (network.__class__(**network.arguments).double().eval() for network in (unet, classifier))
    unet64.load_state_dict(unet.state_dict())
    classifier64.load_state_dict(classifier.state_dict())
    model = DefendedClassifier(every(unet64, classifier64)[name], classifier64)
    generator = torch.Generator().manual_seed(0)
    # Mid-gray, so that the final clipping to [0, 1] leaves most pixels differentiable.
    image = 0.4 + 0.2 * torch.rand(2, 1, 8, 8, generator=generator, dtype=torch.float64)
    leaf = image.clone().requires_grad_()
    model(leaf, keyed(2)).square().sum().backward()
    for _ in range(3):
        direction = torch.randn(image.shape, generator=generator, dtype=torch.float64)
        step = 1e-6
        high, low = (model(image + sign * step * direction, keyed(2)).square().sum() for sign in (1, -1))
        assert float((high - low) / (2 * step)) == pytest.approx(float((leaf.grad * direction).sum()), rel=1e-5)


def test_memory_does_not_hold_activations(unet, classifier, images):
    """Tensors kept for the backward pass: with recomputation far fewer numbers than without."""
    kept = {}
    for recompute in (True, False):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        purifier = UniformPurifier(unet, classifier, 200, 8, recompute=recompute)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            purifier(images.clone().requires_grad_(), keyed(len(images)))
        kept[recompute] = total
    # The last of eight calls alone.
    assert kept[True] < 1.1 * kept[False] / 8


def test_defended_classifier_without_a_key_is_randomized(unet, classifier, images):
    model = DefendedClassifier(UniformPurifier(unet, classifier, 300, 2), classifier)
    torch.manual_seed(0)
    first, second = model(images), model(images)
    torch.manual_seed(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, model(images))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d, c: UniformPurifier(d, c, 0, 1), "level = 0"),
        (lambda d, c: UniformPurifier(d, c, 1001, 4), "level = 1001"),
        (lambda d, c: UniformPurifier(d, c, 3, 4), "steps = 4"),
        (lambda d, c: UniformPurifier(d, c, 100, 0), "steps = 0"),
        (lambda d, c: HeterogeneousPurifier(d, c, TOP, 100, 200, 4), "low = 200"),
        (lambda d, c: HeterogeneousPurifier(d, c, TOP, 100, 100, 4), "low = 100"),
        (lambda d, c: HeterogeneousPurifier(d, c, TOP, 995, 100, 4, jump=10), "1005"),
        (lambda d, c: HeterogeneousPurifier(d, c, TOP, 200, 100, 1), "steps = 1"),
        (lambda d, c: VariableIntensityPurifier(d, c, TOP, 100, 200, 4), "low = 200"),
        (lambda d, c: VariableIntensityPurifier(d, c, TOP, 100, -1, 4), "low = -1"),
    ],
)
def test_impossible_settings_are_refused(make, message, unet, classifier):
    with pytest.raises(InputError, match=message):
        make(unet, classifier)


def test_another_classifier_is_attacked_as_itself(unet, classifier, images):
    """Also by attacks on bare classifiers; and it is checked and frozen like the first."""
    other = randomized(ResNetClassifier(depth=8, size=8, num_classes=10, channels=1, width=4), seed=1)
    other.requires_grad_(True)
    pgd = PGD("linf", 0.1, steps=3, step_size=0.05)
    make = {"none": NoPurifier, "other": lambda d, c: OtherClassifier(d, c, other)}
    task = RobustnessTask(classifier, unet, make, {"pgd": pgd, "transfer": Transfer(pgd)}, runs=1)
    label, noise = torch.arange(6), KeyedNoise(0, torch.arange(6), torch.zeros(6, dtype=torch.int64), ATTACK)
    batch = {"image": images, "label": label, "index": torch.arange(6)}
    for attack in ("pgd", "transfer"):
        found = [task._perturbed(name, attack, batch, 6) for name in task.defenses]
        assert not torch.equal(*found)
        assert torch.equal(found[1], pgd(lambda x, _: other(x), images, label, noise, 6))
    assert torch.equal(task.defenses["other"](images, noise), other(images))
    assert not any(p.requires_grad for p in task.parameters())
    task.check(Digits(subset=First(1)))
    wrong = randomized(ResNetClassifier(depth=8, size=8, num_classes=9, channels=1, width=4))
    with pytest.raises(InputError, match="the classifier 9"):
        RobustnessTask(classifier, unet, {"other": lambda d, c: OtherClassifier(d, c, wrong)}, {"pgd": pgd}).check(
            Digits(subset=First(1))
        )


def test_rounds_go_on_from_what_the_round_before_has_left(unet, classifier, images, fixed):
    x = to_diffusion(images)
    for level in (40, 300):
        x = noised(x, unet.schedule.at(level), fixed.normal(0, x))
        x = UniformPurifier(unet, classifier, level, 1).ddim(x, level, 0)
    purified = GradualPurifier(unet, classifier, [40, 300], [1, 1])(images, fixed)
    torch.testing.assert_close(purified, (x / 2 + 0.5).clamp(0, 1))
    with pytest.raises(InputError, match="2 rounds, steps 1"):
        GradualPurifier(unet, classifier, [40, 300], [1])


def test_rounds_draw_noise_of_their_own(classifier, images):
    """A denoiser that takes nothing away: what is left of two rounds has the variance of both."""
    denoiser = GaussianDenoiser(size=8)
    denoiser.forward = lambda x, t: torch.zeros_like(x)
    twice = GradualPurifier(denoiser, classifier, [1, 1], [1, 1]).trace(images, keyed(6))
    once = GradualPurifier(denoiser, classifier, [1], [1]).trace(images, keyed(6))
    spread = [(trace.purified - images)[images.sub(0.5).abs() < 0.4].square().mean() for trace in (once, twice)]
    assert float(spread[1] / spread[0]) == pytest.approx(2.0, rel=0.35)


def test_resized_purifies_at_the_size_of_the_denoiser(classifier, images):
    denoiser = GaussianDenoiser(size=16)
    purifier = ResizedPurifier(denoiser, classifier, lambda d, c: VariableIntensityPurifier(d, c, TOP, 2, 1, 1))
    purifier.check_image(images)
    trace = purifier.trace(images, keyed(6))
    # The rule sees the small image; enlarged, its mask is what was purified by.
    assert torch.equal(trace.mask, TOP(classifier, images, keyed(6)))
    assert {t.shape[-1] for t in denoiser.calls} == {16}
    assert torch.equal(denoiser.calls[0][:, :, ::2, ::2] == 2, trace.mask > 0.5)
    assert trace.purified.shape == trace.noised.shape == images.shape
    other = purifier.with_mask(Ones()).without_recomputation().with_steps(2)
    assert other.mask.__class__ is Ones
    assert (other.nfe, other.purifier.recompute, purifier.nfe) == (2, False, 1)
    with pytest.raises(InputError, match=r"\(1, 16, 16\), the data has \(3, 16, 16\)"):
        purifier.check_image(images.expand(-1, 3, -1, -1))
    another = randomized(ResNetClassifier(8, 8, 10, 1, 4))
    with pytest.raises(InputError, match="another classifier needs no resizing"):
        ResizedPurifier(denoiser, classifier, lambda d, c: OtherClassifier(d, c, another))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "sde"])
@pytest.mark.parametrize("recompute", [True, False])
def test_other_steps_change_nothing_else(sampler, recompute, unet, classifier, images):
    for made, steps in (
        (GradualPurifier(unet, classifier, [50, 200], [1, 4], sampler, recompute), [2, 2]),
        (UniformPurifier(unet, classifier, 200, 4, sampler, recompute), [2]),
    ):
        other = made.with_steps(2)
        levels = [rounds[0] for rounds in made.grids]
        wanted = GradualPurifier(unet, classifier, levels, steps, sampler, recompute)
        assert other.recompute == recompute
        assert torch.equal(other(images, keyed(6)), wanted(images, keyed(6)))


def test_the_walk_may_end_above_0(unet, classifier):
    purifier = HeterogeneousPurifier(unet, classifier, TOP, 201, 101, 4, "release", 3, end=1)
    assert (purifier.levels, purifier.lower[-1]) == ([201, 151, 101, 51], 1)
    assert purifier.with_steps(2).lower == [101, 1]
    with pytest.raises(InputError, match="end = 101 < low < high = 201"):
        HeterogeneousPurifier(unet, classifier, TOP, 201, 101, 4, end=101)
