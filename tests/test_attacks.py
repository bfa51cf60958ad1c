import dataclasses
import re
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import keyed as keyed_in
from PIL import Image

import lit_purify as lp
from lit_purify.attacks.base import NotApplicableError
from lit_purify.attacks.square import _window
from lit_purify.errors import InputError
from lit_purify.functional.chunks import AttackedFunction, draws_in_chunks, gradient_in_chunks, logits_in_chunks
from lit_purify.functional.losses import (
    cross_entropy_loss,
    dlr_loss,
    log_probabilities,
    margin_loss,
    mean_margin,
    targeted_dlr_loss,
)
from lit_purify.functional.noise import ATTACK, KeyedNoise
from lit_purify.functional.threat import l2_norm, linf_norm, pixels, project, steepest, violations


def keyed(count):
    return keyed_in(count, stream=ATTACK)


def every_attack():
    """One of each kind, small; the first four work on other draws than the mean of all."""
    return {
        "worst": lp.PGD("l2", 0.7, 2, 0.4, eot=3, aggregate="worst"),
        "vote": lp.PGD("linf", 0.1, 2, 0.06, eot=3, aggregate="vote", select="best"),
        "apgd": lp.APGD("linf", 0.1, 3, eot=2, restarts=2),
        "targeted": lp.APGD("l2", 0.7, 2, eot=2, loss="dlr", targets=2, select="last"),
        "pgd": lp.PGD("linf", 0.1, 2, 0.06, eot=3, restarts=2),
        "shift": lp.PGD("linf", 0.1, 2, 0.06, shift_steps=2, eot=2),
        "fgsm": lp.FGSM("l2", 0.7, eot=2, random_start=True),
        "square": lp.Square("linf", 0.1, 4, eot=2, paired=False),
        "square-l2": lp.Square("l2", 0.7, 3, eot=2),
        "carlini": lp.CarliniWagnerL2(0.7, 2, 2, eot=2, step_size=0.1),
        "hammer": lp.DiffHammer("linf", 0.1, 3, 0.06, eot=3),
        "hammer-l2": lp.DiffHammer("l2", 0.7, 2, 0.4, eot=3, loss="ce", select="best", restarts=2),
        "restarts": lp.Restarts(lp.PGD("linf", 0.1, 2, 0.06, eot=2), ["margin", "dlr"], judged=3, until=1.0),
        "lf": lp.LF(lp.SSIM(), 0.9, 3, eot=2, kernels=[3, 5], shift_rate=0.3),
        "transfer": lp.Transfer(lp.PGD("linf", 0.1, 2, 0.05, eot=2)),
    }


EACH = list(every_attack())


def ranking(x, noise):
    """Five classes, the pixels of the first row blurred by noise."""
    return x[:, 0, 0, :5] + 0.01 * noise.normal(0, x[:, 0, 0, :5])


@pytest.mark.parametrize("name", EACH)
def test_stronger_versions_change_what_they_say_and_nothing_else(name):
    attack = every_attack()[name]
    before, given = dict(vars(attack)), {"steps": 77, "eot": 5, "restarts": 3, "eps": 0.9, "aggregate": "vote"}
    assert attack.scalable <= given.keys() | {"loss"}
    for key, value in {**given, "loss": "dlr" if name != "targeted" else "margin"}.items():
        if key not in attack.scalable:
            with pytest.raises(NotApplicableError, match=f"^{type(attack).__name__} has no version with other {key}$"):
                attack.stronger(**{key: value})
            continue
        other = attack.stronger(**{key: value})
        assert type(other) is type(attack)
        changed = {k for k in before if vars(other)[k] != before[k]}
        # Each loss is started as often.
        assert getattr(other, key) == (4 if (name, key) == ("restarts", "restarts") else value)
        # A larger ball is crossed in longer steps; another loss has no targets.
        assert changed - {key, "attack"} <= {"eps": {"step_size"}, "loss": {"targets"}}.get(key, set())
        if "step_size" in changed:
            assert other.step_size == pytest.approx(attack.step_size * 0.9 / attack.eps)
        if key in ("steps", "eot", "restarts"):
            assert other.queries.forward > attack.queries.forward
    assert vars(attack) == before


