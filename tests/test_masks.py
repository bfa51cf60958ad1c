import pytest
import torch
from conftest import keyed
from sklearn.datasets import load_sample_image
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate

import lit_purify as lp
from lit_purify.errors import InputError, notice
from lit_purify.functional import mask as F
from lit_purify.functional.images import resize
from lit_purify.models import Classifier


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
    rule, width = lp.MinMaxThreshold(0.5), [0.1] * (build == "relaxed")
    found = getattr(lp.RenormalizedInput(rule, [0.7], [0.1]), build)(classifier, images, keyed(6), *width)
    assert torch.equal(found, getattr(rule, build)(classifier, (images - 0.7) / 0.1, keyed(6), *width))
    with pytest.raises(InputError, match="std"):
        lp.RenormalizedInput(rule, [0.7], [0.0])


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
    # Of the maximum over blocks; and of values that differ by little.
    maps = torch.tensor([[[[1.0, 0.6]], [[0.0, 0.6]]]])
    assert F.top_fraction(maps, 0.5).tolist() == [[[[1.0, 0.0]]]]
    plateau = torch.full((1, 1, 16, 16), 0.5)
    plateau[..., 8:, :] += 2.0**-24 * 1.5
    assert F.top_fraction(plateau, 0.5)[0, 0, :8].eq(1).all()


@pytest.mark.parametrize(
    "rule",
    [
        lp.SoftmaxThreshold(0.02),
        lp.MinMaxThreshold(0.5),
        lp.TopFraction(0.25),
        lp.FullMask(),
        lp.EmptyMask(),
        lp.InvertedMask(lp.TopFraction(0.25)),
        lp.ShiftedMask(lp.TopFraction(0.25)),
    ],
)
def test_rules_give_binary_masks_for_each_sample_alone(rule, classifier, images):
    mask = rule(classifier, images, keyed(len(images)))
    assert mask.shape == (len(images), 1, 8, 8)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(rule(classifier, images[2:3], keyed(1)), mask[2:3])
    assert not mask.requires_grad


def test_mask_follows_the_classifiers_features(classifier, images):
    expected = F.top_fraction(F.minmax_normalize(F.saliency(classifier.features(images), (8, 8))), 0.25)
    mask = lp.TopFraction(0.25)(classifier, images, keyed(len(images)))
    assert torch.equal(mask, expected)
    assert torch.equal(lp.InvertedMask(lp.TopFraction(0.25))(classifier, images, keyed(len(images))), 1 - expected)


def test_rolled_by_half_the_image(classifier, images):
    base = lp.TopFraction(0.25)(classifier, images, keyed(len(images)))[:, 0]
    mask = lp.ShiftedMask(lp.TopFraction(0.25))(classifier, images, keyed(len(images)))[:, 0]
    assert torch.equal(mask[:, :4, :4], base[:, 4:, 4:])
    assert torch.equal(mask[:, 4:, :4], base[:, :4, 4:])
    assert torch.equal(mask.sum(dim=(1, 2)), base.sum(dim=(1, 2)))
    assert not torch.equal(mask, base)


def test_random_area(classifier, images):
    base, rule = lp.MinMaxThreshold(0.5), lp.RandomArea(lp.MinMaxThreshold(0.5))
    mask = rule(classifier, images, keyed(len(images)))
    assert torch.equal(mask.sum(dim=(1, 2, 3)), base(classifier, images, keyed(6)).sum(dim=(1, 2, 3)))
    assert torch.equal(mask, rule(classifier, images, keyed(len(images))))
    assert not torch.equal(mask, rule(classifier, images, keyed(len(images), run=1)))
    # Every pixel gets its turn.
    share = torch.stack([rule(classifier, images, keyed(6, run=r)) for r in range(200)]).mean(dim=0)
    assert float((share - share.mean(dim=(2, 3), keepdim=True)).abs().max()) < 0.2


@pytest.mark.parametrize(
    "rule", [lambda: lp.MinMaxThreshold(1.0), lambda: lp.SoftmaxThreshold(0.0), lambda: lp.TopFraction(1.5)]
)
def test_thresholds_out_of_range(rule):
    with pytest.raises(InputError, match=r"above 0 and below 1"):
        rule()


