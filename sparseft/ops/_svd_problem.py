"""What the ways to a truncated SVD share: the oriented problem, their result, full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseft.ops._cholesky_qr import orthonormal_columns
from sparseft.ops._rank_rules import RankRule

__all__ = ["Factors", "Problem", "full_precision", "right_factor"]


class Problem(NamedTuple):
    """A batch of wide matrices and the rule that decides their ranks.

    Args:
        a: (B, s, t), s <= t, float32 or float64, finite, of a size near 1; any strides that
            `torch.bmm` takes.
        total: (B,) float64, squared Frobenius norms of ``a``.
        unit: (B,) float64, what ``a`` was divided by.
        rule: how many singular values to keep.
    """

    a: Tensor
    total: Tensor
    unit: Tensor
    rule: RankRule

    def ranks(self, squares: Tensor, total: Tensor | None = None) -> Tensor:
        """Apply the rule to (B, k) leading squared singular values."""
        s, t = self.a.shape[-2:]
        return self.rule.ranks(squares, self.total if total is None else total, self.unit, (s, t))

    def at(self, chosen: Tensor) -> Problem:
        """Return the matrices where ``chosen`` (B,) bool; without a copy when these are all."""
        if bool(chosen.all()):
            return self
        return Problem(self.a[chosen], self.total[chosen], self.unit[chosen], self.rule)


class Factors(NamedTuple):
    """``a ~ left diag(sqrt(squares)) right^T``.

    Args:
        left: (B, s, r) of ``a``'s dtype.
        squares: (B, r) float64, descending.
        right: (B, t, r) of ``a``'s dtype.
        ranks: (B,) int64, at most r; columns beyond a matrix's own mean nothing.
    """

    left: Tensor
    squares: Tensor
    right: Tensor
    ranks: Tensor


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Multiply fp32 matrices in fp32, whatever TF32 or bf16 the process allows for products."""
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    matmul = backend.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def right_factor(product: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (B, t, r) orthonormal columns from ``product = a^T left`` = right diag(sigma).

    Columns of small singular values carry the rounding of the large ones, and those of zeros
    nothing else: so they are orthonormalised in order, not divided by sigma.
    """
    return orthonormal_columns(product, passes=2).to(dtype)
