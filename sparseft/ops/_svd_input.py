"""What a batched SVD takes: checks that name the matrix, orientation, and scaling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sparseft.errors import DecompositionError

__all__ = ["DTYPES", "gathered", "labels_of", "wide_and_near_one"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Sizes of the largest entry beyond which a matrix is scaled: squares of fp64 data overflow from
# 2**512, fp32 products of fp32 data from about 2**110.
_FAR = 40


def labels_of(count: int, names: Sequence[str] | None) -> list[str]:
    """Return what messages call each matrix."""
    if names is None:
        return [f"matrix {i}" for i in range(count)]
    if isinstance(names, str):
        raise DecompositionError(
            f"truncated_svd: names is the string {names!r}; wanted one name each, such as "
            f"[{names!r}]."
        )
    if len(names) != count:
        raise DecompositionError(
            f"truncated_svd: {len(names)} names for {count} matrices; wanted one each."
        )
    return [f"matrix {i} ({name!r})" for i, name in enumerate(names)]


def gathered(matrices: Tensor | Sequence[Tensor], names: Sequence[str] | None) -> Tensor:
    """Return one (B, m, n) tensor: the one given, or a sequence stacked.

    Raises:
        DecompositionError: no tensors, not three dimensions, not floating, shapes, dtypes or
            devices that differ, or an empty sequence (its shape is unknown).
    """
    if isinstance(matrices, Tensor):
        if matrices.ndim != 3:
            raise DecompositionError(
                f"truncated_svd: matrices has shape {tuple(matrices.shape)}; wanted (B, m, n)"
                + (", pass matrices[None] for one matrix." if matrices.ndim == 2 else ".")
            )
        labels_of(len(matrices), names)
        _check_dtype("matrices", matrices)
        return matrices
    if isinstance(matrices, Mapping):
        raise DecompositionError(
            "truncated_svd: matrices is a dict; wanted a tensor (B, m, n) or a sequence of "
            "matrices: pass list(matrices.values()) with names=list(matrices), or use "
            "sparseft.ops.plan_svd where shapes differ."
        )
    if not isinstance(matrices, Iterable) or hasattr(matrices, "__array__"):
        raise DecompositionError(
            f"truncated_svd: matrices is a {type(matrices).__name__}; wanted a tensor (B, m, n) or "
            "a sequence of matrices. torch.as_tensor makes a tensor of an array."
        )
    matrices = list(matrices)
    if not matrices:
        raise DecompositionError(
            "truncated_svd: an empty sequence has no shape; pass a tensor of shape (0, m, n)."
        )
    labels = labels_of(len(matrices), names)
    first = matrices[0]
    for label, matrix in zip(labels, matrices, strict=True):
        _check_dtype(label, matrix)
        if matrix.ndim != 2:
            raise DecompositionError(
                f"truncated_svd: {label} has shape {tuple(matrix.shape)}; wanted two dimensions."
            )
        if (matrix.shape, matrix.dtype, matrix.device) != (first.shape, first.dtype, first.device):
            raise DecompositionError(
                f"truncated_svd: {label} is {matrix.dtype} {tuple(matrix.shape)} on "
                f"{matrix.device}, {labels[0]} {first.dtype} {tuple(first.shape)} on "
                f"{first.device}; one call takes one kind, sparseft.ops.plan_svd groups many."
            )
    return torch.stack(matrices)


def _check_dtype(what: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise DecompositionError(
            f"truncated_svd: {what} is a {type(x).__name__}; wanted a tensor, torch.as_tensor "
            "makes one of an array."
        )
    if x.dtype not in DTYPES:
        raise DecompositionError(
            f"truncated_svd: {what} has dtype {x.dtype}; wanted float64, float32, bfloat16 or "
            "float16."
        )


def wide_and_near_one(batch: Tensor, labels: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the matrices with their short side first, by what each was divided, and the Frobenius
    norms of what is returned; both (B,) float64.

    The divisor is 1 or, where the largest entry is beyond 2**+-40, a power of two: exact both ways.

    Raises:
        DecompositionError: a NaN or infinite entry; names the first such matrix.
    """
    a = batch.mT if batch.shape[1] > batch.shape[2] else batch
    norm = _norms(a)
    # One pass tells: a norm is finite where all entries are, and bounds the largest of them.
    if bool(((norm > 2.0**-_FAR) & (norm < 2.0**_FAR)).all()):
        return a, torch.ones_like(norm), norm
    largest = torch.maximum(batch.amax((1, 2)), -batch.amin((1, 2))).double()
    finite = largest.isfinite()
    if not bool(finite.all()):
        at = int((~finite).nonzero()[0])
        nans = int(batch[at].isnan().sum())
        infinite = int(batch[at].isinf().sum())
        raise DecompositionError(
            f"truncated_svd: {labels[at]} of shape {tuple(batch.shape[1:])} holds {nans} NaN and "
            f"{infinite} infinite entries ({int((~finite).sum())} of {len(batch)} matrices do); "
            "wanted finite ones. Did a training step diverge?"
        )
    exponent = torch.frexp(largest).exponent - 1
    exponent = torch.where((largest > 0) & (exponent.abs() > _FAR), exponent, 0)
    if bool((exponent != 0).any()):
        # in two steps: 2**exponent alone may be beyond the dtype's range
        half = exponent // 2
        for part in (half, exponent - half):
            a = a * torch.exp2(-part.double()).to(a.dtype)[:, None, None]
        norm = _norms(a)
    return a, torch.exp2(exponent.double()), norm


def _norms(a: Tensor) -> Tensor:
    # rows in the working precision, their sum in fp64: fp64 throughout was 13 % of the call
    return torch.linalg.vector_norm(torch.linalg.vector_norm(a, dim=-1).double(), dim=-1)