def test_an_attack_takes_modules_functions_and_defenses(unet, classifier, images):
    """Without noise it draws a fresh key from torch's generator."""
    attack, label = lp.PGD(eps=0.1, steps=2), torch.arange(6)
    assert (attack.norm, attack.loss, attack.step_size) == ("linf", "margin", 0.125)
    expected = attack(classifier, images, label, keyed(6), chunk=6)
    for model in (lambda x, scale=1.0: scale * classifier(x), lambda x, noise: classifier(x), classifier.network):
        assert torch.equal(attack(model, images, label, keyed(6), chunk=6), expected)
    defended = lp.DefendedClassifier(lp.UniformPurifier(unet, 200, 2), classifier)
    for model in (defended.attacked(), lp.Exact().attacked(defended)):
        assert torch.equal(attack(model, images, label, keyed(6)), attack(defended, images, label, keyed(6)))
    torch.manual_seed(0)
    first, second = attack(defended, images, label), attack(defended, images, label)
    torch.manual_seed(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, attack(defended, images, label))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * 255, r"images must be in \[0, 1\], found 2\.591 \.\. 254\.8: divide bytes by 255"),
        (lambda x: 2 * x - 1, r"images must be in \[0, 1\], found -0\.9\d* \.\. 0\.9"),
        (lambda x: (x * 255).byte(), "type torch.uint8: give floats"),
        (lambda x: x[0], "give floats"),
        (lambda x: x * torch.nan, "found nan"),
        (lambda x: x[:5], r"labels have shape \(6,\): give one for each of the 5 images"),
    ],
)
def test_images_of_another_range_are_refused(change, message, classifier, images):
    with pytest.raises(InputError, match=message) as error:
        lp.PGD()(classifier, change(images), torch.arange(6))
    assert "\n" not in str(error.value)


def test_an_attack_that_leaves_its_threat_model_is_stopped(images):
    class Cheat(lp.Attack):
        steps = eot = 1
        queries = lp.Queries(1, 1)

        def perturb(self, model, image, label, noise, chunk):
            return (image + 0.2).clamp(0, 1)

    with pytest.raises(RuntimeError, match=r"left its threat model .* rows \[0, 1, 2, 3, 4, 5\]"):
        Cheat("linf", 0.1)(lambda x: x, images, torch.arange(6))


def test_violations_are_found_one_by_one():
    image = torch.full((5, 1, 4, 4), 0.5)
    adversarial = image.clone()
    adversarial[1, 0, 0, 0] += 0.11
    adversarial[2, 0, 0, 0] = torch.nan
    adversarial[3] += 0.099
    assert violations(adversarial, image, "linf", 0.1).tolist() == [False, True, True, False, False]
    assert violations(adversarial, image, "l2", 0.1).tolist() == [False, True, True, True, False]
    for shift in (0.6, -0.6):
        assert violations(image + shift, image, "linf", 1.0).all()


