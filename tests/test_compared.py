"""The purifiers that the field compares with: closed forms, limits in which they are simpler ones, neighbors."""

import copy
import itertools
import weakref

import numpy as np
import pytest
import torch
from conftest import GaussianDenoiser, keyed

import lit_purify as lp
from lit_purify.defense.guided import REFERENCE
from lit_purify.errors import InputError
from lit_purify.functional.schedule import grid
from lit_purify.functional.tucker import leading, low_rank, tucker


def gaussian():
    return GaussianDenoiser(size=8)


MAKE = {
    "guided": lambda denoiser: lp.GuidedPurifier(denoiser, 200, 4, 2, guidance=5.0),
    "freqpure": lambda denoiser: lp.FreqPurePurifier(denoiser, [200], [4], radius=2.5),
    "lorid": lambda denoiser: lp.LoRIDPurifier(denoiser, 100, 2, 2, [4, 1, 3, 3], patch=4, stride=2),
    "likelihood": lambda denoiser: lp.LikelihoodPurifier(denoiser, 100, 300, 3, radius=0.1),
}


@pytest.fixture
def gray():
    """Mid-gray, so that the final clipping leaves every pixel as it is."""
    return 0.4 + 0.2 * torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("name", MAKE)
def test_an_image_does_not_depend_on_its_neighbors(name, unet, gray):
    """Up to rounding, which a chunk of one shape takes away: noise, projections and steps are of each image alone."""
    purifier, image = MAKE[name](unet), gray.float()
    whole = purifier(image, keyed(4))
    for k in range(4):
        alone = purifier(image[k : k + 1], keyed(4).rows(torch.tensor([k])))
        torch.testing.assert_close(alone, whole[k : k + 1], rtol=0, atol=2e-5)


def test_no_guidance_is_ddpm(unet, images):
    for rounds in (1, 3):
        plain = lp.GradualPurifier(unet, [200] * rounds, [4] * rounds, "ddpm")
        assert torch.equal(lp.GuidedPurifier(unet, 200, 4, rounds, 0.0)(images, keyed(6)), plain(images, keyed(6)))


def test_guidance_on_gaussian_data_follows_the_closed_form(gray):
    """Each step by hand: DDPM through the posterior, less what draws the sample to the noised input."""
    denoiser, noise, guidance = gaussian(), keyed(4), 5.0
    out = lp.GuidedPurifier(denoiser, 300, 3, 2, guidance)(gray, noise)
    m, v, number, x = denoiser.mean, denoiser.variance, itertools.count(), 2 * gray - 1
    for _ in range(2):
        given, levels = x, grid(300, 0, 3)
        abar = [float(denoiser.schedule.at(t)) for t in levels]
        x = abar[0] ** 0.5 * given + (1 - abar[0]) ** 0.5 * noise.normal(next(number), x)
        for a, b in itertools.pairwise(abar):
            k = next(number)
            clean = m + a**0.5 * v / (a * v + 1 - a) * (x - a**0.5 * m)
            sigma = ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
            mean = b**0.5 * (1 - a / b) / (1 - a) * clean + (a / b) ** 0.5 * (1 - b) / (1 - a) * x
            reference = a**0.5 * given + (1 - a) ** 0.5 * noise.normal(REFERENCE + k, x)
            drawn = guidance * sigma * ((1 - a) / a) ** 0.5 * (x - reference)
            x = mean + sigma * noise.normal(k, x) - drawn
    torch.testing.assert_close(out, (x / 2 + 0.5).clamp(0, 1), rtol=1e-9, atol=1e-9)


def test_strong_guidance_stays_near_the_image(images):
    """On pixels that the data's mean is far from: guided images are nearer to what came in."""

    def distance(guidance):
        purifier = lp.GuidedPurifier(GaussianDenoiser(mean=-0.9, variance=0.01, size=8), 200, 10, 1, guidance)
        return float((purifier(images, keyed(6)) - images).square().mean())

    assert distance(8.0) < distance(4.0) < distance(0.0)


