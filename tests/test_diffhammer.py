"""DiffHammer against its equations written a second time, and restarts over losses."""

import math

import pytest
import torch
from conftest import keyed as keyed_in

from lit_purify.attacks import APGD, PGD, DiffHammer, Restarts
from lit_purify.defense import BPDA, DefendedClassifier, Exact, HeterogeneousPurifier, MinMaxThreshold, UniformPurifier
from lit_purify.functional.chunks import AttackedFunction, carried_in_chunks
from lit_purify.functional.losses import margin_loss, named_loss, success
from lit_purify.functional.noise import ATTACK

RUNS = [0, 1, 2, 3]


def keyed(count, run=0):
    return keyed_in(count, run, stream=ATTACK)


def look(attack, model, image, label, runs=RUNS):
    """The gradient that a step follows."""
    return attack._observe(model, named_loss(attack.loss), image, label, keyed(len(image)), runs, 5)[1]


def unit(r, norm):
    return r.sign() if norm == "linf" or not r.any() else r / r.square().sum().sqrt()


def by_hand(loss, gradient, norm, eps, rounds, sharpness):
    """Chosen draw and direction of one sample from its losses (N,) and gradients (N, P), draw by draw."""
    n = len(loss)

    def expected(i, r):
        return float(loss[i] + eps * (unit(r, norm) * gradient[i]).sum())

    def elu(value):
        return value if value > 0 else math.exp(value) - 1

    scores = [sum(elu(expected(i, gradient[j])) for i in range(n)) for j in range(n)]
    j = scores.index(max(scores))
    r = gradient[j]
    for _ in range(rounds):
        weights = [1 / (1 + math.exp(-sharpness * expected(i, r))) for i in range(n)]
        r = sum(w * g for w, g in zip(weights, gradient, strict=True)) / sum(weights)
    return j, r


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["margin", "ce", "dlr"])
def test_gradient_is_the_closed_form_on_a_linear_classifier_behind_additive_noise(norm, loss):
    """y = (scale + n') x + sigma n, logits = W y: the derivative of the purifier is a factor of each pixel and draw."""
    generator = torch.Generator().manual_seed(0)
    weight, image = torch.randn(4, 9, generator=generator), torch.rand(6, 1, 3, 3, generator=generator)
    scale = torch.rand(1, 1, 3, 3, generator=generator) + 0.5
    label = (scale * image).flatten(1).matmul(weight.T).argmax(dim=1)
    model = AttackedFunction(
        lambda purified, noise: purified.flatten(1) @ weight.T,
        lambda image, noise, mask: (scale + 0.3 * noise.normal(1, image)) * image + 0.8 * noise.normal(0, image),
    )
    attack = DiffHammer(norm, 0.3, 2, 0.2, eot=4, loss=loss, rounds=3, sharpness=2.0)
    found, chosen = look(attack, model, image, label), set()
    for k in range(len(image)):
        draws = [keyed(6).runs([run]).rows(torch.tensor([k])) for run in RUNS]
        slopes = [scale[0] + 0.3 * draw.normal(1, image[k : k + 1])[0] for draw in draws]
        shown = [
            a * image[k] + 0.8 * draw.normal(0, image[k : k + 1])[0] for a, draw in zip(slopes, draws, strict=True)
        ]
        purified = torch.stack(shown).requires_grad_()
        losses = named_loss(loss)(purified.flatten(1) @ weight.T, label[k].expand(4))
        gradient = torch.autograd.grad(losses.sum(), purified)[0].flatten(1)
        border = math.log(2.0) if loss == "ce" else 0.0
        j, r = by_hand(losses.detach() - border, gradient, norm, 0.3, 3, 2.0)
        torch.testing.assert_close(found[k], slopes[j] * r.reshape(1, 3, 3), rtol=1e-4, atol=1e-6)
        chosen.add(j)
    assert len(chosen) > 1


