"""The Triton kernels, run by Triton's interpreter on CPU tensors, against PyTorch's formulas in float64."""

import copy
import gc
import os
import sys
import threading
import weakref
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import Curved, keyed, randomized
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lit_purify as lp
from lit_purify.errors import InputError
from lit_purify.evaluation import Evaluator, Ledger
from lit_purify.functional.levels import LevelMap, two_level
from lit_purify.functional.noise import ATTACK, KeyedNoise
from lit_purify.models import (
    MatchedSchedule,
    Replayed,
    Replays,
    ResNetClassifier,
    UNet,
    accelerated,
    arithmetic,
    layers,
)
from lit_purify.models.accelerated import _Graph
from lit_purify.training import DenoiserTask

LAST = torch.channels_last


@pytest.fixture(scope="module")
def interpreted():
    """The modules of kernels, for CPU tensors."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("where there is a GPU, Triton compiles")
    from lit_purify.functional import noise_kernel
    from lit_purify.models import fused

    return fused, noise_kernel


def close(found, expected, tolerance):
    """Relative error in the norm."""
    found, expected = found.detach().double(), expected.detach()
    assert (found - expected).norm() <= tolerance * expected.norm() + 1e-12


def leaves(tensors, dtype=None):
    """Copies that need a gradient."""
    return [
        None if tensor is None else (tensor if dtype is None else tensor.to(dtype)).clone().requires_grad_()
        for tensor in tensors
    ]


@pytest.mark.parametrize(
    ("rows", "channels", "second", "size", "groups", "levels", "mapped", "act", "dtype"),
    [
        # Groups of 20 channels, as in the 10.0 M network; a level map; and the bias of the convolution before.
        (2, 80, 0, 4, 4, 2, True, True, torch.float32),
        (3, 24, 0, 4, 6, 1, False, True, torch.float32),
        (2, 16, 0, 4, 4, 0, False, False, torch.float32),
        # A joined skip connection, whose border lies within a group.
        (2, 60, 20, 4, 4, 0, False, True, torch.float32),
        # One level and a map of one; several programs an image.
        (1, 64, 0, 32, 32, 1, True, True, torch.float32),
        (2, 32, 0, 4, 8, 2, True, True, torch.bfloat16),
    ],
)
def test_group_norm(interpreted, monkeypatch, rows, channels, second, size, groups, levels, mapped, act, dtype):
    monkeypatch.setattr(interpreted[0], "_PROGRAMS", 2)
    x = 2.0 * torch.randn(rows, channels, size, size) + 5.0
    spread = torch.rand(rows, levels, size, size).softmax(dim=1) if mapped else None
    given = [x.to(dtype), torch.randn(channels), torch.randn(channels), None if second else torch.randn(channels)]
    given += [torch.randn(rows, levels, 2 * channels) if levels else None, spread]
    ours, theirs = leaves(given), leaves(given, torch.float64)
    slope = torch.randn(rows, channels, size, size)

    def called(x, weight, bias, pre, levels, spread):
        parts = (x, None) if not second else (x[:, :-second], x[:, -second:])
        return interpreted[0].group_norm(parts[0], groups, weight, bias, 1e-5, act, pre, levels, spread, parts[1])

    out = called(*ours)
    x, weight, bias, pre, modulation, spread = theirs
    expected = F.group_norm(x if pre is None else x + pre[:, None, None], groups, weight, bias, 1e-5)
    if levels:
        each = modulation[:, 0, :, None, None]
        scale, shift = (torch.einsum("bln,blhw->bnhw", modulation, spread) if mapped else each).chunk(2, dim=1)
        expected = expected * (1.0 + scale) + shift
    expected = F.silu(expected) if act else expected
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=LAST)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    close(out, expected, tolerance)
    out.backward(slope.to(dtype))
    expected.backward(slope.to(dtype).double())
    for one, other in zip(ours, theirs, strict=True):
        if one is not None:
            close(one.grad, other.grad, tolerance)
    # Attacks need the gradient in the image alone.
    alone = leaves(given[:1])[0]
    called(alone, *given[1:]).backward(slope.to(dtype))
    close(alone.grad, theirs[0].grad, tolerance)


def test_sums_and_resampling(interpreted):
    kernels = interpreted[0]
    x, h, bias = torch.randn(2, 24, 4, 6).to(memory_format=LAST), *leaves((torch.randn(2, 24, 4, 6), torch.randn(24)))
    slope = torch.randn(2, 24, 4, 6)
    for out, expected in (
        (kernels.add(x, h, bias, 0.5), 0.5 * (x + h + bias[:, None, None])),
        (kernels.add(None, h, bias), h + bias[:, None, None]),
        (kernels.halved(h), F.avg_pool2d(h, 2)),
        (kernels.doubled(h), F.interpolate(h, scale_factor=2)),
    ):
        torch.testing.assert_close(out, expected)
        wanted = (h, bias) if expected.shape == h.shape else (h,)
        slope = torch.randn(expected.shape)
        found, right = (torch.autograd.grad(one, wanted, slope) for one in (out, expected))
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize(
    ("multipliers", "variant", "mapped", "most"),
    [
        ([1], {"attention": [2]}, True, 2),
        # More levels than the kernel takes.
        ([1], {}, True, 1),
        ([1, 2], {"scale_shift": False, "resampling": "conv_end"}, False, 2),
        ([1, 2], {"resampling": "residual", "rescale": True}, True, 2),
    ],
)
def test_networks_compute_the_same_by_kernels(interpreted, monkeypatch, multipliers, variant, mapped, most):
    unet = randomized(UNet(channels=1, size=2, width=8, multipliers=multipliers, blocks=1, **variant))
    unet.requires_grad_()
    monkeypatch.setattr(interpreted[0], "MOST_LEVELS", most)
    x, t = torch.randn(2, 1, 2, 2), torch.tensor([5, 80])
    t = two_level((torch.rand(2, 1, 2, 2) < 0.5).float(), 200, 100) if mapped else t
    found = []
    for kernels in (None, interpreted[0]):
        monkeypatch.setattr(layers, "kernels", lambda x, kernels=kernels: kernels)
        leaf = x.clone().requires_grad_()
        out = unet(leaf, t)
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), [leaf, *unet.parameters()])))
    for one, other in zip(*found, strict=True):
        close(one, other.double(), 1e-3)


def test_kernels_run_where_their_tensors_are(interpreted, monkeypatch):
    """Triton runs them on the current device, which may be another."""
    h, bias, index, on = torch.randn(1, 8, 2, 2), torch.randn(8), torch.zeros(1, dtype=torch.long), []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: on.append(tensor.shape) or nullcontext())
    fused, noise = interpreted
    for call in (
        lambda: fused.group_norm(h, 2, bias, bias, 1e-5, True),
        lambda: fused.add(None, h, bias),
        lambda: fused.halved(h),
        lambda: fused.doubled(h),
        lambda: noise.draw(h, index, index, 0, 0, ATTACK, True),
    ):
        call()
        assert on.pop() == h.shape
        assert not on


def test_noise_has_the_same_bits(interpreted):
    # Strided, as slices are.
    index, run = torch.tensor([[0, 1], [2**32 - 1, 2], [7, 4]])[:, 0], torch.tensor(2**31).expand(3)
    for dtype in (torch.float32, torch.bfloat16):
        like = torch.zeros(3, 3, 3, 2, dtype=dtype)
        for step, seed in ((2**32 - 2, 2**32 - 5), (1, 1)):
            noise = KeyedNoise(seed, index, run, ATTACK)
            for normal in (True, False):
                drawn = interpreted[1].draw(like, index, run, step, seed, ATTACK, normal)
                assert drawn.equal((noise.normal if normal else noise.uniform)(step, like))


def test_accelerated_networks(unet):
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([5, 50, 500])
    made = accelerated(unet)
    assert made(x, t).equal(unet(x, t))
    assert copy.deepcopy(made)(x, t).equal(unet(x, t))
    assert MatchedSchedule(made)(x, t).equal(MatchedSchedule(unet)(x, t))
    assert not any(weight.requires_grad for weight in made.parameters())
    low = accelerated(unet, "bf16")
    assert low.origin.endswith(", bf16")
    out = low(x, t)
    assert out.dtype == torch.float32
    close(out, unet(x, t).double(), 0.05)
    classifier = ResNetClassifier(8, 8, 10, 1, 4)
    image = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(accelerated(classifier)(image), classifier(image))
    for network, precision in ((unet, "fp8"), (classifier, "bf16")):
        with pytest.raises(InputError, match="use float32, or bf16 for a denoiser"):
            accelerated(network, precision)
    with pytest.raises(InputError, match="Curved supports float32 only"):
        accelerated(Curved(), "bf16")


def test_an_evaluation_in_16_bits(unet, classifier, images):
    """Of a denoiser that its defenses, and what attacks differentiate, share; the one that was given stays."""
    plain = lp.UniformPurifier(unet, 100, 2)
    defenses = {"uniform": plain, "resized": lp.ResizedPurifier(unet, lp.UniformPurifier(unet, 100, 2))}
    given = classifier, defenses, {"pgd": lp.PGD("linf", 0.1, 1, 0.1)}, {"pgd": lp.SurrogatePurifier(plain)}
    whole, low = (Evaluator(*given, precision=precision) for precision in ("float32", "bf16"))
    networks = {id(m) for m in low.modules() if isinstance(m, UNet)}
    networks.add(id(low.gradients["pgd"].purifier.denoiser))
    assert len(networks) == 1
    assert networks != {id(unet)}
    assert unet.stem.weight.dtype == torch.float32
    assert low.defenses["uniform"].purifier.denoiser.stem.weight.dtype == torch.bfloat16
    said = [arithmetic(torch.device("cpu"), each.precision, each.replay) for each in (whole, low)]
    assert said == ["float32", "bf16 denoisers, float32 classifiers"]
    assert low.identity()["precision"] == "bf16"
    assert "precision" not in whole.identity()
    purified = [each.defenses["resized"].purifier(images, keyed(6)) for each in (whole, low)]
    close(purified[1], purified[0].double(), 0.02)
    assert not purified[0].equal(purified[1])
    with pytest.raises(InputError, match="precision = 'fp8': use float32 or bf16"):
        Evaluator(*given, precision="fp8")
    # The classifier keeps its 32 bits, so it need not be copied; a defense must be.
    classifier.lock = threading.Lock()
    assert Evaluator(*given, precision="bf16").classifier is classifier
    plain.lock = classifier.lock
    with pytest.raises(InputError, match=r"precision = 'bf16': a defense cannot be copied \(.*\): use float32"):
        Evaluator(*given, precision="bf16")
    del classifier.lock, plain.lock
    with pytest.raises(InputError, match="own is a function: use a purifier"):
        Evaluator(classifier, {"own": lambda image: image}, *given[2:3], precision="bf16")


class Eager(_Graph):
    """A recorded call that is made again at each replay; like a CUDA graph it keeps the activations of the last one.

    And it writes what it computes to the same place each time.
    """

    def __init__(self, function, tensors, needs, learned):
        self.inputs = [x.detach().clone().requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]
        self.wanted = [x for x in self.inputs if x.requires_grad] + learned
        self.needs, self.call = (*needs, *(True for _ in learned)), None
        self.ahead, self.back = SimpleNamespace(replay=self.forward), SimpleNamespace(replay=self.backward)
        self.function, self.out, self.gradients = function, None, None

    def written(self, place, found):
        with torch.inference_mode(False), torch.no_grad():
            return found.detach().clone() if place is None else place.copy_(found)

    def forward(self):
        with (
            torch.set_grad_enabled(bool(self.wanted)),
            torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
        ):
            self.kept = self.function(*self.inputs)
        self.out, self.slope = self.written(self.out, self.kept), torch.empty_like(self.kept)

    def backward(self):
        found = torch.autograd.grad(self.kept, self.wanted, self.slope, retain_graph=True)
        before = self.gradients or [None] * len(found)
        self.gradients = [self.written(place, one) for place, one in zip(before, found, strict=True)]


@pytest.fixture(params=[True, False])
def recorded(request, monkeypatch):
    """Calls on a CPU are recorded as those on a GPU are, with and without memory for several graphs."""
    module = sys.modules[_Graph.__module__]
    monkeypatch.setattr(module, "_Graph", Eager)
    monkeypatch.setattr(module, "recordable", lambda tensor: True)
    monkeypatch.setattr(torch.random, "fork_rng", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(Eager, "fits_again", lambda self: request.param)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_gradients_of_recorded_calls(recorded, unet, recompute, learned):
    """Of a chain of calls, of two shapes, and of one whose activations are gone."""
    unet.requires_grad_(learned)
    made, found = accelerated(unet), []
    if learned:
        made = copy.deepcopy(made).requires_grad_()
        made.forward = Replayed(made, learns=True)
    x, mask = torch.randn(3, 1, 8, 8), (torch.rand(3, 1, 8, 8) < 0.5).float()
    for network in (unet, made):
        leaf, other = x.clone().requires_grad_(), (2.0 * x[:2]).requires_grad_()
        small, h = network(other, torch.tensor([7, 70])), leaf
        # The latter two share a graph, which must not overwrite gradients that are still to be summed.
        for t in (two_level(mask, 200, 100), torch.tensor([5, 50, 500]), torch.tensor([3, 30, 300])):
            h = h - 0.1 * (checkpoint(network, h, t, use_reentrant=False) if recompute else network(h, t))
        with torch.no_grad():
            network(leaf, torch.tensor([9, 9, 9]))
        wanted = [leaf, other, *(network.parameters() if learned else [])]
        found.append([h.detach(), *torch.autograd.grad(h.square().sum() + small.sum(), wanted)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_an_evaluation_replays_calls_and_masks(recorded, unet, classifier, images):
    """By itself, and unless it is told not to; with the same records, and networks that are afterwards as they were."""
    defenses = {"map": lp.VariableIntensityPurifier(unet, lp.TopFraction(0.3), 300, 150, 2)}
    attacks = {"pgd": lp.PGD("linf", 0.1, 2, 0.1, eot=2, loss="ce")}
    batch = {"image": images, "label": torch.arange(6), "index": torch.arange(6)}
    found, calls = [], []
    for replay in (True, False):
        evaluator = Evaluator(classifier, defenses, attacks, runs=2, chunk=16, replay=replay)
        ((records, _),) = evaluator.evaluate(batch, Ledger())
        found.append([replace(record, seconds=0.0) for record in records])
        calls.append({network: set(call.graphs) for network, call in evaluator.replays._calls.items()})
        assert all("forward" not in vars(network) for network in (unet, classifier))
        assert all(weight.is_contiguous() for weight in unet.parameters())
        evaluator.replays.forget()
        assert not any(call.graphs for call in evaluator.replays._calls.values())
    assert found[0] == found[1]
    assert set(calls[0]) == {unet, classifier}
    assert {key[0] for key in calls[0][classifier]} == {defenses["map"].mask._cut, ResNetClassifier.forward}
    assert not calls[1]


def test_what_cannot_be_recorded_is_called_as_ever(recorded, monkeypatch, classifier, images):
    """Unless memory ran out, for which there is another remedy."""
    asked, said, module = [], [], sys.modules[_Graph.__module__]

    def fails(*arguments):
        asked.append(1)
        raise error

    monkeypatch.setattr(module, "_Graph", fails)
    monkeypatch.setattr(module, "notice", said.append)
    error = RuntimeError("operation not permitted when stream is capturing\nmore")
    with Replays(classifier):
        for _ in range(2):
            assert classifier(images).equal(ResNetClassifier.forward(classifier, images))
    assert (len(asked), len(said)) == (1, 1)
    assert said[0].endswith("not replayed as CUDA graphs (operation not permitted when stream is capturing)")
    # And the report says so.
    evaluator = Evaluator(classifier, {"none": lp.NoPurifier()}, {"fgsm": lp.FGSM("linf", 0.1)}, runs=1, chunk=16)
    list(evaluator.evaluate({"image": images, "label": torch.arange(6), "index": torch.arange(6)}, Ledger()))
    assert evaluator.replays.refused == [type(classifier).__name__]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    calls = arithmetic(torch.device("cuda"), "float32", True, evaluator.replays.refused)
    assert calls.endswith("calls replayed as CUDA graphs (not of Small) (a GPU)")
    error = torch.OutOfMemoryError("CUDA out of memory")
    with Replays(classifier), pytest.raises(torch.OutOfMemoryError):
        classifier(images)


def test_where_memory_runs_out_graphs_make_room_before_chunks_shrink(recorded, classifier, images, capsys):
    evaluator = Evaluator(classifier, {"none": lp.NoPurifier()}, {"fgsm": lp.FGSM("linf", 0.1)}, runs=1, chunk=16)
    asked, evaluate = [], evaluator._evaluate

    def fails(*arguments):
        asked.append(arguments[-1])
        if len(asked) in (2, 4, 5):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return evaluate(*arguments)

    evaluator._evaluate, ledger = fails, Ledger()
    for k in range(3):
        rows = slice(2 * k, 2 * k + 2)
        batch = {"image": images[rows], "label": torch.arange(6)[rows], "index": torch.arange(6)[rows]}
        list(evaluator.evaluate(batch, ledger))
    assert asked == [16, 16, 16, 16, 16, 8]
    assert "out of memory with chunks of 16 rows" in capsys.readouterr().err


def test_calls_with_named_arguments_and_of_other_networks_are_not_recorded(recorded, monkeypatch, unet, images):
    """Somebody's purifier may name them; and nobody knows of somebody's network that it makes the same operations."""
    monkeypatch.setattr(sys.modules[_Graph.__module__], "_Graph", None)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 50])
    with Replays(unet):
        assert unet(x, t=t).equal(UNet.forward(unet, x, t))
    task = DenoiserTask(Curved(), constant=1.0, attention=0.0, shapes=0.0)
    assert task.loss({"image": images, "index": torch.arange(6)}, keyed(6)).isfinite()


def test_training_steps_are_recorded(recorded, unet, images):
    """With gradients of all weights; in training mode and out of it."""
    task = DenoiserTask(unet.requires_grad_(), attention=0.0, constant=0.5, shapes=0.5)
    batch = {"image": images, "index": torch.arange(6)}
    for mode in (True, False):
        task.train(mode).loss(batch, keyed(6)).backward()
    assert len(task._replayed.graphs) == 2
    assert all(weight.grad is not None for weight in unet.parameters())


def test_graphs_of_weights_that_were_moved_are_recorded_anew(recorded, unet):
    made, x, t = accelerated(unet), torch.randn(2, 1, 8, 8), torch.tensor([5, 50])
    (before,) = [made(x, t), *made.forward.graphs.values()][1:]
    made(x, t)
    assert next(iter(made.forward.graphs.values())) is before
    made.double().float()(x, t)
    (after,) = made.forward.graphs.values()
    assert after is not before
    assert made.forward._frozen[0][1].data_ptr() != made.forward._read[0].data_ptr()


def test_what_is_recorded_in_inference_mode_serves_outside_of_it(recorded, unet):
    made, x, t = accelerated(unet), torch.randn(2, 1, 8, 8), torch.tensor([5, 50])
    with torch.inference_mode():
        first = made(x, t)
    with torch.no_grad():
        assert made(x, t).equal(first)
    leaf = x.clone().requires_grad_()
    made(leaf, t).sum().backward()
    assert leaf.grad.any()
    assert not made.forward.refused


def test_other_arithmetic_is_another_recording(recorded, unet):
    """What kernels a call uses depends on global switches, which the caller may move between two calls."""
    made, x, t = accelerated(unet), torch.randn(2, 1, 8, 8), torch.tensor([5, 50])
    made(x, t)
    for name in ("allow_tf32", "deterministic"):
        before = getattr(torch.backends.cudnn, name)
        setattr(torch.backends.cudnn, name, not before)
        made(x, t)
        setattr(torch.backends.cudnn, name, before)
    made(x, t)
    assert len(made.forward.graphs) == 3


def test_outputs_are_copies_and_old_graphs_are_freed(recorded, unet):
    """Calls of other shapes, types and modes have graphs of their own; pixel levels must be sorted and have none."""
    call, kinds = Replayed(unet), []
    with torch.no_grad():
        for rows in range(1, 10):
            x, t = torch.randn(rows, 1, 8, 8), torch.full((rows,), 5)
            first = call(x, t)
            call(2 * x, t)
            assert first.equal(unet(x, t))
            kinds.append(next(reversed(call.graphs)))
        assert list(call.graphs) == kinds[-8:]
        assert call(x, torch.full((9, 1, 8, 8), 5)).allclose(first, atol=1e-5)
        assert list(call.graphs) == kinds[-8:]
    rows = torch.zeros(2, 1)

    def count(network, *given):
        return rows + len(given)

    assert call.replay(count, rows, LevelMap(rows, rows)).equal(rows + 2)
    assert call.replay(count, rows, rows, rows).equal(rows + 3)


def test_networks_with_recorded_calls_are_freed(recorded, unet):
    made = accelerated(unet)
    made(torch.randn(2, 1, 8, 8).requires_grad_(), torch.tensor([5, 50]))
    seen = weakref.ref(made)
    gc.disable()
    try:
        del made
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_calls_on_a_gpu_are_replayed(unet):
    unet = unet.cuda()
    made, t = accelerated(unet), torch.tensor([5, 50, 500]).cuda()
    first, second = (torch.randn(3, 1, 8, 8).cuda().requires_grad_() for _ in range(2))
    # The gradient of the first call is asked for after the second.
    ours = [made(x, t) for x in (first, second)]
    for x, out in zip((first, second), ours, strict=True):
        expected = unet(x, t)
        torch.testing.assert_close(out, expected)
        found, right = (torch.autograd.grad(one.square().sum(), x)[0] for one in (out, expected))
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4)
