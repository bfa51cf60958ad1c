"""Networks on a GPU: calls replayed as CUDA graphs, and 16-bit weights."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_purify.errors import InputError, notice
from lit_purify.functional.chunks import out_of_memory
from lit_purify.models.classifier import Classifier
from lit_purify.models.denoiser import Denoiser
from lit_purify.models.layers import first_order
from lit_purify.private import copies

Network = TypeVar("Network", Denoiser, Classifier)
T = TypeVar("T")
Precision = Literal["float32", "bf16"]

_MOST_KINDS, _MOST_ALIVE = 8, 8


def accelerated(network: Network, precision: Precision = "float32") -> Network:
    """Returns a frozen copy of a network whose calls on a GPU are replayed as CUDA graphs.

    Use it in scripts that call purifiers directly; evaluations and audits replay all networks anyway (``Replays``). A
    call and its gradient in the image are recorded once for every shape (about a second) and then cost one launch each.
    On other devices the calls are ordinary.

    Args:
        network: A denoiser or a classifier.
        precision: ``bf16`` (denoisers only, see ``rounded``) or ``float32``, which keeps the weights unchanged.

    Raises:
        InputError: ``precision`` is invalid or not supported by the network.
    """
    if precision not in ("float32", "bf16") or (precision == "bf16" and not isinstance(network, Denoiser)):
        raise InputError(f"precision = {precision!r}: use float32, or bf16 for a denoiser")
    made = copy.deepcopy(network).eval().requires_grad_(False)
    if precision == "bf16":
        rounded(made)
    made.forward = Replayed(made)  # type: ignore[method-assign]
    return made


def copied(values: T, kept: nn.Module) -> T:
    """Returns a deep copy of objects that share networks, without ``kept``, or raises an ``InputError``."""
    try:
        return copy.deepcopy(values, {id(kept): kept})
    except (TypeError, RuntimeError) as error:
        raise InputError(f"precision = 'bf16': a defense cannot be copied ({error}): use float32") from error


def rounded(module: nn.Module) -> None:
    """Makes the denoisers inside a module compute in bf16.

    Weights are rounded once. Products and activations have 16 bits; normalization statistics, images and predicted
    noise have 32.

    Raises:
        InputError: A denoiser is not a network of this library.
    """
    for denoiser in [m for m in module.modules() if isinstance(m, Denoiser)]:
        if not denoiser.recordable and not any(isinstance(m, Denoiser) for m in list(denoiser.modules())[1:]):
            raise InputError(f"precision = 'bf16': {type(denoiser).__name__} supports float32 only, use that")
        if denoiser.recordable and not denoiser.origin.endswith(", bf16"):
            for layer in denoiser.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    layer.to(torch.bfloat16)
        denoiser.origin = denoiser.origin.removesuffix(", bf16") + ", bf16"


def arithmetic(device: torch.device, precision: Precision, replay: bool, refused: Sequence[str] = ()) -> str:
    """Describes the precision of an evaluation and, on a GPU, how networks are called, for reports.

    ``refused`` names the networks whose calls could not be recorded.
    """
    text = "float32" if precision == "float32" else f"{precision} denoisers, float32 classifiers"
    if device.type == "cuda":
        wide = "TF32" if _convolutions() == "tf32" else "float32"
        calls = "replayed as CUDA graphs" if replay else "one by one"
        calls += f" (not of {', '.join(refused)})" if refused else ""
        text += f", {wide} convolutions, calls {calls} ({torch.cuda.get_device_name(device)})"
    return text


def _convolutions() -> str:
    """The precision of float32 convolutions; ``allow_tf32`` cannot be read if a caller mixes both of torch's APIs."""
    cudnn: Any = torch.backends.cudnn
    return str(cudnn.conv.fp32_precision)


class Replays:
    """Replays calls of networks on a GPU (``Replayed``) inside a ``with`` block and restores them afterwards.

    Args:
        modules: Their ``recordable`` networks are replayed. Weights must not change between two ``with`` blocks.
    """

    def __init__(self, *modules: nn.Module) -> None:
        found = (m for module in modules for m in module.modules() if getattr(m, "recordable", False))
        self._calls = {network: Replayed(network) for network in found if "forward" not in vars(network)}

    def __enter__(self) -> None:
        for network, call in self._calls.items():
            vars(network)["forward"] = call

    def __exit__(self, *_: object) -> None:
        for network in self._calls:
            vars(network).pop("forward", None)

    @property
    def refused(self) -> list[str]:
        """Classes of the networks whose calls could not be recorded."""
        return sorted({type(network).__name__ for network, call in self._calls.items() if call.refused})

    def forget(self) -> bool:
        """Frees all recorded graphs and returns whether there were any."""
        for call in self._calls.values():
            call.graphs.clear()
        return any(call.used for call in self._calls.values())


