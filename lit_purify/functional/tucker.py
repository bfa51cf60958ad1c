"""Tucker projections of tensors and of image patches, with an exact derivative."""

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
    """Projects the overlapping patches of each image, as one tensor (patches, channels, patch, patch), by ``tucker``.

    Overlapping patches are averaged. The computation is in float64 and rounded once.

    Args:
        image: (B, C, H, W); each image is projected by itself.
        ranks: Ranks of patches, channels, rows and columns.
        patch: Height and width of a patch.
        stride: Distance between patches; ``stride`` and ``patch`` must reach every pixel.
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
    """Projects tensors on the ``ranks`` leading directions of each mode (De Lathauwer et al. 2000, HOSVD and HOOI).

    Mode n is projected on the leading left singular vectors of the unfolding along n. HOSVD unfolds the tensor itself;
    each HOOI sweep unfolds the tensor projected in all other modes.

    Args:
        x: (B, n_1, .., n_N); each of the B tensors is projected by itself.
        ranks: N ranks; a rank of at least n_n leaves mode n unchanged.
        sweeps: Number of HOOI sweeps; 0 is HOSVD.
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
    """Returns the orthogonal projector on the ``rank`` leading eigenvectors of symmetric (B, n, n), differentiable.

    With eigenvalues l and eigenvectors u, kept i and dropped j: dP = sum_ij (u_i' dG u_j) / (l_i - l_j) (u_i u_j' +
    u_j u_i'). Equal eigenvalues among the kept, or among the dropped, do no harm. Where a kept one equals a dropped one
    the projector jumps, and the pair is left out; where both are 0 the pair does not affect the tensor.
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
        # The gradient of a symmetric matrix: half lies on each side of the diagonal.
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
