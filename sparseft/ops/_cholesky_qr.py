"""Orthonormal columns of tall matrices: fp64 Gram, Cholesky, triangular solve; QR where that fails.

The Gram and the solve are matrix products, the factorisation is small: on every device this is
several times faster than Householder QR. The Gram squares the condition number, so that one pass in
fp64 leaves ``|Q^T Q - I|`` at 1e-8 for a condition of 1e4 and 4e-5 at 1e6; two passes hold up to
1e8. A pivot that says worse, or that does not exist, sends its matrix to `torch.linalg.qr`.

A route in fp32 that waits for nothing is `sparseft.ops.cholesky_inverse.cholesky_qr_float32`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["independent_columns", "orthonormal_columns"]

# A pivot squared over its column's squared norm: the share of the column that the columns before it
# do not explain. One pass in fp64 leaves about 2e-16 over it.
_LEAST_PIVOT = 1e-11  # below: QR
_EASY_PIVOT = 1e-6  # above: a second pass changes nothing that matters
_ROUGH_PIVOT = 1e-3  # above: a Gram in fp32 leaves columns far from dependent


def orthonormal_columns(columns: Tensor, *, passes: int) -> Tensor:
    """Return ``Q`` with ``columns = Q R``, R upper triangular with a non-negative diagonal.

    Args:
        columns: (B, n, k), k <= n, floating, finite. Dependent and zero columns are allowed: Q then
            has some orthonormal completion in their place. How the columns are scaled against each
            other does not matter.
        passes: at most so many of the Cholesky route: 1 inside an iteration, 2 for a result.

    Returns:
        (B, n, k) float64; its memory may be laid out by columns.
    """
    wide = columns.double()
    if not wide.numel():
        return wide
    q, found = wide, 1.0
    failed = torch.zeros(wide.shape[0], dtype=torch.bool, device=wide.device)
    for _ in range(passes):
        q, pivot = _cholesky_pass(q)
        # Every pass counts: a later one reports success on the garbage of an earlier one.
        failed |= ~(pivot > _LEAST_PIVOT)
        least = float(pivot.min())
        found = min(found, least)
        # In fp64 what one pass leaves at such a pivot, 2e-10, is far above the columns' rounding.
        if least > _EASY_PIVOT and columns.dtype != torch.float64:
            break
    if found <= _LEAST_PIVOT:
        q[failed] = _householder(wide[failed])
    return q


def independent_columns(columns: Tensor) -> Tensor:
    """Return a basis of what (B, n, k) columns span, orthonormal to about 1e-4, in their dtype: all
    that a power iteration needs between its steps.

    The Gram is taken in the dtype itself and its inverse factor applied by a product; columns that
    are nearer to dependent, or whose squares overflow, go by `orthonormal_columns`.
    """
    if not columns.numel():
        return columns
    gram = (columns.mT @ columns).double()
    lower, info = torch.linalg.cholesky_ex(gram)
    shares = lower.diagonal(dim1=-2, dim2=-1).square() / gram.diagonal(dim1=-2, dim2=-1)
    if not bool(((info == 0)[:, None] & (shares > _ROUGH_PIVOT)).all()):  # no for a NaN
        return orthonormal_columns(columns, passes=1).to(columns.dtype)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    return columns @ inverse.mT.to(columns.dtype)


def _cholesky_pass(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the solved columns and each matrix's least pivot; 0 and columns as they were where
    Cholesky failed.
    """
    gram = columns.mT @ columns
    lower, info = torch.linalg.cholesky_ex(gram)
    shares = lower.diagonal(dim1=-2, dim2=-1).square() / gram.diagonal(dim1=-2, dim2=-1)
    pivot = torch.where((info == 0) & shares.isfinite().all(-1), shares.amin(-1), 0.0)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    lower = torch.where((pivot > _LEAST_PIVOT)[:, None, None], lower, eye)
    return torch.linalg.solve_triangular(lower, columns.mT, upper=False).mT, pivot


def _householder(columns: Tensor) -> Tensor:
    q, r = torch.linalg.qr(columns)
    negative = r.diagonal(dim1=-2, dim2=-1) < 0
    return torch.where(negative[:, None, :], -q, q)
