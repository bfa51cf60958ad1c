"""Networks made ready for evaluation on a GPU: layout, precision, and calls recorded as CUDA graphs."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_purify.errors import InputError
from lit_purify.models.classifier import Classifier
from lit_purify.models.denoiser import Denoiser
from lit_purify.private import copies

Network = TypeVar("Network", Denoiser, Classifier)

_MOST_KINDS, _MOST_ALIVE = 8, 8


def accelerated(network: Network, precision: Literal["float32", "bf16"] = "float32") -> Network:
    """A frozen copy of a network for evaluations on GPUs: weights channels last, and calls replayed as CUDA graphs.

    A call and its gradient in the image are recorded once for every shape (in about a second), and cost one launch
    each from then on. On other devices the calls are the ordinary ones.

    Args:
        network: A denoiser or a classifier.
        precision: Of a denoiser. ``bf16``: weights are rounded once; products and activations have 16 bits, statistics
            of normalizations, images and predicted noise 32. ``float32`` leaves the weights as they are.

    Raises:
        InputError: ``precision`` has no such value, or a classifier is to have another than ``float32``.
    """
    if precision not in ("float32", "bf16") or (precision == "bf16" and not isinstance(network, Denoiser)):
        raise InputError(f"precision = {precision!r}: use float32, or bf16 for a denoiser")
    made = copy.deepcopy(network).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    if precision == "bf16":
        for module in made.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(torch.bfloat16)
        made.origin += ", bf16"
    made.forward = Replayed(made)  # type: ignore[method-assign, assignment]
    return made


class Replayed:
    """A network whose calls on a GPU are recorded as CUDA graphs, with their gradients; elsewhere they are ordinary.

    There is a graph, or more, for each of the latest eight sets of shapes, types and modes. A gradient needs the
    activations of its call: while it is outstanding, the next call gets a graph of its own, up to eight of them and as
    long as memory is free; after that the oldest activations make room, and are recomputed for their gradient. Results
    are copies, so that later calls do not change them.

    Args:
        network: From tensors and tuples of tensors to one tensor; its calls must not wait for the device. It is not
            kept alive. Gradients of those weights that require one at the first call are recorded as well.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = weakref.ref(network)
        self._graphs: dict[Any, list[_Graph]] = {}
        self._learned: list[Tensor] | None = None

    def _call(self, *arguments: Any) -> Tensor:  # noqa: ANN401
        network = self._network()
        assert network is not None
        out: Tensor = type(network).forward(network, *arguments)
        return out

    def __call__(self, *arguments: Any) -> Tensor:  # noqa: ANN401
        """The network's output."""
        tensors: list[Tensor] = []
        for argument in arguments:
            tensors += argument if isinstance(argument, tuple) else [argument]
        # Levels of pixels, (B, 1, H, W), are sorted first, for which the host waits.
        sorts = len(arguments) > 1 and isinstance(arguments[1], Tensor) and arguments[1].ndim == 4
        if sorts or not recordable(tensors[0]):
            return self._call(*arguments)
        network = self._network()
        assert network is not None
        if self._learned is None:
            self._learned = [weight for weight in network.parameters() if weight.requires_grad]
        learned = self._learned if torch.is_grad_enabled() else []
        needs = tuple(tensor.requires_grad and torch.is_grad_enabled() for tensor in tensors)
        cast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key: tuple[Any, ...] = (*map(type, arguments), needs, cast, len(learned), network.training)
        key += tuple((tensor.device, tensor.shape, tensor.dtype) for tensor in tensors)
        graphs = self._graphs.pop(key, [])
        self._graphs[key] = graphs
        if len(self._graphs) > _MOST_KINDS:
            del self._graphs[next(iter(self._graphs))]
        graph = next((graph for graph in graphs if not graph.awaited), None)
        if graph is None and (not graphs or (len(graphs) < _MOST_ALIVE and graphs[0].fits_again())):

            def function(*flat: Tensor) -> Tensor:
                left = iter(flat)
                return self._call(
                    *(type(a)(*(next(left) for _ in a)) if isinstance(a, tuple) else next(left) for a in arguments)
                )

            try:
                with (
                    torch.random.fork_rng([tensors[0].device]),
                    torch.autocast("cuda", cast, enabled=cast is not None, cache_enabled=False),
                ):
                    graph = _Graph(function, tensors, needs, learned)
            except RuntimeError:
                # Perhaps out of memory, which the others hold: smaller calls are to find it free.
                self._graphs.clear()
                raise
            graphs.append(graph)
        elif graph is None:
            graph = graphs.pop(0)
            graphs.append(graph)
        out: Tensor = _Replay.apply(graph, *tensors, *learned)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Replayed:
        """The copy of a network records its own calls."""
        return Replayed(copy.deepcopy(self._network(), memo))  # type: ignore[arg-type]