def test_projection_and_steepest_direction():
    image, far = torch.rand(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    for norm, size in (("linf", linf_norm), ("l2", l2_norm)):
        inside = project(far, image, norm, 0.1)
        assert float(size(inside - image).max()) <= 0.1 + 1e-6
        torch.testing.assert_close(project(inside, image, norm, 0.1), inside)
        torch.testing.assert_close(size(steepest(far, norm)), torch.ones(3))
        assert torch.equal(steepest(torch.zeros(1, 1, 2, 2), norm), torch.zeros(1, 1, 2, 2))


def test_random_start_is_uniform_in_the_ball():
    image = torch.full((4000, 1, 2, 2), 0.5)
    linf = lp.PGD("linf", 0.1, 1, 0.1)._start(image, keyed(4000)) - image
    assert float(linf.abs().max()) <= 0.1 + 1e-6
    assert float(linf.std()) == pytest.approx(0.1 / 3**0.5, rel=0.03)
    radius = l2_norm(lp.PGD("l2", 0.1, 1, 0.1)._start(image, keyed(4000)) - image) / 0.1
    # In four dimensions the radius of a uniform point has mean 4 / 5.
    assert float(radius.mean()) == pytest.approx(0.8, abs=0.01)
    assert float(radius.max()) <= 1.0 + 1e-5


def test_averaged_gradient_is_the_mean_over_draws(unet, classifier, images):
    model = lp.DefendedClassifier(lp.UniformPurifier(unet, 300, 2), classifier)
    label, noise, runs = torch.arange(6), keyed(6), [3, 5, 8]
    loss, gradient = gradient_in_chunks(model.attacked(), cross_entropy_loss, images, label, noise, runs, 7)
    losses, gradients = [], []
    for run in runs:
        leaf = images.clone().requires_grad_()
        values = cross_entropy_loss(model(leaf, noise.runs([run])), label)
        values.sum().backward()
        losses.append(values.detach())
        gradients.append(leaf.grad)
    torch.testing.assert_close(loss, torch.stack(losses).mean(dim=0))
    torch.testing.assert_close(gradient, torch.stack(gradients).mean(dim=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", EACH)
def test_chunks_make_a_sample_independent_of_its_batch(name, unet, classifier, images):
    """Bit for bit: alone, in another order, in any batch; also through sign steps."""
    model = lp.DefendedClassifier(lp.VariableIntensityPurifier(unet, lp.MinMaxThreshold(0.4), 300, 150, 1), classifier)
    noise, attack = keyed(6), every_attack()[name]
    logits = logits_in_chunks(model.attacked(), images, noise, [0, 1, 2], 4)
    label = logits.mean(dim=1).argmax(dim=1)
    adversarial = attack(model, images, label, noise, chunk=4)
    assert float((adversarial - images).abs().max()) > 0.01
    for rows in (torch.tensor([4]), torch.tensor([5, 0, 2, 1, 3])):
        assert torch.equal(attack(model, images[rows], label[rows], noise.rows(rows), chunk=4), adversarial[rows])
        found = logits_in_chunks(model.attacked(), images[rows], noise.rows(rows), [0, 1, 2], 4)
        assert torch.equal(found, logits[rows])


@pytest.mark.parametrize("name", EACH)
def test_draws_are_fresh_and_their_number_is_stated(name, images):
    """No two evaluations of a sample share a draw, but for pairs that are compared."""
    seen, differentiated = [], 0

    def purified(x, noise, mask):
        nonlocal differentiated
        seen.extend(zip(noise.index.tolist(), noise.run.tolist(), strict=True))
        differentiated += len(x) * torch.is_grad_enabled()
        return x + 0.01 * noise.normal(0, x)

    attack, model = every_attack()[name], AttackedFunction(lambda x, noise: x[:, 0, 0, :5], purified)
    attack(model, images, torch.zeros(6, dtype=torch.long), keyed(6), chunk=6)
    assert attack.queries == (len(seen) / 6, differentiated / 6)
    times = set(Counter(seen).values())
    # The draw that is chosen is purified once more, with a graph.
    assert times == ({1, 2} if name in ("square-l2", "hammer", "hammer-l2") else {1})
    assert re.fullmatch(".+", attack.title)
    assert attack.target == ("classifier" if name == "transfer" else "defense")
    assert attack.gradient == {"transfer": "surrogate", "square": "none", "square-l2": "none"}.get(name, "exact")


@pytest.mark.parametrize("name", EACH)
def test_an_output_or_gradient_that_is_not_a_number_stops_the_attack(name, images):
    def model(x, noise):
        # A finite output whose gradient at 0 is infinite would not be noticed by its value.
        return ranking(x, noise) + (0.0 * x.sum() / 0.0 if name.startswith("square") else (0.0 * x[:, 0, :1, 0]).sqrt())

    with pytest.raises(RuntimeError, match="of the attacked network is NaN or infinite"):
        every_attack()[name](model, images, torch.zeros(6, dtype=torch.long), keyed(6), chunk=6)


def test_votes_follow_the_gradient_of_the_averaged_probability(unet, classifier, images):
    """-log of the mean over draws of p(label), by autograd over all draws at once."""
    model = lp.DefendedClassifier(lp.UniformPurifier(unet, 300, 2), classifier)
    label, noise, runs = torch.arange(6), keyed(6), [0, 1, 2]
    leaf = images.clone().requires_grad_()
    right = torch.stack(
        [model(leaf, noise.runs([run])).softmax(dim=1).gather(1, label[:, None])[:, 0] for run in runs], dim=1
    )
    (expected,) = torch.autograd.grad(-right.mean(dim=1).log().sum(), leaf)
    seen = draws_in_chunks(model.attacked(), cross_entropy_loss, images, label, noise, runs, 18)
    found = lp.PGD("linf", 0.1, 1, 0.1, eot=3, aggregate="vote")._gradient(seen, label)
    torch.testing.assert_close(steepest(found, "l2"), steepest(expected, "l2"), rtol=1e-3, atol=1e-5)


def test_where_draws_disagree_each_aggregate_serves_its_end():
    """One number x from 0 to 1. A hidden coin: under heads (a third) only x above 0.6 is wrong, and just barely right
    before; under tails never, but the margin falls steeply with x. The mean follows tails; heads alone can be won.
    """

    def model(x, noise):
        x, heads = x[:, 0, 0, 0], noise.run % 3 == 0
        margin = torch.where(heads, 2.0 * (x - 0.6), -8.0 - 6.0 * x)
        return torch.stack([torch.zeros_like(margin), margin], dim=1)

    image, label = torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, dtype=torch.long)
    found = {
        name: float(lp.PGD("linf", 0.4, 20, 0.05, eot=9, loss="margin", aggregate=name)(model, image, label, keyed(1)))
        for name in ("mean", "vote", "worst")
    }
    assert found["mean"] < 0.2
    assert found["vote"] < 0.2
    assert found["worst"] > 0.8


@pytest.mark.parametrize(("restarts", "aggregate"), [(1, "mean"), (3, "mean"), (1, "worst"), (1, "vote")])
def test_best_iterate_is_at_least_as_good_as_the_last(restarts, aggregate, classifier, images):
    label, pgd, apgd = classifier(images).argmax(dim=1), {}, {}
    for select in ("last", "best"):
        # Steps far too long: the last iterate is a poor one.
        attack = lp.PGD("linf", 0.2, 5, 0.4, 2, "ce", select, restarts=restarts, aggregate=aggregate)
        pgd[select] = cross_entropy_loss(classifier(attack(classifier, images, label, keyed(6))), label)
        attack = lp.APGD("linf", 0.2, 3, select=select, restarts=restarts)
        apgd[select] = margin_loss(classifier(attack(classifier, images, label, keyed(6))), label)
    for found in (pgd, apgd):
        assert bool((found["best"] >= found["last"] - 1e-6).all())
        assert bool((found["best"] > found["last"]).any())


def test_apgd_returns_a_misclassified_point_once_it_met_one():
    """Wrong only at the image itself: a deterministic sample is broken whatever is met afterwards."""

    def model(x, noise):
        x = x[:, 0, 0, 0]
        return torch.stack([torch.zeros_like(x), torch.where((x - 0.5).abs() < 0.01, 1.0, -1.0) + 0.0 * x], dim=1)

    image, label = torch.full((3, 1, 1, 1), 0.5), torch.zeros(3, dtype=torch.long)
    assert torch.equal(lp.APGD("linf", 0.1, 5)(model, image, label, keyed(3)), image)
    assert float((lp.APGD("linf", 0.1, 5, select="last")(model, image, label, keyed(3)) - image).abs().min()) > 0.01


@pytest.mark.parametrize(("sign", "expected"), [(False, [0.06, 0.08]), (True, [0.1, 0.1])])
def test_l2_steps_are_the_steepest_or_signs(sign, expected):
    def model(x, noise):
        x = x[:, 0, 0]
        return torch.stack([torch.zeros_like(x[:, 0]), 3 * x[:, 0] + 4 * x[:, 1]], dim=1)

    image = torch.full((1, 1, 1, 2), 0.5)
    attack = lp.PGD("l2", 1.0, 1, 0.1, random_start=False, sign=sign)
    moved = attack(model, image, torch.zeros(1, dtype=torch.long), keyed(1)) - image
    assert moved.flatten().tolist() == pytest.approx(expected)
    assert ("signs" in attack.title) == sign


@pytest.mark.parametrize(("norm", "size"), [("linf", linf_norm), ("l2", l2_norm)])
def test_apgd_starts_on_the_border_of_the_ball(norm, size):
    image = torch.full((50, 1, 4, 4), 0.5)
    start = lp.APGD(norm, 0.1)._start(image, keyed(50)) - image
    torch.testing.assert_close(size(start), torch.full((50,), 0.1))
    assert abs(float(start.mean())) < 0.01


def test_targets_are_the_likeliest_wrong_classes_in_turn():
    logits = torch.tensor([[[0.0, 5.0, 3.0, 4.0, 1.0], [0.0, 5.0, 3.0, 0.0, 1.0]], [[9.0, 1.0, 2.0, 3.0, 4.0]] * 2])
    goals = lp.APGD("linf", 0.1, loss="dlr", targets=3)._goals(logits, torch.tensor([1, 4]))
    assert [goal.tolist() for goal in goals] == [[[1, 2], [4, 0]], [[1, 3], [4, 3]], [[1, 4], [4, 2]]]


def test_squares_reach_every_pixel_equally():
    image, corners = torch.zeros(4000, 1, 5, 6), torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    inside = _window(corners, 2, image)[2]
    assert inside.sum(dim=(1, 2, 3)).tolist() == [4] * 4000
    first = inside.float().mean(dim=0)[0]
    assert float((first[0, 0] - 1 / 20).abs()) < 0.012
    assert float((first[-1, -1] - 1 / 20).abs()) < 0.012
    assert float((first[1:-1, 1:-1] - 4 / 20).abs().max()) < 0.03


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_uses_its_ball(norm, classifier, images):
    """Where the box is far, every Linf pixel moves by eps, and the L2 norm is eps."""
    image, eps = 0.4 + 0.2 * images, 0.1
    delta = lp.Square(norm, eps, 12)(classifier, image, torch.arange(6), keyed(6)) - image
    if norm == "linf":
        torch.testing.assert_close(delta.abs(), torch.full_like(delta, eps))
    else:
        torch.testing.assert_close(l2_norm(delta), torch.full((6,), eps))


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 1.0)])
def test_the_mask_is_moved_off_the_image(norm, eps, unet, classifier, images):
    """Where the loss does not matter, the hard mask that is left overlaps less with the original one."""
    rule = lp.MinMaxThreshold(0.4)
    model = lp.DefendedClassifier(lp.HeterogeneousPurifier(unet, rule, 200, 100, 2), classifier)
    settings = {"norm": norm, "eps": eps, "steps": 1, "step_size": eps / 10, "loss": "margin"}
    label = torch.arange(6)
    shifted = lp.PGD(**settings, shift_steps=20)(model, images, label, keyed(6), chunk=8)
    plain = lp.PGD(**settings)(model, images, label, keyed(6), chunk=8)
    original, left, other = (rule(classifier, x, keyed(6)) for x in (images, shifted, plain))
    overlaps = [float((mask * original).sum() / original.sum()) for mask in (left, other)]
    assert overlaps[0] < overlaps[1] - 0.1
    size = (linf_norm if norm == "linf" else l2_norm)(shifted - images)
    assert float(size.max()) > 0.9 * eps


