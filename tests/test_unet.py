import pytest
import torch
from conftest import randomized

from lit_purify.errors import InputError
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


def test_a_map_acts_as_the_embedding_computed_for_every_pixel(unet):
    """Against the definition: embed each pixel's level, pool to each resolution, apply each block's linear layer."""
    from lit_purify.models import unet as module

    x = torch.randn(2, 1, 8, 8)
    levels = torch.where(torch.rand(2, 1, 8, 8) < 0.4, 300, 120)

    class PerPixel:
        def __init__(self, embedding, weights):
            self.pixels = unet.embed(module._sinusoidal(levels[:, 0], unet.width, x.dtype)).movedim(-1, 1)

        def project(self, layer, width):
            pooled = torch.nn.functional.avg_pool2d(self.pixels, 8 // width)
            return layer(pooled.movedim(1, -1)).movedim(-1, 1)

    expected = pytest.MonkeyPatch()
    with expected.context() as patch:
        patch.setattr(module, "Conditioning", PerPixel)
        slow = unet(x, levels)
    torch.testing.assert_close(unet(x, levels), slow, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(slow, unet(x, torch.tensor([300, 300])), atol=1e-3)


def test_samples_do_not_see_each_other(unet):
    x, t = torch.randn(4, 1, 8, 8), torch.randint(1, 900, (4, 1, 8, 8)) // 300 * 300 + 1
    changed = x.clone()
    changed[1:] += 1.0
    torch.testing.assert_close(unet(x, t)[0], unet(changed, t)[0])


def test_size_must_halve():
    with pytest.raises(InputError, match="size = 10"):
        UNet(channels=1, size=10, width=8, multipliers=[1, 1, 1])
