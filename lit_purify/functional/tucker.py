"""Tucker projections of tensors and of the patches of images, with the exact derivative of the projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import fold


def low_rank(
    image: Tensor, ranks: Sequence[int], patch: int, stride: int, sweeps: int = 1, held: bool = False
) -> Tensor:
    """Images whose overlapping patches, as one tensor (patches, channels, patch, patch), were projected by ``tucker``.

    Patches are put back by averaging where they overlap. Computed in float64 and rounded once.

    Args:
        image: (B, C, H, W), each projected by itself.
        ranks: Of patches, channels, rows and columns.
        patch: Height and width of a patch.
        stride: Between patches; ``stride`` and ``patch`` must reach every pixel.
        sweeps: See ``tucker``.
        held: See ``tucker``.
    """
    x = image.double()
    patches = x.unfold(2, patch, stride).unfold(3, patch, stride)
    count = patches.shape[2] * patches.shape[3]
    tensor = patches.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    tensor = tucker(tensor, ranks, sweeps, held)
    columns = tensor.flatten(2).transpose(1, 2)
    covered = fold(x.new_ones(1, patch * patch, count), x.shape[-2:], patch, stride=stride)
    return (fold(columns, x.shape[-2:], patch, stride=stride) / covered).to(image.dtype)


def tucker(x: Tensor, ranks: Sequence[int], sweeps: int = 1, held: bool = False) -> Tensor:
    """Tensors projected on ``ranks`` leading directions of each mode (De Lathauwer et al. 2000, HOSVD and HOOI).

    Mode n is projected on the leading left singular vectors of the unfolding along n: at first of the tensor itself
    (HOSVD); in each sweep (HOOI) of the tensor projected in all other modes.

    Args:
        x: (B, n_1, .., n_N), B tensors; each is projected by itself.
        ranks: N of them; n_n or more leaves mode n as it is.
        sweeps: Of HOOI; 0 is HOSVD.
        held: Hold the directions constant in the gradient, which is then that of a linear projection.

    Returns:
        The same shape, differentiable.
    """
    of, found = x.detach() if held else x, dict[int, Tensor]()
    modes = [mode for mode, rank in enumerate(ranks, start=1) if rank < x.shape[mode]]
    for sweep in range(1 + (sweeps if len(modes) > 1 else 0)):
        for mode in modes:
            others = {other: found[other] for other in modes if other != mode and sweep}
            found |= {mode: leading(_gram(_projected(of, others), mode), ranks[mode - 1])}
    return _projected(x, found)


def leading(gram: Tensor, rank: int) -> Tensor:
    """The orthogonal projector on the ``rank`` leading eigenvectors of symmetric matrices (B, n, n), differentiable.

    With eigenvalues l and eigenvectors u, kept i and dropped j: dP = sum_ij (u_i' dG u_j) / (l_i - l_j) (u_i u_j' +
    u_j u_i'). Eigenvalues that are equal among the kept, or among the dropped, do no harm. Where a kept one equals a
    dropped one the projector jumps; that pair is left out: where both are 0 it changes nothing in the tensor.
    """
    return _Leading.apply(gram, rank)


class _Leading(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gram: Tensor, rank: int) -> Tensor:  # noqa: ANN401
        values, vectors = torch.linalg.eigh(gram)
        ctx.save_for_backward(values, vectors)
        ctx.rank = rank
        kept = vectors[..., -rank:]
        return kept @ kept.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        values, vectors = ctx.saved_tensors
        low, high = vectors[..., : -ctx.rank], vectors[..., -ctx.rank :]
        gap = values[..., None, -ctx.rank :] - values[..., : -ctx.rank, None]
        smallest = torch.finfo(values.dtype).eps * values.shape[-1] * values[..., -1:, None]
        both = low.mT @ (slope + slope.mT) @ high
        inner = torch.where(gap > smallest, both / gap, 0.0)
        # Of a symmetric matrix: half of it stands on each side of the diagonal.
        found = low @ inner @ high.mT / 2.0
        return found + found.mT, None


def _gram(x: Tensor, mode: int) -> Tensor:
    unfolded = x.movedim(mode, 1).flatten(2)
    return unfolded @ unfolded.mT


def _projected(x: Tensor, projectors: Mapping[int, Tensor]) -> Tensor:
    for mode, projector in projectors.items():
        moved = x.movedim(mode, 1)
        x = (projector @ moved.flatten(2)).reshape(moved.shape).movedim(1, mode)
    return x