def test_without_a_mask_to_move_nothing_is_shifted(unet, classifier, images):
    for purifier in (lp.UniformPurifier(unet, 200, 2), lp.HeterogeneousPurifier(unet, lp.FullMask(), 200, 100, 2)):
        model, settings = lp.DefendedClassifier(purifier, classifier), ("linf", 0.1, 2, 0.06)
        attacks = (lp.PGD(*settings, eot=2, shift_steps=shift_steps) for shift_steps in (0, 20))
        found = [attack(model, images, torch.arange(6), keyed(6)) for attack in attacks]
        assert torch.equal(*found)


def test_fast_gradient_step_has_full_length(classifier, images):
    image = 0.4 + 0.2 * images
    delta = lp.FGSM("linf", 0.1)(classifier, image, torch.arange(6), keyed(6)) - image
    torch.testing.assert_close(delta.abs(), torch.full_like(delta, 0.1))
    started = lp.FGSM("linf", 0.1, random_start=True)(classifier, image, torch.arange(6), keyed(6)) - image
    assert not torch.equal(started, delta)
    # 1.25 eps from a uniform point of -eps .. eps: at least eps / 4 beyond the image, and cut at eps in 5 of 8 pixels.
    assert 0.025 - 1e-6 <= float(started.abs().min()) < float(started.abs().max()) <= 0.1 + 1e-6
    assert float((started.abs() > 0.0999).float().mean()) == pytest.approx(5 / 8, abs=0.07)


