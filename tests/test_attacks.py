import pytest
import torch
from conftest import FixedNoise

from lit_purify.attacks import PGD, Attack
from lit_purify.defense import DefendedClassifier, UniformPurifier
from lit_purify.errors import InputError
from lit_purify.functional.chunks import gradient_in_chunks, logits_in_chunks
from lit_purify.functional.losses import cross_entropy_loss, margin_loss
from lit_purify.functional.noise import ATTACK, KeyedNoise
from lit_purify.functional.threat import l2_norm, linf_norm, pixels, project, steepest, violations


def keyed(count):
    return KeyedNoise(0, torch.arange(count), torch.zeros(count, dtype=torch.long), ATTACK)


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.3)])
def test_pgd_reaches_the_optimum_of_a_linear_classifier(norm, eps, loss):
    """Two classes, logits (0, w x): the best Linf step is -eps sign(w), the best L2 step -eps w / |w|."""
    w = torch.randn(1, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    w = w.sign() * (0.2 + w.abs())
    image, label = torch.full((4, 1, 6, 6), 0.5), torch.ones(4, dtype=torch.long)

    def model(x, noise):
        score = (w * (x - 0.5)).sum(dim=(1, 2, 3))
        return torch.stack([torch.zeros_like(score), score], dim=1)

    adversarial = PGD(norm, eps, 30, eps / 5, loss=loss)(model, image, label, keyed(4))
    best = -eps * w.abs().sum() if norm == "linf" else -eps * w.square().sum().sqrt()
    torch.testing.assert_close(model(adversarial, None)[:, 1], best.expand(4), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.7)])
def test_threat_model_holds_for_each_sample(norm, eps, unet, classifier, images):
    model = DefendedClassifier(UniformPurifier(unet, classifier, 200, 2), classifier)
    label = torch.arange(6)
    adversarial = PGD(norm, eps, 4, eps / 2, eot=2)(model, images, label, keyed(6), chunk=8)
    size = (linf_norm if norm == "linf" else l2_norm)(adversarial - images)
    assert float(size.max()) <= eps + 1e-5
    # The attack uses its ball: a norm over the whole batch would leave each sample a part of it.
    assert float(size.min()) > 0.6 * eps
    assert 0.0 <= float(adversarial.min()) <= float(adversarial.max()) <= 1.0


def test_an_attack_that_leaves_its_threat_model_is_stopped(images):
    class Cheat(Attack):
        steps = eot = 1

        def perturb(self, model, image, label, noise, chunk):
            return (image + 0.2).clamp(0, 1)

    with pytest.raises(RuntimeError, match=r"left its threat model .* rows \[0, 1, 2, 3, 4, 5\]"):
        Cheat("linf", 0.1)(None, images, None, None)


def test_violations_are_found_one_by_one():
    image = torch.full((5, 1, 4, 4), 0.5)
    adversarial = image.clone()
    adversarial[1, 0, 0, 0] += 0.11
    adversarial[2, 0, 0, 0] = torch.nan
    adversarial[3] += 0.099
    assert violations(adversarial, image, "linf", 0.1).tolist() == [False, True, True, False, False]
    assert violations(adversarial, image, "l2", 0.1).tolist() == [False, True, True, True, False]
    assert violations(image + 0.6, image, "linf", 1.0).all()


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
    linf = PGD("linf", 0.1, 1, 0.1)._start(image, keyed(4000)) - image
    assert float(linf.abs().max()) <= 0.1 + 1e-6
    assert float(linf.std()) == pytest.approx(0.1 / 3**0.5, rel=0.03)
    radius = l2_norm(PGD("l2", 0.1, 1, 0.1)._start(image, keyed(4000)) - image) / 0.1
    # In four dimensions the radius of a uniform point has mean 4 / 5.
    assert float(radius.mean()) == pytest.approx(0.8, abs=0.01)
    assert float(radius.max()) <= 1.0 + 1e-5