def recordable(tensor: Tensor) -> bool:
    """Whether a call with this tensor can become a CUDA graph."""
    return tensor.is_cuda and not torch.cuda.is_current_stream_capturing()


class _Graph:
    """A recorded call, ``ahead``, and if anything needs a gradient, ``back``."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        tensors: list[Tensor],
        needs: tuple[bool, ...],
        learned: list[Tensor],
    ) -> None:
        self.inputs = [
            tensor.detach().clone().requires_grad_(need) for tensor, need in zip(tensors, needs, strict=True)
        ]
        self.wanted = [tensor for tensor in self.inputs if tensor.requires_grad] + learned
        self.needs = (*needs, *(True for _ in learned))
        self.call: weakref.ref[_Call] | None = None
        before = torch.cuda.mem_get_info()[0]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        # A checkpoint that this call is part of is not to take these activations for its own.
        with torch.autograd.graph.saved_tensors_hooks(_same, _same):
            with torch.cuda.stream(stream):
                # Kernels are built and workspaces taken before anything is recorded.
                for _ in range(2):
                    out = function(*self.inputs)
                    if self.wanted:
                        torch.autograd.grad(out, self.wanted, torch.ones_like(out))
                del out
            torch.cuda.current_stream().wait_stream(stream)
            self.ahead, self.back, pool = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
            # Other threads, such as one that pins the memory of batches, may go on meanwhile.
            with torch.cuda.graph(self.ahead, pool=pool, capture_error_mode="thread_local"):
                out = function(*self.inputs)
            if self.wanted:
                self.slope = torch.empty_like(out)
                with torch.cuda.graph(self.back, pool=pool, capture_error_mode="thread_local"):
                    self.gradients = torch.autograd.grad(out, self.wanted, self.slope)
        self.out, self.bytes = out.detach(), before - torch.cuda.mem_get_info()[0]

    @property
    def awaited(self) -> bool:
        """Whether the gradient of the latest call may still be asked for."""
        return bool(self.wanted) and self.call is not None and self.call() is not None

    def fits_again(self) -> bool:
        """Whether there is memory for another such graph, and half as much again for the rest."""
        return torch.cuda.mem_get_info()[0] > 1.5 * self.bytes

    def replay(self, tensors: tuple[Tensor, ...], call: _Call) -> None:
        """Calls the function."""
        with torch.no_grad():
            for mine, given in zip(self.inputs, tensors, strict=True):
                mine.copy_(given)
        self.ahead.replay()
        self.call = weakref.ref(call)


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _Call:
    """One call; it lives as long as its gradient may be asked for."""


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, *tensors: Tensor) -> Tensor:  # noqa: ANN401
        tensors = tensors[: len(graph.inputs)]
        ctx.graph, ctx.call = graph, _Call()
        graph.replay(tensors, ctx.call)
        ctx.save_for_backward(*tensors)
        return graph.out.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        graph: _Graph = ctx.graph
        if graph.call is None or graph.call() is not ctx.call:
            # Another call has taken the place of this one's activations.
            graph.replay(ctx.saved_tensors, ctx.call)
        graph.slope.copy_(slope)
        graph.back.replay()
        graph.call = None
        found = iter(copies(graph.gradients))
        return None, *(next(found) if need else None for need in graph.needs)