def test_with_one_draw_it_is_pgd(unet, classifier, images):
    """Selection and EM are then trivial, and grafting is the chain rule."""
    model = DefendedClassifier(UniformPurifier(unet, 300, 3), classifier)
    label, settings = torch.arange(6), ("l2", 0.5, 3, 0.2, 1)
    hammer, pgd = DiffHammer(*settings, decay=0.0), PGD(*settings)
    gradients = [look(attack, model.attacked(), images, label, [7]) for attack in (hammer, pgd)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*(attack(model, images, label, keyed(6)) for attack in (hammer, pgd)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("view", [Exact(), Exact("straight_through"), Exact("soft"), BPDA()])
def test_what_is_grafted_is_the_gradient_of_the_attacked_function(view, unet, classifier, images):
    """Frozen, straight-through and soft masks, and the identity: as plain autograd through the view gives it."""
    defended = DefendedClassifier(HeterogeneousPurifier(unet, MinMaxThreshold(0.4), 300, 150, 3), classifier)
    function, direction = view.attacked(defended).function, torch.randn(6, 1, 8, 8)
    found = carried_in_chunks(function, images, keyed(6, 3), direction, 4)
    leaf = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad((function.purified(leaf, keyed(6, 3), None) * direction).sum(), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    plain = Exact().attacked(defended).function
    same = torch.allclose(carried_in_chunks(plain, images, keyed(6, 3), direction, 4), found, rtol=1e-3)
    assert same == (view.arguments.get("mask") == "frozen")
    if isinstance(view, BPDA):
        torch.testing.assert_close(found, direction)


def test_the_parts_of_a_defense_make_its_logits(unet, classifier, images):
    """Bit for bit; a class of somebody's own with another forward pass is one part."""
    defended = DefendedClassifier(HeterogeneousPurifier(unet, MinMaxThreshold(0.4), 300, 150, 3), classifier)
    assert torch.equal(defended.attacked()(images, keyed(6)), defended(images, keyed(6)))

    class Doubled(DefendedClassifier):
        def forward(self, image, noise=None, mask=None):
            return 2.0 * super().forward(image, noise, mask)

    doubled = Doubled(defended.purifier, classifier)
    assert doubled.attacked().purified is None
    assert torch.equal(doubled.attacked()(images, keyed(6)), 2.0 * defended(images, keyed(6)))


def test_where_draws_disagree_the_vulnerable_ones_are_followed():
    """One number x from 0 to 1: under heads (a third) x above 0.6 is wrong; under tails nothing is, but the margin
    falls three times as steeply with x. The average follows tails.
    """

    def model(x, noise):
        x, heads = x[:, 0, 0, 0], noise.run % 3 == 0
        margin = torch.where(heads, 2.0 * (x - 0.6), -8.0 - 6.0 * x)
        return torch.stack([torch.zeros_like(margin), margin], dim=1)

    image, label, settings = torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, dtype=torch.long), ("linf", 0.4, 20, 0.05, 9)
    assert float(PGD(*settings)(model, image, label, keyed(1))) < 0.2
    assert float(DiffHammer(*settings)(model, image, label, keyed(1))) > 0.8


def test_a_draw_within_reach_counts_more_than_many_out_of_reach():
    """Ahead along the first gradient lie 3, -6, -6, along the others -3, -2, -2: a larger sum, but nothing broken."""
    loss, gradient = torch.tensor([[0.0, -4.0, -4.0]]), torch.tensor([3.0, -2.0, -2.0]).reshape(1, 3, 1, 1, 1)
    chosen, direction = DiffHammer("linf", 1.0, 5, rounds=0).selected(loss, gradient)
    assert (int(chosen), float(direction)) == (0, 3.0)


def test_weights_of_a_sample_that_no_draw_breaks_are_numbers():
    loss, gradient = torch.full((2, 3), -1e4), torch.randn(2, 3, 1, 2, 2)
    _, direction = DiffHammer("linf", 0.1, 5).selected(loss, gradient)
    assert bool(direction.isfinite().all())
    assert float(direction.abs().min()) > 0.0


def test_the_gradient_before_counts_less_and_less():
    attack, new, old = DiffHammer("l2", 0.1, 5), torch.ones(1), torch.zeros(1)
    assert [float(attack._followed(new, old, k)) for k in (0, 3, 24)] == pytest.approx([1.0, 0.5, 0.2])
    assert float(DiffHammer("l2", 0.1, 5, decay=0.0)._followed(new, old, 9)) == 1.0


# Restarts


def test_the_first_start_is_the_attack_itself(unet, classifier, images):
    model, label = DefendedClassifier(UniformPurifier(unet, 200, 2), classifier), torch.arange(6)
    for attack in (PGD("linf", 0.1, 2, 0.06, 2), APGD("linf", 0.1, 2, 2), DiffHammer("linf", 0.1, 2, 0.06, 2)):
        found = Restarts(attack, ["margin"], judged=2)(model, images, label, keyed(6), chunk=4)
        assert torch.equal(found, attack(model, images, label, keyed(6), chunk=4))


def test_only_survivors_are_started_again_and_the_best_start_counts(images):
    """Five classes, the pixels of the first row: lost within reach where two of them are nearly as bright."""
    label, asked = images[:, 0, 0, :5].argmax(dim=1), torch.zeros(6, dtype=torch.long)

    def purified(image, noise, mask):
        asked.index_add_(0, noise.index, torch.ones_like(noise.index))
        return image + 0.02 * noise.normal(0, image)

    model = AttackedFunction(lambda seen, noise: seen[:, 0, 0, :5], purified)
    attack = Restarts(PGD("linf", 0.1, 4, 0.05, 2), ["margin", "ce", "dlr"], judged=4, until=0.5)
    found = attack(model, images, label, keyed(6), chunk=1)
    one = attack.attack.queries.forward + 4
    starts = asked / one
    top = images[:, 0, 0, :5].sort(dim=1, descending=True).values
    torch.testing.assert_close(starts, torch.where(top[:, 0] - top[:, 1] < 0.2, 1.0, 3.0))
    assert starts.unique().tolist() == [1.0, 3.0]
    assert torch.equal(found[starts == 1], attack.attack(model, images, label, keyed(6), chunk=1)[starts == 1])
    assert attack.queries == (3 * one, 3 * 8)
    assert attack.raised == ["margin", "ce", "dlr"]


@pytest.mark.parametrize("losses", [["ce", "margin", "dlr"], ["margin", "dlr", "ce"], ["dlr", "ce", "margin"]])
def test_of_survivors_the_best_start_counts_whatever_its_place(losses):
    """Half of the draws are wrong whatever is done: a survivor. The start on the margin has the highest margin."""
    asked = []

    class Known(PGD):
        def perturb(self, model, image, label, noise, chunk):
            asked.append(self.loss)
            return image + {"margin": 0.1, "ce": 0.05, "dlr": 0.0}[self.loss]

    def model(x, noise):
        margin = torch.where(noise.run % 2 == 0, 1.0, -1.0) + 0.1 * x[:, 0, 0, 0]
        return torch.stack([torch.zeros_like(margin), margin], dim=1)

    image, label = torch.full((2, 1, 2, 2), 0.5), torch.zeros(2, dtype=torch.long)
    found = Restarts(Known("linf", 0.1, 1, 0.1), losses, judged=4, until=0.5)(model, image, label, keyed(2))
    torch.testing.assert_close(found, image + 0.1)
    assert asked == losses


def test_the_best_iterate_has_the_most_wrong_draws():
    logits, label = torch.randn(5, 4, 3), torch.arange(5) % 3
    assert torch.equal(DiffHammer("linf", 0.1, 5)._score(logits, logits[:, :, 0], label), success(logits, label))


def test_a_start_on_the_attacks_own_loss_keeps_its_targets():
    starts = Restarts(APGD("linf", 0.1, 5, loss="dlr", targets=2), ["ce", "dlr"])
    assert [(start.loss, start.targets) for start in starts._starts()] == [("ce", 0), ("dlr", 2)]
    assert starts.title.startswith("APGD on the ce loss from")


def test_success_counts_draws_first_and_margins_then():
    label = torch.zeros(3, dtype=torch.long)
    logits = torch.tensor([[[1.0, 0.0], [0.0, 9.0]], [[0.0, 0.1], [0.0, 0.1]], [[0.1, 0.0], [0.0, 9.0]]])
    first, second, third = success(logits, label).tolist()
    assert 1.0 < first < third < 2.0 < second < 3.0
    assert float(margin_loss(logits[0], label[:2]).mean()) > float(margin_loss(logits[1], label[:2]).mean())