# Where a network of coarse blocks looks, on photographs.


class LooksAtTheFlower(nn.Module):
    """Five stages, as a ResNet-18 has, which see orange; the last one has 2x2 cells at 64 pixels."""

    def forward_intermediates(self, x, intermediates_only, output_fmt):
        orange = (x[:, :1] - x[:, 1:].mean(dim=1, keepdim=True)).clamp(min=0)
        return [avg_pool2d(orange, 2**k) for k in range(1, 6)]


def flowers():
    """A flower in the middle of an image of 64 pixels, and in each quadrant."""
    photo = torch.tensor(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None] / 255
    flower, leaves = resize(photo[..., 75:365, 160:450], 24), resize(photo[..., :190, 450:640], 64)
    images = leaves.repeat(5, 1, 1, 1)
    for image, (top, left) in zip(images, [(20, 20), (4, 4), (4, 36), (36, 4), (36, 36)], strict=True):
        image[:, top : top + 24, left : left + 24] = flower[0]
    return images


def shares(mask, side, places):
    """Part of each mask's area that lies in squares of ``side`` pixels at ``places``, (B, places)."""
    squares = [mask[:, 0, y : y + side, x : x + side].sum(dim=(1, 2)) for y, x in places]
    return torch.stack(squares, dim=1) / mask.sum(dim=(1, 2, 3))[:, None]


QUADRANTS, CORNERS = [(y, x) for y in (0, 32) for x in (0, 32)], [(y, x) for y in (0, 48) for x in (0, 48)]


@pytest.mark.parametrize(
    "rule", [lp.TopFraction(0.15), lp.TopFraction(0.3), lp.MinMaxThreshold(0.5), lp.MinMaxThreshold(0.9)]
)
def test_masks_lie_on_the_flower(rule, capsys):
    notice.cache_clear()
    mask = rule(Classifier(LooksAtTheFlower(), size=64, num_classes=2), flowers(), keyed(5))
    assert "1 of its 5 blocks are left out: has fewer than 4x4 cells\n" in capsys.readouterr().err
    assert shares(mask, 32, QUADRANTS)[1:].diagonal().min() > 0.75
    assert shares(mask, 32, QUADRANTS)[0].max() < 0.45
    assert shares(mask, 16, CORNERS)[0].sum() < 0.05


def test_coarse_blocks_are_warned_about_and_have_no_plateaus(capsys):
    """Asked for by name they count; the strongest of 2x2 cells is a hill then, and not a whole corner."""
    notice.cache_clear()
    network = nn.Sequential(nn.AvgPool2d(16), nn.AvgPool2d(2))
    one, two = (Classifier(network, size=64, num_classes=2, blocks=[name]).features(flowers()) for name in "01")
    said = capsys.readouterr().err
    assert said == "blocks: 1 has fewer than 4x4 cells: its mask covers whole corners; leave it out\n"
    for feature in (one[0], two[0]):
        maps = F.saliency([feature], (64, 64))
        assert ((maps == maps.amax(dim=(2, 3), keepdim=True)).sum(dim=(1, 2, 3)) <= 4).all()
    # Centers of cells keep their value; blocks as fine as published ones are resized as published.
    assert torch.equal(F.enlarged(two[0][:, :1], (2, 2)), two[0][:, :1])
    for cells, size in ((8, 32), (7, 224), (2, 8)):
        maps = torch.rand(2, 1, cells, cells)
        assert torch.equal(F.enlarged(maps, (size, size)), interpolate(maps, size=(size, size), mode="bilinear"))


def test_masks_are_built_without_a_graph_and_use_their_power(classifier, images):
    class Probe(lp.Mask):
        def build(self, classifier, image, noise):
            assert not torch.is_grad_enabled()
            return torch.ones_like(image[:, :1])

    Probe()(classifier, images, keyed(6))
    expected = F.threshold_union(F.softmax_normalize(F.saliency(classifier.features(images), (8, 8), 1.0)), 0.02)
    assert torch.equal(lp.SoftmaxThreshold(0.02, power=1.0)(classifier, images, keyed(6)), expected)