def test_averaged_gradient_is_the_mean_over_draws(unet, classifier, images):
    model = DefendedClassifier(UniformPurifier(unet, classifier, 300, 2), classifier)
    label, noise, runs = torch.arange(6), keyed(6), [3, 5, 8]
    loss, gradient = gradient_in_chunks(model, cross_entropy_loss, images, label, noise, runs, 7)
    losses, gradients = [], []
    for run in runs:
        leaf = images.clone().requires_grad_()
        values = cross_entropy_loss(model(leaf, noise.runs([run])), label)
        values.sum().backward()
        losses.append(values.detach())
        gradients.append(leaf.grad)
    torch.testing.assert_close(loss, torch.stack(losses).mean(dim=0))
    torch.testing.assert_close(gradient, torch.stack(gradients).mean(dim=0), rtol=1e-4, atol=1e-6)


def test_chunks_make_a_sample_independent_of_its_batch(unet, classifier, images):
    """Bit for bit: alone, in another order, in any batch; also through sign steps."""
    model = DefendedClassifier(UniformPurifier(unet, classifier, 300, 2), classifier)
    label, noise, attack = torch.arange(6), keyed(6), PGD("linf", 0.1, 3, 0.04, eot=3)
    adversarial = attack(model, images, label, noise, chunk=4)
    logits = logits_in_chunks(model, images, noise, [0, 1, 2], 4)
    for rows in (torch.tensor([4]), torch.tensor([5, 0, 2, 1, 3, 4]), torch.tensor([1, 2])):
        assert torch.equal(attack(model, images[rows], label[rows], noise.rows(rows), chunk=4), adversarial[rows])
        assert torch.equal(logits_in_chunks(model, images[rows], noise.rows(rows), [0, 1, 2], 4), logits[rows])


def test_attack_draws_fresh_noise_at_every_step(images):
    seen = []

    def model(x, noise):
        seen.extend(zip(noise.index.tolist(), noise.run.tolist(), strict=True))
        return torch.stack([x.sum(dim=(1, 2, 3)), noise.normal(0, x).sum(dim=(1, 2, 3))], dim=1)

    PGD("linf", 0.1, 3, 0.05, eot=2, restarts=2)(model, images, torch.zeros(6, dtype=torch.long), keyed(6), chunk=12)
    assert len(seen) == len(set(seen)) == 6 * 2 * 2 * (3 + 1)


@pytest.mark.parametrize("restarts", [1, 3])
def test_best_iterate_is_at_least_as_good_as_the_last(restarts, classifier, images):
    def model(x, noise):
        return classifier(x)

    label, found = classifier(images).argmax(dim=1), {}
    for select in ("last", "best"):
        # Steps far too long: the last iterate is a poor one.
        attack = PGD("linf", 0.2, 5, 0.4, select=select, restarts=restarts)
        found[select] = cross_entropy_loss(classifier(attack(model, images, label, keyed(6))), label)
    assert bool((found["best"] >= found["last"] - 1e-6).all())


def test_margin_loss_is_positive_where_misclassified():
    logits = torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0]])
    assert margin_loss(logits, torch.tensor([0, 2])).tolist() == [-2.0, 3.0]


def test_sizes_in_pixels():
    assert pixels("eps", "8/255") == 8 / 255
    assert pixels("eps", 0.5) == 0.5
    for bad in ("8/0", "abc", 0, -0.1, "0"):
        with pytest.raises(InputError, match="eps"):
            pixels("eps", bad)
    with pytest.raises(InputError, match="above 1"):
        PGD("linf", 8, 1, 1)
    with pytest.raises(InputError, match="eot = 0"):
        PGD("linf", 0.1, 1, 0.1, eot=0)


def test_noise_of_rows_is_asked_for_by_key(images):
    """A stub without keys works as well: attacks use the protocol alone."""

    def model(x, noise):
        return torch.stack([x.sum(dim=(1, 2, 3)), noise.normal(0, x).sum(dim=(1, 2, 3))], dim=1)

    PGD("l2", 0.1, 2, 0.1, eot=2)(model, images, torch.zeros(6, dtype=torch.long), FixedNoise(images), chunk=4)