def test_margin_and_difference_of_logits_ratio():
    logits, label = torch.tensor([[5.0, 3.0, 1.0, 0.0], [5.0, 3.0, 1.0, 0.0]]), torch.tensor([0, 2])
    assert margin_loss(logits, label).tolist() == [-2.0, 4.0]
    torch.testing.assert_close(dlr_loss(logits, label), torch.tensor([-0.5, 1.0]))
    torch.testing.assert_close(dlr_loss(3.0 * logits + 7.0, label), dlr_loss(logits, label))
    goal = torch.tensor([[0, 3], [2, 1]])
    torch.testing.assert_close(targeted_dlr_loss(logits, goal), torch.tensor([-5.0, 2.0]) / 4.5)


def test_probabilities_of_label_and_rest():
    logits = 30.0 * torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([0, 1, 4, 2])
    wrong, right = log_probabilities(logits, label)
    softmax = logits.double().softmax(dim=2).gather(2, label[:, None, None].expand(-1, 3, 1))[:, :, 0]
    torch.testing.assert_close(right.exp(), softmax)
    torch.testing.assert_close(wrong.exp(), 1.0 - softmax)
    torch.testing.assert_close(mean_margin(logits, label)[0], margin_loss(logits[0], label[:1].expand(3)).mean())


