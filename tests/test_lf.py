"""LF's filters written a second time, its perceptual threat model, and what LPIPS needs."""

import flattering as zoo
import pytest
import torch
from conftest import keyed
from torchvision.models import alexnet

import lit_purify as lp
from lit_purify.attacks import LF, LPIPS, PGD, SSIM
from lit_purify.errors import InputError
from lit_purify.functional.losses import margin_loss
from lit_purify.functional.noise import ATTACK


def filtered(seen, image, kernel, side, color):
    """Of one image (C, H, W), by the colors of the original: tap by tap, kernel of the first half and the center."""
    half, (_, height, width), out = side // 2, image.shape, torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            weights = {}
            for number in range(side * side):
                tap = kernel[min(number, side * side - 1 - number), y, x].exp()
                v, u = y + number // side - half, x + number % side - half
                if 0 <= v < height and 0 <= u < width:
                    unlike = (image[:, y, x] - image[:, v, u]).abs().sum()
                    weights[v, u] = tap * torch.exp(-(unlike**2) / (2 * color**2))
            total = sum(weights.values())
            out[:, y, x] = sum(w / total * seen[:, v, u] for (v, u), w in weights.items())
    return out


@pytest.mark.parametrize(("channels", "side"), [(1, 3), (3, 5)])
def test_a_filter_is_its_docstring(channels, side):
    generator = torch.Generator().manual_seed(0)
    image = 0.1 + 0.8 * torch.rand(2, channels, 6, 5, generator=generator)
    kernels = torch.randn(2, 2, side * side // 2 + 1, 6, 5, generator=generator)
    found = LF(SSIM(), kernels=[side, side], color=0.3)._filtered([*kernels, torch.zeros_like(image)], image)
    expected = image
    for kernel in kernels:
        each = zip(expected, image, kernel, strict=True)
        expected = torch.stack([filtered(seen, x, k, side, 0.3) for seen, x, k in each])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_shift_moves_where_the_sigmoid_is():
    image, shift = torch.full((1, 1, 2, 2), 0.3), torch.full((1, 1, 2, 2), 0.4)
    found = LF(SSIM(), kernels=[])._filtered([shift], image)
    torch.testing.assert_close(found, ((2 * image - 1).atanh() + shift).tanh() / 2 + 0.5)


def test_beyond_the_distance_the_penalty_pulls_back():
    image, direction, kernel, shift = torch.rand(4, 3, 1, 8, 8).mul(0.8).add(0.1)
    values = [kernel.expand(-1, 5, -1, -1).contiguous(), shift]
    for eps, penalty in ((0.9, 0.0), (1e-4, 7.0)):
        attack = LF(SSIM(0.5), eps, kernels=[3], color=0.3, penalty=7.0)
        leaves = [value.clone().requires_grad_() for value in values]
        point = attack._filtered(leaves, image)
        gain = (point * direction).sum() - penalty * SSIM(0.5)(point, image).sum()
        for found, expected in zip(
            attack._gradients(values, image, direction, 2), torch.autograd.grad(gain, leaves), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_adam_gets_the_average_of_draws_clipped_for_each_sample(scale, monkeypatch):
    """Half of the draws rise with x, the others fall three times as steeply; filters begin near the identity."""
    found = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: found.extend(self.param_groups))

    def model(x, noise):
        margin = scale * torch.where(noise.run % 2 == 0, 1.0, -3.0) * x.flatten(1).sum(dim=1)
        return torch.stack([torch.zeros_like(margin), margin], dim=1)

    image, label = torch.rand(3, 1, 8, 8).mul(0.8).add(0.1), torch.zeros(3, dtype=torch.long)
    LF(SSIM(), 0.5, 1, 2, kernels=[3], color=100.0)(model, image, label, keyed(3))
    (kernel,), (shift,) = (group["params"] for group in found)
    assert [group["lr"] for group in found] == [0.05, 0.008]
    whole = torch.cat([kernel, kernel[:, :-1].flip(1)], dim=1).detach()
    assert float(whole.softmax(dim=1)[:, 4].mean()) == pytest.approx(0.99)
    # Adam descends: a positive gradient lowers x.
    assert bool((shift.grad > 0).all())
    length = torch.cat([kernel.grad.flatten(1), shift.grad.flatten(1)], dim=1).norm(dim=1)
    assert bool((length < 0.02).all()) if scale < 1 else length.tolist() == pytest.approx([1.0] * 3)


def test_ssim_of_flat_images():
    found = SSIM()(torch.full((2, 1, 8, 8), 0.2), torch.full((2, 1, 8, 8), 0.6))
    torch.testing.assert_close(found, torch.full((2,), 1.0 - (0.24 + 1e-4) / (0.4 + 1e-4)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("eps", [0.05, 0.3])
def test_the_result_is_within_the_distance_and_the_margin_rises(eps):
    image, label, _ = zoo.samples(6)
    model, attack = zoo.defense(zoo.Blurred), LF(SSIM(0.5), eps, 30, 4, kernels=[3], shift_rate=0.05, color=0.3)
    found = attack(model, image, label, keyed(6, stream=ATTACK), 8)
    far = SSIM(0.5)(found, image)
    assert 0.2 * eps < float(far.max()) < eps
    assert bool((margin_loss(zoo.classifier()(found), label) > margin_loss(zoo.classifier()(image), label)).all())
    assert (attack.threat, attack.queries) == ("1 - SSIM (sigma 0.5)", (31 * 4, 30 * 4))


def test_an_image_beyond_the_distance_is_stopped():
    class Cheat(LF):
        def perturb(self, model, image, label, noise, chunk):
            return 1.0 - image

    image, label, _ = zoo.samples(3)
    with pytest.raises(RuntimeError, match=r"Cheat left its threat model \(1 - SSIM <= 0.05\) in rows \[0, 1, 2\]"):
        Cheat(SSIM())(zoo.classifier(), image, label)
    # A wrapper keeps the threat model of its attack.
    with pytest.raises(RuntimeError, match=r"Transfer left its threat model \(1 - SSIM <= 0.05\)"):
        lp.Transfer(Cheat(SSIM()))(zoo.classifier(), image, label)
    wide = LF(SSIM(), 0.5, 2, 2, kernels=[3])
    one, other = (attack(zoo.classifier(), image, label, keyed(3)) for attack in (wide, lp.Transfer(wide)))
    assert torch.equal(one, other)


def test_the_threat_model_has_its_name_in_results_and_reports(tmp_path):
    image, label, _ = zoo.samples(3)
    attacks = {"pgd": PGD(eps=0.1, steps=2), "lf": LF(SSIM(), 0.1, 2, 2, kernels=[3])}
    result = lp.evaluate(zoo.classifier(), zoo.defense(), attacks, image, label, runs=2, chunk=16, progress=False)
    # Apart from the Lp norms: no ensemble joins the two.
    assert [row["norm"] for row in result.summary["results"]] == ["linf", "1 - SSIM"]
    assert "lf: 1 - SSIM <= 0.1" in str(result)
    result.save_report(tmp_path / "report.html")
    assert "robust average, 1 - SSIM ≤ 0.1" in (tmp_path / "report.html").read_text()
    with pytest.raises(InputError, match="1 - SSIM is no Lp norm: audit an attack under linf or l2"):
        lp.audit(zoo.classifier(), zoo.defense(), attacks["lf"], image, label)


def test_distances_that_differ_are_different_threat_models():
    """No ensemble joins them, and a sample that one has broken is attacked under the other."""
    image, label, _ = zoo.samples(3)
    attacks = {name: LF(SSIM(sigma), 0.5, 2, 2, kernels=[3]) for name, sigma in (("one", None), ("other", 0.3))}
    result = lp.evaluate(zoo.classifier(), zoo.defense(), attacks, image, label, runs=2, chunk=16, progress=False)
    assert [row["norm"] for row in result.summary["results"]] == ["1 - SSIM", "1 - SSIM (sigma 0.3)"]


def test_lpips_takes_named_weights_and_says_where_they_come_from(tmp_path):
    with pytest.raises(InputError, match=r"none.pth: no such file; LPIPS needs the weights of https://.*alexnet-owt"):
        LPIPS(tmp_path / "none.pth")
    (tmp_path / "page.pth").write_text("<html>")
    with pytest.raises(InputError, match=r"page\.pth: not the weights of"):
        LPIPS(tmp_path / "page.pth")
    state = {name: value for name, value in alexnet(weights=None).state_dict().items() if name.startswith("features")}
    torch.save(state, tmp_path / "alex.pth")
    distance, image = LPIPS(tmp_path / "alex.pth"), torch.rand(2, 3, 32, 32, requires_grad=True)
    assert distance.name == "LPIPS (alex)"
    assert distance(image, image.detach()).abs().max() == 0
    far = distance(image, image.detach().flip(3))
    assert far.shape == (2,)
    torch.testing.assert_close(far, distance.network(2 * image - 1, 2 * image.detach().flip(3) - 1).flatten())
    assert float(far.min()) > 0.0
    assert torch.autograd.grad(far.sum(), image)[0].abs().max() > 0
    # The backbone is the file's.
    state["features.0.weight"] *= 2.0
    torch.save(state, tmp_path / "other.pth")
    assert not torch.allclose(LPIPS(tmp_path / "other.pth")(image, image.detach().flip(3)), far)
    with pytest.raises(InputError, match="LPIPS takes images of 32 pixels and more"):
        LF(distance)(zoo.classifier(), torch.rand(1, 1, 8, 8), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LF(SSIM(), kernels=[4]), r"kernels = \[4\]: use odd numbers"),
        (lambda: LF(SSIM(), penalty=0.0), "use numbers above 0"),
        (lambda: LF(SSIM(), color=float("nan")), "use numbers above 0"),
        (lambda: LF(SSIM), "distance = .*SSIM.*: use a distance such as SSIM()"),
        (lambda: LF(SSIM(), eps=0.0), "eps = 0.0 must be above 0"),
        (lambda: SSIM(sigma=0.0), "sigma = 0.0: use a number above 0"),
        (lambda: SSIM(sigma=9.0).check(torch.rand(1, 1, 8, 8)), r"sigma = 9.0: the window is larger than \(8, 8\)"),
        (lambda: LPIPS("x.pth", "resnet"), "network = 'resnet': use alex or vgg"),
    ],
)
def test_settings_that_cannot_be(make, message):
    with pytest.raises(InputError, match=message):
        make()
