import pytest
import torch

from lit_purify.defense import (
    Inverse,
    MinMaxThreshold,
    Ones,
    RandomArea,
    Renormalized,
    Rolled,
    SoftmaxThreshold,
    TopFraction,
    Zeros,
)
from lit_purify.defense.masks import Relaxed
from lit_purify.errors import InputError
from lit_purify.functional import mask as F
from lit_purify.functional.noise import KeyedNoise


def noise(count, run=0):
    return KeyedNoise(0, torch.arange(count), torch.full((count,), run))


def test_saliency_sums_channels_and_resizes():
    feature = torch.tensor([1.0, -2.0]).reshape(1, 2, 1, 1).expand(1, 2, 4, 4)
    out = F.saliency([feature, 3 * feature[:, :, :2, :2]], (8, 8))
    assert out.shape == (1, 2, 8, 8)
    assert torch.allclose(out[:, 0], torch.full((1, 8, 8), 5.0))
    assert torch.allclose(out[:, 1], torch.full((1, 8, 8), 45.0))
    assert torch.allclose(F.saliency([feature], (4, 4), power=1.0), torch.full((1, 1, 4, 4), 3.0))


def test_normalizations():
    maps = torch.randn(2, 3, 4, 4).abs()
    soft, scaled = F.softmax_normalize(maps), F.minmax_normalize(maps)
    assert torch.allclose(soft.sum(dim=(2, 3)), torch.ones(2, 3))
    assert torch.allclose(soft[0, 0].log().diff(dim=0), maps[0, 0].diff(dim=0), atol=1e-5)
    assert torch.equal(scaled.amin(dim=(2, 3)), torch.zeros(2, 3))
    assert torch.equal(scaled.amax(dim=(2, 3)), torch.ones(2, 3))
    assert torch.equal(F.minmax_normalize(torch.ones(1, 1, 2, 2)), torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("build", ["build", "relaxed"])
def test_renormalized_shows_the_classifier_another_image(build, classifier, images):
    rule, width = MinMaxThreshold(0.5), [0.1] * (build == "relaxed")
    found = getattr(Renormalized(rule, [0.7], [0.1]), build)(classifier, images, noise(6), *width)
    assert torch.equal(found, getattr(rule, build)(classifier, (images - 0.7) / 0.1, noise(6), *width))
    with pytest.raises(InputError, match="std"):
        Renormalized(rule, [0.7], [0.0])


def test_union_of_blocks():
    maps = torch.zeros(1, 2, 2, 2)
    maps[0, 0, 0, 0] = maps[0, 1, 1, 1] = 0.95
    maps[0, 0, 0, 1] = 0.9
    assert F.threshold_union(maps, 0.9).tolist() == [[[[1.0, 0.0], [0.0, 1.0]]]]


def test_top_fraction_has_the_exact_area_even_with_ties():
    for maps in (torch.rand(3, 2, 8, 8), torch.zeros(3, 2, 8, 8)):
        assert F.top_fraction(maps, 0.15).sum(dim=(1, 2, 3)).tolist() == [10.0] * 3
    chosen = F.top_fraction(torch.arange(16.0).reshape(1, 1, 4, 4), 0.25)
    assert chosen[0, 0].tolist() == [[0] * 4] * 3 + [[1] * 4]


@pytest.mark.parametrize(
    "rule",
    [
        SoftmaxThreshold(0.02),
        MinMaxThreshold(0.5),
        TopFraction(0.25),
        Ones(),
        Zeros(),
        Inverse(TopFraction(0.25)),
        Rolled(TopFraction(0.25)),
    ],
)
def test_rules_give_binary_masks_for_each_sample_alone(rule, classifier, images):
    mask = rule(classifier, images, noise(len(images)))
    assert mask.shape == (len(images), 1, 8, 8)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(rule(classifier, images[2:3], noise(1)), mask[2:3])
    assert not mask.requires_grad


def test_mask_follows_the_classifiers_features(classifier, images):
    expected = F.top_fraction(F.minmax_normalize(F.saliency(classifier.features(images), (8, 8))), 0.25)
    mask = TopFraction(0.25)(classifier, images, noise(len(images)))
    assert torch.equal(mask, expected)
    assert torch.equal(Inverse(TopFraction(0.25))(classifier, images, noise(len(images))), 1 - expected)


def test_rolled_by_half_the_image(classifier, images):
    base = TopFraction(0.25)(classifier, images, noise(len(images)))[:, 0]
    mask = Rolled(TopFraction(0.25))(classifier, images, noise(len(images)))[:, 0]
    assert torch.equal(mask[:, :4, :4], base[:, 4:, 4:])
    assert torch.equal(mask[:, 4:, :4], base[:, :4, 4:])
    assert torch.equal(mask.sum(dim=(1, 2)), base.sum(dim=(1, 2)))
    assert not torch.equal(mask, base)


def test_random_area(classifier, images):
    base, rule = MinMaxThreshold(0.5), RandomArea(MinMaxThreshold(0.5))
    mask = rule(classifier, images, noise(len(images)))
    assert torch.equal(mask.sum(dim=(1, 2, 3)), base(classifier, images, noise(6)).sum(dim=(1, 2, 3)))
    assert torch.equal(mask, rule(classifier, images, noise(len(images))))
    assert not torch.equal(mask, rule(classifier, images, noise(len(images), run=1)))
    # Every pixel gets its turn.
    share = torch.stack([rule(classifier, images, noise(6, run=r)) for r in range(200)]).mean(dim=0)
    assert float((share - share.mean(dim=(2, 3), keepdim=True)).abs().max()) < 0.2


@pytest.mark.parametrize(
    "rule", [lambda: MinMaxThreshold(1.0), lambda: SoftmaxThreshold(0.0), lambda: TopFraction(1.5)]
)
def test_thresholds_out_of_range(rule):
    with pytest.raises(InputError, match=r"outside \(0, 1\)"):
        rule()


def test_relaxation_needs_a_temperature():
    with pytest.raises(InputError, match="temperature ="):
        Relaxed(TopFraction(0.3), True, 0.0)