def test_no_frequencies_kept_is_ddpm(unet, images):
    plain = lp.GradualPurifier(unet, [100, 200], [2, 4], "ddpm")(images, keyed(6))
    assert torch.equal(lp.FreqPurePurifier(unet, [100, 200], [2, 4], radius=0, phase=1.0)(images, keyed(6)), plain)


def test_all_frequencies_kept_with_their_phase_is_the_image(unet, images):
    purifier = lp.FreqPurePurifier(unet, [200], [4], radius=99, phase=0.0)
    torch.testing.assert_close(purifier(images, keyed(6)), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("radius", "inside"), [(2.3, 21), (2.0, 13)])
def test_kept_frequencies_have_the_amplitude_of_the_input_and_a_phase_near_it(radius, inside, gray):
    """By numpy, frequency by frequency; the others are those of the estimate. The disc has its border."""
    phase, free = 0.3, gray.flip(0)
    added = lp.FreqPurePurifier(gaussian(), [200], [1], radius, phase).missing(free, gray)
    u, found, free = (np.fft.fft2(x.numpy()) for x in (gray, free + added, free))
    saturated = 0
    for row, column in itertools.product(range(8), repeat=2):
        low = np.hypot(min(row, 8 - row), min(column, 8 - column)) <= radius
        kept, now, own = (x[:, :, row, column] for x in (u, found, free))
        if low:
            turn = np.clip(np.angle(own / kept), -phase, phase)
            saturated += (abs(turn) == phase).sum()
            # At frequency 0 an image is real: of a turned one its real part remains.
            expected = kept * np.exp(1j * turn)
            np.testing.assert_allclose(now, expected if row or column else expected.real, atol=1e-9)
        else:
            np.testing.assert_allclose(now, own, atol=1e-9)
    assert 0 < saturated < 4 * inside


# LoRID

FULL = [9, 1, 4, 4]


@pytest.mark.parametrize("order", ["before", "after"])
def test_full_ranks_leave_rounds_of_ddpm(order, unet, images):
    plain = lp.GradualPurifier(unet, [100] * 3, [2] * 3, "ddpm")(images, keyed(6))
    for ranks in (FULL, [99, 3, 8, 8]):
        found = lp.LoRIDPurifier(unet, 100, 2, 3, ranks, order, patch=4, stride=2)(images, keyed(6))
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)


def test_the_projection_stands_before_or_after_the_rounds(unet, images):
    projected = low_rank(images, [3, 1, 2, 2], 4, 2)
    rounds = lp.GradualPurifier(unet, [100, 100], [2, 2], "ddpm")
    before, after = (lp.LoRIDPurifier(unet, 100, 2, 2, [3, 1, 2, 2], o, patch=4, stride=2) for o in ("before", "after"))
    assert float((projected - images).abs().max()) > 0.1
    torch.testing.assert_close(before(images, keyed(6)), rounds(projected, keyed(6)), rtol=0, atol=1e-5)
    torch.testing.assert_close(after(images, keyed(6)).clamp(0, 1), after(images, keyed(6)))
    assert not torch.allclose(before(images, keyed(6)), after(images, keyed(6)), atol=0.05)


def test_tucker_in_one_mode_is_the_truncated_svd():
    x = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = np.linalg.svd(x.flatten(2).numpy(), full_matrices=False)
    expected = (u[..., :2] * s[:, None, :2]) @ v[:, :2]
    np.testing.assert_allclose(tucker(x, [2, 4, 6]).flatten(2).numpy(), expected, atol=1e-12)


