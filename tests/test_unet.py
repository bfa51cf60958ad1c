import pytest
import torch
from conftest import randomized

from lit_purify.errors import InputError
from lit_purify.functional.diffusion import noised
from lit_purify.functional.levels import LevelMap, holding
from lit_purify.functional.schedule import Schedule
from lit_purify.models import MatchedSchedule, UNet


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


def test_a_matched_schedule_hands_on_the_level_of_equal_signal_to_noise_ratio():
    own = UNet(1, 8, 8, [1], schedule="cosine", steps=4000)
    matched = MatchedSchedule(own)
    assert torch.equal(matched.schedule.abar, Schedule.linear().abar[: matched.schedule.steps + 1])
    # Closed form of the cosine schedule (its betas are clipped at the very end only).
    t = torch.tensor([50, 200, 400, 900])
    start = torch.cos(torch.tensor(0.008 / 1.008, dtype=torch.float64) * torch.pi / 2)
    time = 1.008 / (torch.pi / 2) * torch.acos(matched.schedule.at(t).sqrt() * start) - 0.008
    torch.testing.assert_close(matched.levels[t], 4000 * time, rtol=0, atol=0.1)
    x, eps = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    own = randomized(own)
    torch.testing.assert_close(
        matched(noised(x, matched.schedule.at(t)[:, None, None, None], eps), t),
        own(noised(x, matched.schedule.at(t)[:, None, None, None], eps), matched.levels[t]),
    )


def test_matching_a_schedule_with_itself_changes_nothing():
    own = randomized(UNet(1, 8, 8, [1, 2]))
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 333, 1000])
    assert torch.equal(MatchedSchedule(own)(x, t), own(x, t))
    # Every level of a map is matched.
    seen = []
    own.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    matched = MatchedSchedule(own, "cosine", 4000)
    grade = torch.randint(0, 2, (len(x), 1, *x.shape[2:]))
    matched(x, LevelMap(torch.tensor([[900, 1200]]).expand(len(x), 2), holding(grade, 2)))
    assert torch.equal(seen[0].levels, matched.levels[torch.tensor([[900, 1200]])].expand(len(x), 2))
    assert torch.equal(seen[0].weights.int().argmax(dim=1, keepdim=True), grade)


def test_levels_beyond_the_strongest_do_not_exist():
    """abar of a short schedule ends high: what the longer one has below does not exist for it."""
    own = UNet(1, 8, 8, [1], steps=1000, beta_end=1e-3)
    matched = MatchedSchedule(own)
    strongest = matched.schedule.steps
    assert Schedule.linear().abar[strongest] >= own.schedule.abar[-1] > Schedule.linear().abar[strongest + 1]
    with pytest.raises(InputError, match=f"outside 1 .. {strongest}"):
        matched.schedule.check("level", strongest + 1, low=1)
    # Nor does, here, what was not trained there.
    own.schedule = own.schedule.trained_to(300)
    trained = MatchedSchedule(own).schedule.trained
    assert Schedule.linear().abar[trained] >= own.schedule.abar[300] > Schedule.linear().abar[trained + 1]


def test_fractions_of_levels_are_interpolated():
    again, seen = MatchedSchedule(UNet(1, 8, 8, [1], schedule="cosine", steps=4000), "cosine", 4000), []
    again.denoiser.forward = lambda x, level: seen.append(level) or x
    again(torch.zeros(1, 1, 8, 8), torch.tensor([100.75]))
    torch.testing.assert_close(seen[0], torch.tensor([100.75], dtype=torch.float64))


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
