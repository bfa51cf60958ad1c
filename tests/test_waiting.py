"""What a GPU would have to be waited for, found without one: on the meta device, whose tensors have no values."""

import copy

import pytest
import torch
from test_purifiers import every
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lit_purify.defense import (
    AverageMask,
    DefendedClassifier,
    InvertedMask,
    MinMaxThreshold,
    QuantizedSaliency,
    RandomArea,
    RenormalizedInput,
    ShiftedMask,
    SoftmaxThreshold,
    TopFraction,
    VariableIntensityPurifier,
)
from lit_purify.functional.noise import KeyedNoise
from lit_purify.models import MatchedSchedule

RULES = {
    "top": TopFraction(0.3),
    "inverse": InvertedMask(MinMaxThreshold(0.5)),
    "random": RandomArea(TopFraction(0.3)),
    "votes": AverageMask([TopFraction(0.1), ShiftedMask(TopFraction(0.3))]),
    "proportional": QuantizedSaliency(4),
    "renormalized": RenormalizedInput(SoftmaxThreshold(0.01), [0.7], [0.1]),
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
        defended = DefendedClassifier(build(unet), classifier)
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
    assert not copies(lambda unet: VariableIntensityPurifier(MatchedSchedule(unet), RULES[rule], 400, 200, 2))


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
    class Waiting(TopFraction):
        def build(self, *args):
            return wait(super().build(*args))

    assert copies(lambda unet: VariableIntensityPurifier(unet, Waiting(0.3), 400, 200, 2))