def replayed(function: Callable[..., Tensor], network: nn.Module, *arguments: Any) -> Tensor:  # noqa: ANN401
    """Calls ``function(network, *arguments)``, replayed if the network's calls are.

    Args:
        function: Maps tensors to one tensor; it must not depend on other changing state nor synchronize the device.
        network: A network that it calls.
        arguments: Tensors.
    """
    call = vars(network).get("forward")
    return call.replay(function, *arguments) if isinstance(call, Replayed) else function(network, *arguments)


class Replayed:
    """A network whose calls and gradients on a GPU are replayed as CUDA graphs; elsewhere calls are ordinary.

    Graphs are kept for the latest eight combinations of shapes, types and modes. A gradient needs the activations of
    its call. While it is pending, the next call gets another graph, up to eight and as long as memory is free; after
    that the oldest activations are overwritten and recomputed for their gradient. Results are copies, so later calls do
    not change them. A network that cannot be recorded is called as usual.

    Args:
        network: Maps tensors and tuples of tensors to one tensor without synchronizing the device. It is referenced
            weakly.
        learns: Also record the gradients of weights that require one at the first call. Other weights are recorded
            channels last.
    """

    def __init__(self, network: nn.Module, learns: bool = False) -> None:
        self._network, self._learns = weakref.ref(network), learns
        self.graphs: dict[Any, list[_Graph]] = {}
        self._learned: list[Tensor] | None = None
        self._frozen: list[tuple[Tensor, Tensor]] = []
        self._read: list[Tensor] = []
        self.refused = False

    @property
    def used(self) -> bool:
        """Whether recording was attempted."""
        return self._learned is not None

    def __call__(self, *arguments: Any, **named: Any) -> Tensor:  # noqa: ANN401
        """Returns the network's output; calls with named arguments are not replayed."""
        network = self._network()
        assert network is not None
        function: Callable[..., Tensor] = type(network).forward
        return function(network, *arguments, **named) if named else self.replay(function, *arguments)

    def replay(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:  # noqa: ANN401
        """Returns ``function(network, *arguments)``."""
        network = self._network()
        assert network is not None
        tensors: list[Tensor] = []
        for argument in arguments:
            tensors += argument if isinstance(argument, tuple) else [argument]
        # Pixel levels, (B, 1, H, W), must be sorted first, which synchronizes the device.
        sorts = len(arguments) > 1 and isinstance(arguments[1], Tensor) and arguments[1].ndim == 4
        if sorts or self.refused or not recordable(tensors[0]):
            return function(network, *arguments)
        # Graphs read weights where they were when the first was recorded, and keep them there.
        if self._read and self._read[0].data_ptr() != next(network.parameters()).data_ptr():
            self.graphs.clear()
            self._learned = None
        if self._learned is None:
            self._read = [weight.data for weight in network.parameters()]
            learn = [weight.requires_grad and self._learns for weight in network.parameters()]
            weights = list(zip(network.parameters(), learn, strict=True))
            self._learned = [weight for weight, learns in weights if learns]
            frozen = [weight for weight, learns in weights if weight.ndim == 4 and not learns]
            with torch.inference_mode(False):
                self._frozen = [(w, w.data.contiguous(memory_format=torch.channels_last)) for w in frozen]
        learned = self._learned if torch.is_grad_enabled() else []
        needs = tuple(tensor.requires_grad and torch.is_grad_enabled() for tensor in tensors)
        cast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key: tuple[Any, ...] = (function, *map(type, arguments), needs, cast, len(learned), network.training)
        key += tuple((tensor.device, tensor.shape, tensor.dtype) for tensor in tensors)
        key += (_convolutions(), torch.backends.cuda.matmul.fp32_precision)
        key += (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic)
        graphs = self.graphs.pop(key, [])
        self.graphs[key] = graphs
        if len(self.graphs) > _MOST_KINDS:
            del self.graphs[next(iter(self.graphs))]
        graph = next((graph for graph in graphs if not graph.pending), None)
        if graph is None and (not graphs or (len(graphs) < _MOST_ALIVE and graphs[0].fits_again())):

            def flat(*inputs: Tensor) -> Tensor:
                left = iter(inputs)
                return function(
                    # A weak reference, so that the graph does not keep the network alive.
                    self._network(),
                    *(type(a)(*(next(left) for _ in a)) if isinstance(a, tuple) else next(left) for a in arguments),
                )

            device, grad = tensors[0].device, torch.is_grad_enabled()
            try:
                with (
                    # Its device need not be the current one, and a recording that fails leaves its own stream behind.
                    torch.cuda.stream(torch.cuda.current_stream(device) if device.type == "cuda" else None),
                    # Else the next call could not write to the inputs of this one.
                    torch.inference_mode(False),
                    torch.set_grad_enabled(grad),
                    torch.random.fork_rng([device]),
                    torch.autocast("cuda", cast, enabled=cast is not None, cache_enabled=False),
                    _swapped(self._frozen),
                ):
                    graph = _Graph(flat, tensors, needs, learned)
            except RuntimeError as error:
                # When memory runs out, freeing these graphs leaves room for smaller calls.
                self.graphs.clear()
                if out_of_memory(error):
                    raise
                self.refused = True
                reason = str(error).partition("\n")[0]
                notice(f"warning: {type(network).__name__}: its calls are not replayed as CUDA graphs ({reason})")
                return function(network, *arguments)
            graphs.append(graph)
        elif graph is None:
            graph = graphs.pop(0)
            graphs.append(graph)
        out: Tensor = _Replay.apply(graph, *tensors, *learned)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Replayed:
        """Copies the network; the copy records its own calls."""
        return Replayed(copy.deepcopy(self._network(), memo), self._learns)  # type: ignore[arg-type]


@contextmanager
def _swapped(weights: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Replaces the data of weights temporarily."""
    own = [weight.data for weight, _ in weights]
    for weight, other in weights:
        weight.data = other
    try:
        yield
    finally:
        for (weight, _), data in zip(weights, own, strict=True):
            weight.data = data


def recordable(tensor: Tensor) -> bool:
    """Whether a call with this tensor can become a CUDA graph."""
    return first_order() and tensor.is_cuda and not torch.cuda.is_current_stream_capturing()


class _Graph:
    """A recorded call (``ahead``) and, if a gradient is needed, its backward pass (``back``)."""

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
        # A surrounding checkpoint must not save these activations.
        with torch.autograd.graph.saved_tensors_hooks(_same, _same):
            with torch.cuda.stream(stream):
                # Build kernels and allocate workspaces before recording.
                for _ in range(2):
                    out = function(*self.inputs)
                    if self.wanted:
                        torch.autograd.grad(out, self.wanted, torch.ones_like(out))
                del out
            torch.cuda.current_stream().wait_stream(stream)
            self.ahead, self.back, pool = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
            # Other threads, such as one that pins batches, may continue.
            with torch.cuda.graph(self.ahead, pool=pool, capture_error_mode="thread_local"):
                out = function(*self.inputs)
            if self.wanted:
                self.slope = torch.empty_like(out)
                with torch.cuda.graph(self.back, pool=pool, capture_error_mode="thread_local"):
                    self.gradients = torch.autograd.grad(out, self.wanted, self.slope)
        self.out, self.bytes = out.detach(), before - torch.cuda.mem_get_info()[0]

    @property
    def pending(self) -> bool:
        """Whether the gradient of the latest call may still be requested."""
        return bool(self.wanted) and self.call is not None and self.call() is not None

    def fits_again(self) -> bool:
        """Whether there is memory for another graph of this size, plus half as much."""
        return torch.cuda.mem_get_info(self.out.device)[0] > 1.5 * self.bytes

    def replay(self, tensors: tuple[Tensor, ...], call: _Call) -> None:
        """Runs the function."""
        with torch.no_grad():
            for mine, given in zip(self.inputs, tensors, strict=True):
                mine.copy_(given)
        self.ahead.replay()
        self.call = weakref.ref(call)


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _Call:
    """A call; it lives as long as its gradient may be requested."""


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
            # Another call has overwritten the activations of this one.
            graph.replay(ctx.saved_tensors, ctx.call)
        graph.slope.copy_(slope)
        graph.back.replay()
        graph.call = None
        found = iter(copies(graph.gradients))
        return None, *(next(found) if need else None for need in graph.needs)
