"""What a GPU would have to be waited for, found without one: on the meta device, whose tensors have no values."""

import copy

import pytest
import torch
from conftest import UNET as SMALL
from conftest import Curved, Small
from test_purifiers import every
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lit_purify as lp
from lit_purify.functional import chunks
from lit_purify.functional.chunks import logits_in_chunks
from lit_purify.functional.levels import two_level
from lit_purify.functional.noise import KeyedNoise
from lit_purify.models import MatchedSchedule, UNet

RULES = {
    "top": lp.TopFraction(0.3),
    "inverse": lp.InvertedMask(lp.MinMaxThreshold(0.5)),
    "random": lp.RandomArea(lp.TopFraction(0.3)),
    "votes": lp.AverageMask([lp.TopFraction(0.1), lp.ShiftedMask(lp.TopFraction(0.3))]),
    "proportional": lp.QuantizedSaliency(4),
    "renormalized": lp.RenormalizedInput(lp.SoftmaxThreshold(0.01), [0.7], [0.1]),
}


class Copies(TorchDispatchMode):
    """Counts copies between host and device that are waited for; reading a value fails by itself."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        ends = {x.device.type for x in (*args[:2], out) if isinstance(x, torch.Tensor)}
        blocking = not ((kwargs or {}).get("non_blocking") or (len(args) > 2 and args[2] is True))
        self.found += "copy" in function.name() and len(ends) == 2 and blocking
        return out


class Literals(TorchFunctionMode):
    """Counts values of the host that become tensors of the device."""

    found = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = function in (torch.tensor, torch.as_tensor, torch.from_numpy) and not isinstance(args[0], torch.Tensor)
        made = made or function is torch.Tensor.new_tensor
        self.found += made and out.device.type == "meta"
        return out


@pytest.fixture
def copies(unet, classifier):
    """Counts what is waited for in a purification and its gradient."""
    unet, classifier = (copy.deepcopy(network).to("meta") for network in (unet, classifier))

    def count(build):
        defended = lp.DefendedClassifier(build(unet), classifier)
        image = torch.rand(4, 1, 8, 8, device="meta").requires_grad_()
        index = torch.arange(4, device="meta")
        with Copies() as copied, Literals() as told:
            try:
                logits = defended(image, KeyedNoise(0, index, torch.zeros_like(index)))
                torch.autograd.grad(logits.sum(), image)
            except RuntimeError as error:
                if "meta tensors" in str(error):
                    return "a value is read"
                raise
        return copied.found + told.found

    return count


@pytest.mark.parametrize("name", ["ddpm", "sde", "gradual", "resized", "heterogeneous-single", "heterogeneous-release"])
def test_no_purifier_waits(name, copies):
    assert not copies(lambda unet: every(unet)[name])


@pytest.mark.parametrize("rule", RULES)
def test_no_mask_waits(rule, copies):
    assert not copies(lambda unet: lp.VariableIntensityPurifier(MatchedSchedule(unet), RULES[rule], 400, 200, 2))


@pytest.mark.parametrize(
    "wait",
    [
        lambda mask: mask * torch.ones(1).to(mask.device),
        lambda mask: mask * torch.tensor([1.0], device=mask.device),
        lambda mask: mask * mask.new_tensor([1.0]),
        lambda mask: mask if mask.sum() > 1 else 1 - mask,
    ],
)
def test_waiting_is_seen(copies, wait):
    class Waiting(lp.TopFraction):
        def build(self, *args):
            return wait(super().build(*args))

    assert copies(lambda unet: lp.VariableIntensityPurifier(unet, Waiting(0.3), 400, 200, 2))


@pytest.mark.parametrize("name", ["ddpm", "variable", "heterogeneous-single"])
def test_an_attack_step_waits_once_for_the_device(name, monkeypatch):
    """On the meta device, where to ask for a value is an error."""
    with torch.device("meta"):
        unet = UNet(**SMALL)
        image, label, index = torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.long), torch.arange(3)
    purifier = every(Curved().to("meta"))[name]
    function = lp.Exact().attacked(lp.DefendedClassifier(purifier, Small().to("meta"))).function
    asked = []
    monkeypatch.setattr(chunks, "_check_finite", lambda **values: asked.append(set(values)))
    monkeypatch.setattr(torch, "tensor", None)
    # On a GPU a kernel, which waits for nothing.
    monkeypatch.setattr(KeyedNoise, "_draw", lambda noise, step, like, normal: torch.empty_like(like))
    noise = KeyedNoise(0, index, torch.zeros_like(index))
    with Copies() as copied:
        unet(image, label)
        unet(image, two_level(image, index, label))
        adversarial = lp.PGD("linf", 0.1, 1, 0.1, eot=2).perturb(function, image, label, noise, 4)
        assert logits_in_chunks(function, adversarial, noise, [0, 1], 4).shape == (3, 2, 10)
        # Which calls the clean images first.
        lp.APGD("linf", 0.1, 1, eot=2).perturb(function, image, label, noise, 4)
    assert asked == [{"output", "gradient"}] + 2 * [{"output"}] + 2 * [{"output", "gradient"}]
    assert not copied.found
