"""Batch normalization over the batches of all processes, also on CPUs, which torch's own refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.nn.functional import all_reduce
from torch.nn.functional import batch_norm
from torch.overrides import TorchFunctionMode


class SynchronizedBatchNorm(TorchFunctionMode):
    """While active, every batch normalization in training mode uses the images of all processes.

    It replaces the function ``batch_norm``, so modules (timm's add an activation) and names of weights stay the same.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        return (_batch_norm if func is batch_norm else func)(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Like torch's ``batch_norm``, but in training mode with mean and variance over all processes."""
    if not training:
        return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    x = input.float()
    dims, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
    count = x.new_tensor([x.numel() / x.shape[1]])
    total = all_reduce(torch.cat([x.sum(dims), count]))  # type: ignore[no-untyped-call]
    n = total[-1].detach()
    mean = total[:-1] / n
    centered = x - mean.view(shape)
    var = all_reduce(centered.square().sum(dims)) / n  # type: ignore[no-untyped-call]
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * n / (n - 1)).to(running_var.dtype), momentum)
    y = centered * (var + eps).rsqrt().view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    return (y if bias is None else y + bias.view(shape)).to(input.dtype)