def test_sweeps_bring_the_projection_nearer_to_the_tensor():
    x = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = [float((x - tucker(x, [2, 2, 2], sweeps)).norm()) for sweeps in (0, 1, 4)]
    assert errors[0] > errors[1] > errors[2]
    # What has that rank already stays: a sum of two products of vectors.
    a, b, c = (torch.randn(2, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (5, 4, 6))
    exact = torch.einsum("ki,kj,kl->ijl", a, b, c)[None]
    torch.testing.assert_close(tucker(exact, [2, 2, 2]), exact)


@pytest.mark.parametrize("sweeps", [0, 2])
def test_the_derivative_of_the_projection_is_exact(sweeps):
    image = torch.rand(1, 3, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: low_rank(x, [2, 2, 2, 2], 3, 1, sweeps), image)


def test_the_derivative_is_finite_where_singular_values_are_equal():
    """Of an even background they are all 0 but one."""
    image = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    image[..., 2:4, 2:4] = 1.0
    leaf = image.requires_grad_()
    low_rank(leaf, [5, 1, 3, 3], 4, 2).square().sum().backward()
    assert bool(leaf.grad.isfinite().all())
    assert float(leaf.grad.abs().sum()) > 0


def test_the_derivative_leaves_out_where_the_projector_jumps():
    """A kept and a dropped direction of one singular value, up to rounding: their gap must not be divided by."""
    q, _ = torch.linalg.qr(torch.randn(8, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    gram = (q * torch.tensor([3.0, 2.0, 2.0, 1.0, 0.0], dtype=torch.float64)) @ q.mT
    slope = torch.randn(8, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found,) = torch.autograd.grad(leading(gram.requires_grad_(), 2), gram, slope)
    assert float(found.abs().max()) < 2 * float(slope.abs().max())


@pytest.mark.parametrize("order", ["before", "after"])
def test_cheaper_gradients_of_the_projection_have_the_same_outputs(order, unet, classifier, images):
    lorid = lp.LoRIDPurifier(unet, 100, 1, 2, [3, 1, 2, 2], order, patch=4, stride=2)
    defended, gradients = lp.DefendedClassifier(lorid, classifier), {}
    for how in (None, "constant_projection", "identity_projection"):
        function = defended if how is None else lp.Approximate(how).attacked(defended).function
        leaf = images.clone().requires_grad_()
        out = function(leaf, keyed(6))
        torch.testing.assert_close(out, defended(images, keyed(6)), rtol=0, atol=1e-4)
        gradients[how] = torch.autograd.grad(out.square().sum(), leaf)[0]
    assert len({float(each.sum()) for each in gradients.values()}) == 3
    # Also inside another purifier, here one that resizes nothing.
    resized = lp.Approximate("identity_projection").attacked(
        lp.DefendedClassifier(lp.ResizedPurifier(unet, lorid), classifier)
    )
    leaf = images.clone().requires_grad_()
    (found,) = torch.autograd.grad(resized.function(leaf, keyed(6)).square().sum(), leaf)
    torch.testing.assert_close(found, gradients["identity_projection"], rtol=1e-3, atol=1e-3)


def test_held_directions_are_a_linear_projection():
    """Its gradient is the projection of the weights by the same directions, which finite differences find as well."""
    x = torch.randn(1, 5, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (tucker(leaf, [2, 2, 2], 1, held=True) * w).sum().backward()
    # Euler: a linear function is its gradient times its argument.
    assert float((leaf.grad * x).sum()) == pytest.approx(float((tucker(x, [2, 2, 2]) * w).sum()), rel=1e-9)
    torch.testing.assert_close(tucker(tucker(x, [2, 2, 2], held=True), [2, 2, 2]), tucker(x, [2, 2, 2]))


# Likelihood maximization


def test_no_steps_leave_the_image(unet, images):
    torch.testing.assert_close(lp.LikelihoodPurifier(unet, 100, 150, 0)(images, keyed(6)), images, rtol=0, atol=1e-6)


def test_likelihood_takes_its_gradients_where_gradients_are_off(unet, images):
    """Steps need a gradient of their own, also inside inference mode."""
    purifier = lp.LikelihoodPurifier(unet, 100, 150, 2, radius=0.05)
    expected = purifier(images.clone().requires_grad_(), keyed(6)).detach()
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert torch.equal(purifier(images.clone(), keyed(6)), expected)


@pytest.mark.parametrize("radius", [None, 0.02])
def test_likelihood_is_maximized_by_adam(radius, gray):
    """With torch's own Adam, on the error that the denoising leaves."""
    denoiser, noise = gaussian(), keyed(4)
    purifier = lp.LikelihoodPurifier(denoiser, 100, 300, 4, 0.05, radius)
    u = 2 * gray - 1
    x, drawn = u.clone().requires_grad_(), set()
    adam = torch.optim.Adam([x], lr=0.05)
    for k in range(4):
        share = noise.uniform(2 * k, torch.zeros(4, 1)).flatten()
        t = 100 + (share * 201).floor().long()
        drawn |= set(t.tolist())
        a = denoiser.schedule.at(t).reshape(-1, 1, 1, 1)
        noisy = a.sqrt() * x + (1 - a).sqrt() * noise.normal(2 * k + 1, x)
        clean = (noisy - (1 - a).sqrt() * denoiser(noisy, t)) / a.sqrt()
        adam.zero_grad()
        (clean - x).square().sum().backward()
        adam.step()
        if radius is not None:
            away = x.data - u
            norm, most = away.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1), 2 * radius * 8
            x.data = u + away * (most / norm).clamp(max=1)
    assert len(drawn) > 8
    assert 100 <= min(drawn) <= max(drawn) <= 300
    torch.testing.assert_close(purifier(gray, noise), x.detach() / 2 + 0.5, rtol=1e-9, atol=1e-9)
    if radius is not None:
        spread = (purifier(gray, noise) - gray).square().mean(dim=(1, 2, 3)).sqrt()
        assert float(spread.max()) == pytest.approx(radius, rel=1e-9)


def test_likelihood_draws_images_towards_the_data(images):
    purifier = lp.LikelihoodPurifier(GaussianDenoiser(mean=0.5, variance=0.001, size=8), 100, 150, 20)
    before, after = ((2 * x - 1 - 0.5).abs().mean() for x in (images, purifier(images, keyed(6))))
    assert float(after) < 0.5 * float(before)


class Kept:
    """A tensor that a graph keeps, in a set for as long as it does."""

    def __init__(self, tensor, alive):
        self.tensor = tensor
        alive.add(self)


@pytest.mark.parametrize("how", ["exact", "constant_moment"])
def test_recomputed_steps_of_adam_have_the_gradient_of_plain_autograd(how, unet, gray):
    unet, found, kept = copy.deepcopy(unet).double(), [], []
    for recompute in (True, False):
        purifier = lp.LikelihoodPurifier(unet, 100, 300, 5, radius=0.05, recompute=recompute)
        purifier = purifier if how == "exact" else purifier.approximated(how)
        leaf, alive = gray.clone().requires_grad_(), weakref.WeakSet()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, alive=alive: Kept(t.detach(), alive), lambda kept: kept.tensor
        ):
            out = purifier(leaf, keyed(4))
        kept.append(sum(each.tensor.numel() for each in alive))
        found.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    # All but the last step keep images alone.
    assert kept[0] < 0.3 * kept[1]


def test_a_held_moment_has_the_same_outputs_and_another_gradient(unet, classifier, images):
    defended = lp.DefendedClassifier(lp.LikelihoodPurifier(unet, 100, 150, 3), classifier)
    held = lp.Approximate("constant_moment").attacked(defended).function
    leaf = images.clone().requires_grad_()
    outputs = [function(leaf, keyed(6)) for function in (defended, held)]
    assert torch.equal(*outputs)
    exact, other = (torch.autograd.grad(out.square().sum(), leaf)[0] for out in outputs)
    assert not torch.allclose(exact, other, rtol=0.1)


def test_results_name_the_approximation(unet, classifier, images):
    lorid = lp.LoRIDPurifier(unet, 100, 1, 1, [3, 1, 2, 2], patch=4, stride=2)
    for how, purifier in (("identity_projection", lorid), ("constant_projection", lp.ResizedPurifier(unet, lorid))):
        result = lp.evaluate(
            classifier,
            {"it": purifier},
            {"pgd": lp.PGD("linf", 0.1, 1, 0.1)},
            images[:2],
            torch.arange(2),
            runs=1,
            gradients={"pgd": lp.Approximate(how)},
            progress=False,
        )
        assert result.summary["results"][0]["gradient"] == how
        assert f"{how} gradient" in str(result)
    for purifier in (lp.UniformPurifier(unet, 100, 1), lp.LikelihoodPurifier(unet, 100, 150, 1)):
        with pytest.raises(InputError, match="Purifier has no gradient 'constant_projection'"):
            lp.Approximate("constant_projection").attacked(lp.DefendedClassifier(purifier, classifier))


def rows(denoiser):
    """The denoiser as if it took rows of a table."""
    denoiser = copy.copy(denoiser)
    denoiser.channels = 0
    return denoiser


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: lp.GuidedPurifier(d, 36, 6, 0, 0.1), "rounds = 0"),
        (lambda d: lp.GuidedPurifier(d, 36, 37, 1, 0.1), "steps = 37"),
        (lambda d: lp.GuidedPurifier(d, 36, 6, 1, -0.1), "guidance = -0.1"),
        (lambda d: lp.GuidedPurifier(d, 36, 6, 1, float("inf")), "guidance = inf: use a finite number"),
        (lambda d: lp.FreqPurePurifier(d, [100], [4], -1.0), "radius = -1"),
        (lambda d: lp.FreqPurePurifier(d, [100], [4], 2.0, -1.0), "phase = -1"),
        (lambda d: lp.LoRIDPurifier(d, 36, 6, 0, FULL, patch=4), "rounds = 0"),
        (lambda d: lp.LoRIDPurifier(d, 36, 6, 1, [1, 1, 1], patch=4), r"ranks = \[1, 1, 1\]"),
        (lambda d: lp.LoRIDPurifier(d, 36, 6, 1, [0, 1, 1, 1], patch=4), r"ranks = \[0, 1, 1, 1\]"),
        (lambda d: lp.LoRIDPurifier(d, 36, 6, 1, FULL, "between", patch=4), "order = 'between'"),
        (lambda d: lp.LoRIDPurifier(d, 36, 6, 1, FULL, patch=4, stride=3), "stride = 3 do not cover 8 pixels"),
        (lambda d: lp.LoRIDPurifier(d, 36, 6, 1, FULL, patch=9), "patch = 9"),
        (lambda d: lp.LoRIDPurifier(d, 36, 6, 1, FULL, sweeps=-1), "sweeps = -1"),
        (lambda d: lp.LikelihoodPurifier(d, 150, 100, 5), "low = 150 is above high = 100"),
        (lambda d: lp.LikelihoodPurifier(d, 0, 100, 5), "low = 0"),
        (lambda d: lp.LikelihoodPurifier(d, 100, 1001, 5), "high = 1001"),
        (lambda d: lp.LikelihoodPurifier(d, 100, 150, -1), "steps = -1"),
        (lambda d: lp.LikelihoodPurifier(d, 100, 150, 5, radius=-1.0), "radius = -1"),
        (lambda d: lp.FreqPurePurifier(rows(d), [100], [4], 2.0), "FreqPurePurifier purifies images, not table rows"),
        (lambda d: lp.LoRIDPurifier(rows(d), 36, 6, 1, FULL), "LoRIDPurifier purifies images, not table rows"),
        (lambda d: lp.GuidedPurifier(d, 1001, 6, 1, 0.1), "level = 1001"),
    ],
)
def test_impossible_settings_are_refused(make, message, unet):
    with pytest.raises(InputError, match=message):
        make(unet)
