import pytest
import torch
from conftest import randomized

from lit_purify.errors import InputError
from lit_purify.functional.schedule import Schedule
from lit_purify.models import UNet


@pytest.mark.parametrize(
    "shape",
    [
        {"channels": 1, "size": 8, "width": 8, "multipliers": [1, 2], "attention": [4]},
        {"channels": 3, "size": 32, "width": 16, "multipliers": [1, 2, 2], "blocks": 1, "attention": [8, 16]},
    ],
)
def test_a_constant_map_is_the_scalar_level(shape):
    network = randomized(UNet(**shape))
    x = torch.randn(3, shape["channels"], shape["size"], shape["size"])
    t = torch.tensor([1, 250, 1000])
    scalar = network(x, t)
    assert scalar.shape == x.shape
    assert torch.equal(network(x, t.reshape(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])), scalar)
    # Also beside an image of two levels, which takes the path that spreads levels over the pixels.
    mixed = t.reshape(-1, 1, 1, 1).repeat(1, 1, *x.shape[2:])
    mixed[0, 0, 0, 0] = 500
    assert torch.equal(network(x, mixed)[1:], scalar[1:])


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"scale_shift": False, "groups": 32, "group_width": 4, "rescale": True, "resampling": "residual_conv"},
        {"resampling": "fir", "input_pyramid": True, "up_attention": "last", "heads": 2},
        {"resampling": "residual", "level_scale": 0.25, "level_shift": 1.0, "embedding": 24},
    ],
)
def test_a_map_acts_as_the_embedding_computed_for_every_pixel(variant):
    """Against the definition: embed each pixel's level, pool to each resolution, apply each block's linear layer."""
    from lit_purify.models import unet as module
    from lit_purify.models.layers import sinusoidal

    unet = randomized(UNet(channels=1, size=8, width=8, multipliers=[1, 2], attention=[4], **variant))
    x = torch.randn(2, 1, 8, 8)
    levels = torch.where(torch.rand(2, 1, 8, 8) < 0.4, 300, 120)
    position = unet.level_scale * (levels[:, 0] - unet.level_shift)

    class PerPixel:
        def __init__(self, embedding, weights):
            self.pixels = unet.embed(sinusoidal(position, unet.sinusoids, x.dtype)).movedim(-1, 1)

        def project(self, layer, width):
            pooled = torch.nn.functional.avg_pool2d(self.pixels, 8 // width)
            each = torch.eye(width**2).reshape(1, width**2, width, width)
            return layer(pooled.flatten(2).movedim(1, -1)), each.expand(len(pooled), -1, -1, -1)

    expected = pytest.MonkeyPatch()
    with expected.context() as patch:
        patch.setattr(module, "Conditioning", PerPixel)
        slow = unet(x, levels)
    torch.testing.assert_close(unet(x, levels), slow, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(slow, unet(x, torch.tensor([300, 300])), atol=1e-3)


def test_gradient_checkpointing_changes_no_gradient(unet):
    unet.requires_grad_(True)
    x, t = torch.randn(2, 1, 8, 8), torch.randint(1, 900, (2, 1, 8, 8)) // 300 * 300 + 1

    def gradients():
        unet.zero_grad()
        unet(x, t).square().sum().backward()
        return [p.grad.clone() for p in unet.parameters()]

    plain, kept = gradients(), []
    unet.gradient_checkpointing = True
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        recomputed = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    inside = [name for name, _ in unet.layers()]
    assert len(kept) < len(inside) * 4  # a residual block alone saves more than ten


def test_levels_of_another_schedule_have_equal_signal_to_noise_ratio():
    linear, cosine = Schedule.linear(), Schedule.cosine(4000)
    # Closed form of the cosine schedule (its betas are clipped at the very end only).
    t = torch.tensor([50, 200, 400, 900])
    start = torch.cos(torch.tensor(0.008 / 1.008, dtype=torch.float64) * torch.pi / 2)
    time = 1.008 / (torch.pi / 2) * torch.acos(linear.at(t).sqrt() * start) - 0.008
    torch.testing.assert_close(cosine.levels_of(linear)[t], 4000 * time, rtol=0, atol=0.1)
    torch.testing.assert_close(linear.levels_of(linear), torch.arange(1001.0).double())
    # What is stronger than the strongest does not exist.
    short = Schedule.linear(1000, 1e-4, 1e-3)
    reached = int(short.levels_of(linear).isfinite().sum()) - 1
    assert linear.abar[reached] >= short.abar[-1] > linear.abar[reached + 1]


def test_the_weakest_level_stands_for_all_that_are_weaker():
    weak, strong = Schedule.linear(1000, 1e-5, 1e-3), Schedule.linear(1000, 1e-3, 2e-2)
    levels = strong.levels_of(weak)
    assert levels[0] == 0.0
    assert levels[1] == 1.0
    assert Schedule.linear(1000, 1e-4, 1e-2).levels_of(Schedule.linear(1000, 1e-4, 2e-2))[500] > 500


@pytest.mark.parametrize(
    ("start", "end", "steps"), [(1e-4, 2.0, 10), (-1.0, 0.1, 10), (float("nan"), 0.1, 10), (0.1, 0.1, 0)]
)
def test_a_schedule_falls(start, end, steps):
    with pytest.raises(InputError, match="does not fall"):
        UNet(1, 8, 8, [1], steps=steps, beta_start=start, beta_end=end)
