import numpy as np
import pytest
import torch
from PIL import Image

from lit_purify.functional.images import flip, resize, shift


def pictures(count=2, channels=3, height=8, width=8):
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [5, 8, 20])
def test_resize_agrees_with_pillow(size):
    image = pictures(height=8, width=8)
    out = resize(image, size)
    for plane, resized in zip(image.flatten(0, 1), out.flatten(0, 1), strict=True):
        expected = Image.fromarray(plane.numpy()).resize((size, size), Image.Resampling.BILINEAR)
        assert np.allclose(resized.numpy(), np.asarray(expected), atol=1e-5)


def test_resize_crops_the_center_of_the_longer_side():
    image = torch.arange(10.0).div(10).expand(1, 1, 4, 10)
    assert torch.equal(resize(image, 4), image[..., 3:7])
    assert torch.equal(resize(image.transpose(2, 3), 4), image.transpose(2, 3)[..., 3:7, :])


def test_shift_moves_by_the_drawn_pixels_and_repeats_the_border():
    image = pictures(1, 2, 5, 6)
    for down in range(-2, 3):
        for right in range(-2, 3):
            # The middle of the fifth of [0, 1) that stands for this move.
            draws = torch.tensor([[(down + 2.5) / 5, (right + 2.5) / 5]])
            out = shift(image, draws, 2)
            for y in range(5):
                for x in range(6):
                    source = image[0, :, min(max(y + down, 0), 4), min(max(x + right, 0), 5)]
                    assert torch.equal(out[0, :, y, x], source)


def test_shift_treats_every_image_by_its_own_draw():
    image = pictures(3)
    draws = torch.tensor([[0.0, 0.0], [0.5, 0.5], [0.999999, 0.2]])
    out = shift(image, draws, 3)
    for i in range(3):
        assert torch.equal(out[i : i + 1], shift(image[i : i + 1], draws[i : i + 1], 3))
    assert torch.equal(out[1], image[1])
    assert torch.equal(shift(image, draws, 0), image)


def test_flip_mirrors_where_the_draw_is_below_a_half():
    image = pictures(3)
    out = flip(image, torch.tensor([[0.1], [0.5], [0.49]]))
    assert torch.equal(out, torch.stack([image[0].flip(-1), image[1], image[2].flip(-1)]))
