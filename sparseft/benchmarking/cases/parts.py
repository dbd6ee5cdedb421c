"""What cases of single operations share: torch's sparse tensors, gates, skips in torch's words."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparseft.benchmarking.checks import Check, rel_rms
from sparseft.benchmarking.suite import Contender
from sparseft.diff import SparsePattern

__all__ = ["coo_tensor", "csr_tensor", "in_its_dtype", "typical", "where_torch_can"]


def typical(densities: Sequence[float]) -> float:
    """Return the density nearest to 1 %: for sides that cost the same at any, or take long to
    compile.
    """
    return min(densities, key=lambda d: abs(math.log(d / 0.01)))


def csr_tensor(pattern: SparsePattern, values: Tensor) -> Tensor:
    """Return torch's CSR matrix of (nnz,) values at a mask of two dimensions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return torch.sparse_csr_tensor(
            pattern.row_offsets(),
            pattern.col_indices(),
            values,
            tuple(pattern.shape),
            check_invariants=False,
        )


def coo_tensor(pattern: SparsePattern, values: Tensor) -> Tensor:
    """Return torch's coalesced COO matrix of (nnz,) values at a mask of two dimensions."""
    at, width = pattern.indices.long(), pattern.shape[1]
    places = torch.stack((at // width, at % width))
    return torch.sparse_coo_tensor(
        places, values, tuple(pattern.shape), is_coalesced=True, check_invariants=False
    )


def in_its_dtype(name: str, got: Tensor, exact: Tensor, *, terms: int = 1) -> Check:
    """The gate of a side that keeps sums in the dtype of its result, as ours does not.

    ``terms`` numbers summed one after the other, each sum rounded, are off by about ``eps / 3 *
    sqrt(terms)`` of the result; three times that is let pass.
    """
    if got.shape != exact.shape:
        return Check(f"{name}: shape {tuple(got.shape)} for {tuple(exact.shape)}", 1.0, 0.0)
    limit = torch.finfo(got.dtype).eps * math.sqrt(max(1, terms))
    return Check(f"{name}: error", rel_rms(got, exact), limit)


def where_torch_can(
    run: Callable[[], Any],
    check: Callable[[Any], list[Check]],
    *,
    density: float | None = None,
    bytes: float | None = None,
    flops: float | None = None,
) -> Contender:
    """Return a checked contender; skipped, in torch's words, where torch has no kernel for it."""
    try:
        result = run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        reason = f"torch has no kernel for it: {words[0][:160]}"
        return Contender(skipped=reason, density=density)
    return Contender(run, check(result), density=density, bytes=bytes, flops=flops)