def test_sizes_in_pixels():
    assert pixels("eps", "8/255") == 8 / 255
    assert pixels("eps", 0.5) == 0.5
    for bad in ("8/0", "abc", 0, -0.1, "0"):
        with pytest.raises(InputError, match="eps"):
            pixels("eps", bad)


def few_classes(x, noise):
    return x[:, 0, 0, :3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lp.PGD("linf", 8, 1, 1), "above 1"),
        (lambda: lp.PGD("linf", 0.1, 1, 0.1, eot=0), "eot = 0"),
        (lambda: lp.APGD("linf", 0.1, restarts=0), "restarts = 0: use at least 1"),
        (lambda: lp.APGD("linf", 0.1, targets=-1), "targets = -1: use 0"),
        (lambda: lp.APGD("linf", 0.1, loss="ce", targets=3), "targets = 3 with loss = .*: only dlr has"),
        (lambda: lp.PGD("linf", 0.1, 1, 0.1, aggregate="vote"), "use eot of 2 or more"),
        (lambda: lp.PGD("linf", 0.1, 1, 0.1, loss="hinge"), "loss = 'hinge': use ce, margin or dlr"),
        (lambda: lp.PGD("Linf", 0.1, 1, 0.1), "norm = 'Linf': use linf or l2"),
        (lambda: lp.APGD("linf", 0.1, select="first"), "select = 'first': use best or last"),
        (lambda: lp.PGD("linf", 0.1, 1, 0.1, eot=2, aggregate="votes"), "aggregate = 'votes': use mean, worst or vote"),
        (lambda: lp.PGD("linf", 0.1, 1, 0.1, eot=2.5), "eot = 2.5: use a whole number"),
        (lambda: lp.Transfer(few_classes), "attack is a function: use an attack, or wrap a function in ForeignAttack"),
        (lambda: lp.ForeignAttack("pgd"), r"function is a str: give a function \(model, images, labels\)"),
        (lambda: lp.Square("linf", 0.1, p=0.0), "p = 0.0: use a fraction"),
        (lambda: lp.CarliniWagnerL2(0.5, c=0.0), "c = 0.0"),
        (lambda: lp.DiffHammer("linf", 0.1, 5, sharpness=0.0), "sharpness = 0.0"),
        (lambda: lp.DiffHammer("linf", 0.1, 5, decay=float("nan")), "decay = nan"),
        (lambda: lp.Restarts(lp.CarliniWagnerL2(0.5)), "CarliniWagnerL2 has no version with other loss: use PGD"),
        (lambda: lp.Restarts(lp.PGD("linf", 0.1, 1, 0.1), []), "losses is empty"),
        (lambda: lp.Restarts(lp.PGD("linf", 0.1, 1, 0.1), ["hinge"]), "loss = 'hinge': use one of"),
        (lambda: lp.Restarts(lp.PGD("linf", 0.1, 1, 0.1), until=2.0), "until = 2.0: use a fraction"),
        (lambda: lp.APGD("linf", 0.1, loss="dlr", targets=1), "targets = 1 needs 4 classes, the classifier has 3"),
    ],
)
def test_settings_that_cannot_be(make, message, images):
    with pytest.raises(InputError, match=message):
        make()(few_classes, images, torch.zeros(6, dtype=torch.long), keyed(6))


