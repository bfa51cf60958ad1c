"""Masks of several grades, and what a sampler makes of them."""

import itertools

import pytest
import torch
from conftest import RESNET, GaussianDenoiser, keyed, randomized

import lit_purify as lp
from lit_purify.errors import InputError
from lit_purify.functional import mask as F
from lit_purify.functional.diffusion import noised, step_back, to_diffusion, to_image
from lit_purify.models import ResNetClassifier

NESTED = lp.AverageMask([lp.TopFraction(0.1), lp.TopFraction(0.3), lp.TopFraction(0.6)])
RULES = {"votes": NESTED, "proportional": lp.QuantizedSaliency(5), "inverse": lp.InvertedMask(NESTED)}


@pytest.mark.parametrize("name", RULES)
def test_grades_are_the_stated_ones_for_each_sample_alone(name, classifier, images):
    rule = RULES[name]
    mask = rule(classifier, images, keyed(6))
    assert mask.shape == (6, 1, 8, 8)
    assert torch.allclose((mask * rule.grades).round() / rule.grades, mask, atol=1e-6)
    assert len(mask.unique()) > 2
    assert torch.equal(rule(classifier, images[2:3], keyed(1)), mask[2:3])
    assert not mask.requires_grad


def test_maps_follow_the_attention(classifier, images):
    score = F.minmax_normalize(F.saliency(classifier.features(images), (8, 8))).amax(dim=1, keepdim=True)
    proportional, votes = lp.QuantizedSaliency(5)(classifier, images, keyed(6)), NESTED(classifier, images, keyed(6))
    assert (proportional - score).abs().max() <= 0.5 / 5 + 1e-6
    # The top 10 % have all three votes, the next 20 % two ...
    assert [(votes * 3).round().eq(k).sum().item() // 6 for k in (3, 2, 1)] == [6, 13, 19]
    for image, vote in zip(score, votes, strict=True):
        assert image[vote > 0.9].min() >= image[vote < 0.9].max() - 1e-6


def test_what_a_rule_depends_on_is_what_its_parts_depend_on(classifier):
    """A mask that is drawn anew in every run must not be kept; one with a gradient anywhere has one."""
    followed, drawn = lp.TopFraction(0.3), lp.RandomArea(lp.TopFraction(0.3))
    full = lp.FullMask()
    for rules, of_image in (([followed, full], True), ([followed, drawn], False), ([drawn], False)):
        assert lp.AverageMask(rules).of_image == of_image
    for rules, relaxable in (([followed, full], True), ([full], False), ([drawn], False)):
        assert lp.AverageMask(rules).relaxable == relaxable
    for move in (lp.ShiftedMask, lp.InvertedMask):
        assert (move(followed).of_image, move(drawn).of_image) == (True, False)
    for rule in (followed, drawn, full):
        other = lp.ExternalAttention(rule, classifier)
        assert (other.of_image, other.relaxable) == (rule.of_image, rule.relaxable)


@pytest.mark.parametrize("name", RULES)
def test_every_pixel_walks_down_from_its_own_level(name, classifier, images):
    """Against the sampler written with whole maps of levels; the denoiser takes every pixel for itself."""
    denoiser, rule, high, low, steps = GaussianDenoiser(size=8), RULES[name], 300, 120, 3
    purifier = lp.VariableIntensityPurifier(denoiser, rule, high, low, steps)
    trace = purifier.trace(images, keyed(6), rule(classifier, images, keyed(6)))
    start = (low + (high - low) * rule(classifier, images, keyed(6)).double() + 0.5).floor()
    u, at = to_diffusion(images), lambda t: denoiser.schedule.at(t).float()
    maps = [(start * (steps - k) / steps + 0.5).floor().long() for k in range(steps + 1)]
    x = noised(u, at(maps[0]), keyed(6).normal(0, u))
    assert torch.allclose(trace.noised, to_image(x), atol=1e-6)
    for t, s in itertools.pairwise(maps):
        x = step_back(x, denoiser(x, t), at(t), at(s))
    assert torch.allclose(trace.purified, to_image(x), atol=1e-5)
    assert purifier.start == sorted(set(maps[0].unique().tolist()) | set(purifier.start), reverse=True)
    assert (purifier.start[0], purifier.start[-1], len(purifier.start)) == (high, low, rule.grades + 1)


def test_walks_start_at_whole_levels():
    """131.25 is 131, two thirds of which are 87; of 131.25 they would be 88."""
    purifier = lp.VariableIntensityPurifier(GaussianDenoiser(size=8), RULES["votes"], 300, 75, 3)
    assert purifier.walks(4)[1] == [131, 87, 44, 0]
    assert purifier.walks(1) == [[75, 50, 25, 0], [300, 200, 100, 0]]


@pytest.mark.parametrize("name", ["votes", "proportional"])
def test_gradients_lead_through_the_grades(name, unet, classifier, images):
    defended = lp.DefendedClassifier(lp.VariableIntensityPurifier(unet, RULES[name], 400, 150, 2), classifier)
    views = {kind: lp.Exact(kind).attacked(defended).function for kind in ("frozen", "straight_through", "soft")}
    gradients = {}
    for kind, view in views.items():
        leaf = images.clone().requires_grad_()
        logits = view(leaf, keyed(6))
        if kind != "soft":
            assert torch.equal(logits, defended(images, keyed(6)))
        gradients[kind] = torch.autograd.grad(logits.square().sum(), leaf)[0]
    assert not torch.allclose(gradients["frozen"], gradients["straight_through"], rtol=1e-3)
    assert not torch.allclose(gradients["frozen"], gradients["soft"], rtol=1e-3)


def test_a_relaxed_mask_tells_the_denoiser_the_nearest_grade(classifier, images):
    """It blends two grades, but pixels have one level each: that of the grade that they are nearer to."""
    denoiser, rule = GaussianDenoiser(size=8), lp.TopFraction(0.3)
    defended = lp.DefendedClassifier(lp.VariableIntensityPurifier(denoiser, rule, 400, 100, 1), classifier)
    lp.Exact("soft", 0.5).attacked(defended).function(images, keyed(6))
    relaxed = rule.relaxed(classifier, images, keyed(6), 0.5)
    assert ((relaxed > 0.5) & (relaxed < 0.9)).any()
    assert torch.equal(denoiser.calls[0] == 400, relaxed > 0.5)


def test_attention_of_another_network(classifier, images):
    other = randomized(ResNetClassifier(**RESNET), seed=1)
    rule = lp.ExternalAttention(lp.TopFraction(0.3), other.requires_grad_(True))
    mask = rule(classifier, images, keyed(6))
    assert torch.equal(mask, lp.TopFraction(0.3)(other, images, keyed(6)))
    assert not torch.equal(mask, lp.TopFraction(0.3)(classifier, images, keyed(6)))
    assert rule.relaxable
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(rule.relaxed(classifier, leaf, keyed(6), 0.1).sum(), leaf)
    assert gradient.abs().sum() > 0
    assert not any(p.requires_grad for p in other.parameters())
    assert rule(classifier, images.double(), keyed(6)).dtype == torch.float64
    other.float()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda d, c: lp.AverageMask([]), "0 grades"),
        (lambda d, c: lp.AverageMask([NESTED]), "several grades cannot be averaged"),
        (lambda d, c: lp.QuantizedSaliency(64), "use 1 to 63"),
        (lambda d, c: lp.HeterogeneousPurifier(d, NESTED, 200, 100, 4), "use VariableIntensityPurifier"),
        (lambda d, c: lp.ExternalAttention(lp.TopFraction(0.3), c)(c, torch.rand(1, 3, 8, 8), keyed(1)), "channels"),
    ],
)
def test_refusals(make, said, unet, classifier):
    with pytest.raises(InputError, match=said):
        make(unet, classifier)
