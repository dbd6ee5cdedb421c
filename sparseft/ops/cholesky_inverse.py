"""Inverse Cholesky factors of many small Grams, and orthonormal columns by them, in fp32.

Nothing here waits for the device, so that a CUDA graph can capture it, and for the same reason
nothing falls back on QR where a factor does not exist. That makes `cholesky_qr_float32` no one's
default: a fp32 Gram resolves condition numbers to 3e3, its shift carries that to about 1e6; the two
fp64 Grams of `truncated_svd` hold to 1e8, at 1 to 7 ms of an H200's fp64 tensor cores for a whole
model (a roofline, not a measurement).

Source of the shift: Fukaya, Kannan, Nakatsukasa, Yamamoto & Yanagisawa, "Shifted Cholesky QR for
Computing the QR Factorization of Ill-Conditioned Matrices", SIAM Journal on Scientific Computing
42(1), 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseft.errors import DecompositionError
from sparseft.ops._backend import resolve_backend
from sparseft.ops._svd_problem import full_precision

__all__ = ["cholesky_inverse", "cholesky_inverse_reference", "cholesky_qr_float32"]

_MOST = 128  # what one program of the kernel holds


def cholesky_inverse_reference(gram: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: by `torch.linalg.cholesky_ex`, whose own failures are reported as 1."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    lower, info = torch.linalg.cholesky_ex(gram + shift[:, None, None] * eye)
    failed = (info != 0) | ~lower.isfinite().all(-1).all(-1)
    lower = torch.where(failed[:, None, None], eye, lower)
    inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    return inverse.contiguous(), failed.to(torch.int32)


def cholesky_inverse(
    gram: Tensor, shift: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``L^-1`` with ``gram + shift I = L L^T``, ``L`` lower triangular.

    Args:
        gram: (B, r, r) float32 or float64, symmetric.
        shift: (B,) of the same dtype, added to the diagonals; None: nothing.
        backend: of the op; the kernel takes contiguous float32 with r <= 128.

    Returns:
        (B, r, r), and (B,) int32: 0 where it worked; elsewhere the inverse is of no use, and
        finite only where the gram was.

    Raises:
        DecompositionError: shapes or dtypes that do not fit.

    Example:
        >>> inverse, failed = cholesky_inverse(torch.tensor([[[4.0, 0.0], [0.0, 0.25]]]))
        >>> inverse.tolist(), failed.tolist()
        ([[[0.5, 0.0], [0.0, 2.0]]], [0])
    """
    if (
        gram.ndim != 3
        or gram.shape[1] != gram.shape[2]
        or gram.dtype not in (torch.float32, torch.float64)
    ):
        raise DecompositionError(
            f"cholesky_inverse: gram is {gram.dtype} {tuple(gram.shape)}; wanted float32 or "
            "float64 (B, r, r)."
        )
    if shift is None:
        shift = gram.new_zeros(len(gram))
    if shift.shape != gram.shape[:1] or shift.dtype != gram.dtype:
        raise DecompositionError(
            f"cholesky_inverse: shift is {shift.dtype} {tuple(shift.shape)}; wanted {gram.dtype} "
            f"({len(gram)},)."
        )
    why_not = None
    if gram.dtype != torch.float32 or gram.shape[1] > _MOST:
        why_not = (
            f"gram is {gram.dtype} with r={gram.shape[1]}, the kernel takes float32 up to {_MOST}"
        )
    chosen = resolve_backend("cholesky_inverse", gram, shift, backend=backend, why_not=why_not)
    if chosen == "reference":
        return cholesky_inverse_reference(gram, shift)
    from sparseft_kernels.svd import launch_cholesky_inverse

    return launch_cholesky_inverse(gram, shift)


def cholesky_qr_float32(columns: Tensor, *, backend: str | None = None) -> Tensor:
    """Return ``Q`` with ``columns = Q R``, R upper triangular with a positive diagonal, in fp32.

    Args:
        columns: (B, n, k), k <= n, floating, finite, independent to 1e-6 of their norms.
        backend: of `cholesky_inverse`.

    Returns:
        (B, n, k) float32 with |Q^T Q - I| about 1e-6; NaN throughout where a pass failed.
    """
    q = columns.float()
    with full_precision(q.device):
        # Scaled against each other: the shift is a share of the largest.
        q = q / torch.linalg.vector_norm(q, dim=-2, keepdim=True)
        for share in (1e-6, 0.0, 0.0):
            gram = q.mT @ q
            shift = share * gram.diagonal(dim1=-2, dim2=-1).sum(-1)
            inverse, failed = cholesky_inverse(gram, shift, backend=backend)
            q = (q @ inverse.mT).masked_fill((failed != 0)[:, None, None], float("nan"))
    return q