def nothing(x):
    """A model that nobody asks."""


def save(path, images):
    if path.suffix == ".npy":
        np.save(path, images.numpy())
    elif path.suffix == ".npz":
        np.savez(path, images=images.numpy())
    elif path.suffix in (".pt", ".pth"):
        torch.save(images, path)
    else:
        path.mkdir()
        for index, image in zip((7, 3, 40, 41, 5, 6), images, strict=True):
            levels = (image * 255).round().byte()
            picture = levels[0] if len(levels) == 1 else levels.permute(1, 2, 0)
            Image.fromarray(picture.numpy()).save(path / f"{index:06d}.png")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.pt", "x.pth", "pictures"])
def test_saved_images_come_back_by_sample(name, channels, tmp_path):
    """The evaluated samples are 7, 3, 40, 41, 5, 6 of their split, in this order; a batch is some of them."""
    original = torch.rand(6, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    adversarial = (original + 0.05).clamp(0, 1)
    save(tmp_path / name, adversarial)
    index = torch.tensor([7, 3, 40, 41, 5, 6])
    attack = lp.SavedImages("linf", 0.05, tmp_path / name, rounded=name == "pictures")
    # Another attack around it passes on what it is told.
    lp.Transfer(attack).prepare(index.tolist())
    rows = torch.tensor([5, 2, 0])
    noise = KeyedNoise(0, index[rows], torch.zeros(3).long(), ATTACK)
    found = attack(nothing, original[rows], torch.zeros(3).long(), noise)
    torch.testing.assert_close(found, adversarial[rows], rtol=0, atol=0.5 / 255 + 1e-6 if name == "pictures" else 0)
    assert attack.queries == (0, 0)


def test_rounding_to_bytes_is_allowed_only_when_said(tmp_path):
    original = torch.full((6, 1, 4, 4), 100.4 / 255)
    save(tmp_path / "pictures", original + 0.04)
    label = torch.zeros(1).long()
    noise = KeyedNoise(0, torch.tensor([7]), label, ATTACK)
    for norm, eps in (("linf", 0.04), ("l2", 0.16)):
        with pytest.raises(InputError, match=r"sample 7 is 0\.\d+ from its original, more than .*rounded: true"):
            lp.SavedImages(norm, eps, tmp_path / "pictures")(nothing, original[:1], label, noise)
        attack = lp.SavedImages(norm, eps, tmp_path / "pictures", rounded=True)
        assert "half a level" in attack.title
        assert float(attack(nothing, original[:1], label, noise)[0, 0, 0, 0]) == pytest.approx(111 / 255)
        far = original[:1] + 0.4 / 255
        with pytest.raises(InputError, match="more than"):
            lp.SavedImages(norm, eps / 2, tmp_path / "pictures", rounded=True)(nothing, far, label, noise)


def test_saved_images_that_cannot_be_used(tmp_path):
    original, label = torch.full((2, 1, 4, 4), 0.5), torch.zeros(2, dtype=torch.long)

    def use(path, prepare):
        attack = lp.SavedImages("linf", 0.1, path)
        if prepare:
            attack.prepare(prepare)
        attack(nothing, original, label, keyed(2))

    def refuses(message, name, content=None, prepare=None):
        path = tmp_path / name
        if isinstance(content, torch.Tensor):
            save(path, content)
        with pytest.raises(InputError, match=message):
            use(path, prepare)

    refuses("no such file or folder", "nothing.npy")
    (tmp_path / "text.txt").write_text("images")
    refuses("use a folder of PNGs", "text.txt")
    (tmp_path / "broken.npz").write_text("images")
    refuses("cannot be read as an array", "broken.npz")
    np.savez(tmp_path / "two.npz", a=original, b=original)
    refuses("holds something else than one array", "two.npz")
    refuses("holds torch.uint8", "bytes.npy", torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    refuses("sample 0 has shape .*1, 5, 5.*its original .*1, 4, 4", "size.npy", torch.zeros(2, 1, 5, 5))
    refuses("holds 1 images, none for sample 1", "few.npy", original[:1])
    refuses("holds 2 images for 3 evaluated samples", "two.npy", original, prepare=[0, 1, 2])
    refuses("sample 1 has values in 1.2 .. 1.2", "range.npy", torch.cat([original[:1], original[:1] + 0.7]))
    refuses("sample 1 is 0.2 from its original", "far.npy", torch.cat([original[:1], original[:1] + 0.2]))
    save(tmp_path / "gray", original[:1].expand(6, 1, 4, 4))
    refuses("no image of sample 0: add 000000.png", "gray")
    (tmp_path / "gray" / "0.png").write_text("not an image")
    refuses("cannot be read as a PNG", "gray")


@dataclasses.dataclass(frozen=True)
class Spy(KeyedNoise):
    seen: list = dataclasses.field(default_factory=list)

    def _draw(self, step, like, **kind):
        self.seen.extend((int(i), int(r), step) for i, r in zip(self.index, self.run, strict=True))
        return super()._draw(step, like, **kind)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_key_is_drawn_twice(norm, unet, classifier, images):
    """Random starts, random masks and the sampler's draws, over restarts, steps and EOT draws."""
    spy = Spy(0, torch.arange(6), torch.zeros(6, dtype=torch.long), ATTACK)
    purifier = lp.HeterogeneousPurifier(unet, lp.RandomArea(lp.TopFraction(0.3)), 300, 100, 3)
    attack = lp.PGD(norm, 0.1, 2, 0.05, eot=2, restarts=2)
    attack(lp.DefendedClassifier(purifier, classifier), images, torch.arange(6), spy, chunk=6)
    assert len(spy.seen) == len(set(spy.seen))


def test_random_start_is_used_and_differs_between_restarts(images):
    starts = []

    def flat(x, noise):
        starts.append(x.detach().clone())
        return torch.stack([0 * x.sum(dim=(1, 2, 3)), 0 * x.sum(dim=(1, 2, 3))], dim=1)

    attack = lp.PGD("linf", 0.1, 1, 0.05, loss="margin", restarts=2)
    attack(flat, images, torch.zeros(6, dtype=torch.long), keyed(6), chunk=6)
    assert not torch.equal(starts[0], images)
    assert not torch.equal(starts[0], starts[2])
