"""The gradient of stacked weights, computed only at the entries of a mask: rows have experts.

For ``Y[rows of e] = X[rows of e] @ W[e].T`` the dense gradient is a stack of ``dY_e.T @ X_e``; each
is `sparseft.ops.sampled_grad` of its own rows. One call per expert, but for products so small that
planning one on a CPU would take longer than forming it: those go through a reused tile buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparseft.ops._common import accumulation_dtype, watched
from sparseft.ops._layout import TILE
from sparseft.ops._sampled_cpu import _tile_buffer
from sparseft.ops.sampled_grad import weight_grad_at

__all__ = ["grouped_grad_at"]

# Multiply-adds of a product that is formed whole: 0.1 ms of a GEMM, which is about what the plan
# and the two calls of one sampled product cost in Python.
_AT_ONCE = 6_000_000


def grouped_grad_reference(
    grad_output: Tensor,
    input: Tensor,
    rows: Sequence[Any],
    indices: Sequence[Tensor],
    transposed: bool = False,
) -> Tensor:
    """``(dY_e.T @ X_e).flatten()[indices_e]`` (transposed: ``X_e.T @ dY_e``), one after another."""
    wide = accumulation_dtype(grad_output.dtype, input.dtype)
    parts = []
    for own, places in zip(rows, indices, strict=True):
        dy, x = grad_output[own].to(wide), input[own].to(wide)
        parts.append((x.t() @ dy if transposed else dy.t() @ x).flatten()[places])
    return torch.cat(parts)


def grouped_grad_at(
    grad_output: Tensor,
    input: Tensor,
    rows: Sequence[Any],
    indices: Sequence[Tensor],
    transposed: bool = False,
    backend: str = "",
) -> Tensor:
    """Return the gradient of a stack of matrices at the entries of a mask.

    Args:
        grad_output: (T, M) floating.
        input: (T, N) floating.
        rows: which rows are each matrix's: a slice, or positions.
        indices: flat positions of the mask within each matrix, (M, N) or, ``transposed``, (N, M).
        transposed: the orientation of the matrices.
        backend: as in `sparseft.ops.sampled_weight_grad`.

    Returns:
        (nnz,) fp32, or fp64 when an operand is fp64: matrix after matrix.
    """
    wide = accumulation_dtype(grad_output.dtype, input.dtype)
    a, b = (input, grad_output) if transposed else (grad_output, input)
    size = a.shape[1] * b.shape[1]
    small = (
        backend != "triton"
        and a.device.type == "cpu"
        and 0 < size <= TILE
        and not watched(grad_output, input)
    )
    out = torch.empty(sum(i.numel() for i in indices), dtype=wide, device=a.device)
    start = 0
    for own, places in zip(rows, indices, strict=True):
        part = out[start : start + places.numel()]
        start += places.numel()
        if not places.numel():
            continue
        left, right = a[own], b[own]
        if left.shape[0] == 0:
            part.zero_()
        elif small and size * left.shape[0] <= _AT_ONCE:
            tile = _tile_buffer(size, wide)
            torch.mm(left.t().to(wide), right.to(wide), out=tile.view(a.shape[1], b.shape[1]))
            torch.index_select(tile, 0, places, out=part)
        else:
            dy, x = (right, left) if transposed else (left, right)
            part.copy_(weight_grad_at(dy, x, places, transposed, backend))
    return out
