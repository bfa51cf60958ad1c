import pytest
import torch

from lit_purify.errors import InputError
from lit_purify.functional.diffusion import euler_back, noised, renoised, step_back, to_diffusion, to_image
from lit_purify.functional.levels import MAX_DISTINCT, decompose, two_level
from lit_purify.functional.mask import random_shapes
from lit_purify.functional.schedule import Schedule, grid

AT = Schedule.linear().at


def test_linear_schedule_is_the_product_of_one_minus_beta():
    abar, expected = Schedule.linear(10, 0.1, 0.3).abar, 1.0
    assert float(abar[0]) == 1.0
    for t in range(1, 11):
        expected *= 1.0 - (0.1 + 0.2 * (t - 1) / 9)
        assert float(abar[t]) == pytest.approx(expected, rel=1e-12)


def test_renoising_in_one_jump_has_the_variance_of_noising_at_once():
    u, z = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    mean = renoised(noised(u, AT(100), z), AT(100), AT(150), z)
    assert mean == pytest.approx(float(noised(u, AT(150), z)), rel=1e-12)
    from_before = renoised(noised(z, AT(100), u), AT(100), AT(150), z) ** 2
    from_jump = renoised(z, AT(100), AT(150), u) ** 2
    assert float(from_before + from_jump) == pytest.approx(float(1 - AT(150)), rel=1e-12)


def test_ddim_step_with_the_true_noise_lands_on_the_same_path():
    u, eps = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    stepped = step_back(noised(u, AT(400), eps), eps, AT(400), AT(150))
    torch.testing.assert_close(stepped, noised(u, AT(150), eps), rtol=1e-10, atol=1e-10)


def test_ddpm_step_is_the_gaussian_posterior():
    """With eta = 1: mean and variance of q(x_s | x_t, u), Ho et al. 2020, eq. 7, on any pair of levels."""
    t, s = AT(400), AT(150)
    u, eps = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    x = noised(u, t, eps)
    beta = 1 - t / s
    mean = (s.sqrt() * beta * u + (t / s).sqrt() * (1 - s) * x) / (1 - t)
    zero, one = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(step_back(x, eps, t, s, 1.0, zero), mean, rtol=1e-9, atol=1e-12)
    spread = step_back(x, eps, t, s, 1.0, one) - step_back(x, eps, t, s, 1.0, zero)
    torch.testing.assert_close(spread**2, ((1 - s) / (1 - t) * beta).expand(5), rtol=1e-9, atol=1e-12)
    # Between DDIM and DDPM eta scales the noise.
    half = step_back(zero, zero, t, s, 0.5, one)
    torch.testing.assert_close(half, 0.5 * spread, rtol=1e-9, atol=1e-12)


def test_euler_step_is_that_of_the_reverse_sde():
    """With the VP SDE's drift and diffusion and the integral of beta (t) = 0.1 + 19.9 t over the step."""
    schedule, t, s = Schedule.continuous(), 0.4, 0.39
    x, eps, z = torch.randn(3, 5, dtype=torch.float64)
    score = -eps / (1 - schedule.at(400)).sqrt()
    beta = (0.1 + 19.9 * (t + s) / 2) * (t - s)
    expected = x + beta * (0.5 * x + score) + beta**0.5 * z
    torch.testing.assert_close(euler_back(x, eps, schedule.at(400), schedule.at(390), z), expected)


def test_a_clean_pixel_stays_clean():
    x, eps = torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2)
    levels = torch.tensor([[[[0, 10], [10, 0]]]])
    for eta in (0.0, 1.0):
        stepped = step_back(x, eps, AT(levels), AT(torch.zeros_like(levels)), eta, eps)
        assert torch.equal(stepped[levels == 0], x[levels == 0])
        assert torch.isfinite(stepped).all()


def test_image_range():
    image = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(to_image(to_diffusion(image)), image)
    assert float(to_image(torch.tensor(5.0))) == 1.0


def test_grid():
    assert grid(400, 0, 4) == [400, 300, 200, 100, 0]
    assert grid(10, 0, 4) == [10, 8, 5, 3, 0]
    with pytest.raises(InputError, match="steps = 5"):
        grid(3, 0, 5)


def test_decompose_is_exact():
    levels = torch.randint(0, 5, (4, 1, 6, 6))
    levels[0] = 3
    found = decompose(levels)
    assert found.weights.sum(dim=1).eq(1).all()
    assert torch.equal(found.dense, levels)
    assert torch.equal(found.rows(slice(1, 3)).dense, levels[1:3])
    assert decompose(torch.full((2, 1, 4, 4), 9)).levels.tolist() == [[9, 9], [9, 9]]
    with pytest.raises(InputError, match=f"most is {MAX_DISTINCT}"):
        decompose(torch.arange(100).reshape(1, 1, 10, 10))


def test_two_level_maps_and_random_shapes():
    mask = random_shapes(torch.zeros(50, 1, 16, 16), torch.rand(50, 18))
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    area = mask.mean(dim=(1, 2, 3))
    assert 0.1 < float(area.mean()) < 0.9
    levels = two_level(mask, torch.arange(50), 7).dense
    assert torch.equal(levels[mask == 0], torch.full_like(levels[mask == 0], 7))
    assert torch.equal(levels.amax(dim=(1, 2, 3))[8:], torch.arange(8, 50))
