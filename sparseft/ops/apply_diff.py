"""Read and write single entries of a weight: capture, restore, apply a diff, undo it.

Everything here moves bits or rounds exactly once, so undo is exact: the overwritten values are kept
and written back, never recomputed by subtraction (subtracting left 7.5 % of touched entries changed
in a trial, in every dtype).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseft.errors import DiffError
from sparseft.ops._backend import resolve_backend
from sparseft.ops._common import (
    accumulation_dtype,
    bits,
    check_entries,
    flat_chunks,
    operator,
)

if TYPE_CHECKING:
    from sparseft.diff import SparseDiff

__all__ = [
    "apply_diff_",
    "gather_entries",
    "sum_entries",
    "undo_",
    "write_entries",
    "write_entries_",
    "write_sum",
    "write_sum_",
]


# The definitions.


def gather_entries_reference(weight: Tensor, indices: Tensor) -> Tensor:
    """``weight.flatten()[indices]``, bit for bit."""
    if weight.is_contiguous():
        return bits(weight).view(-1).index_select(0, indices).view(weight.dtype)
    out = torch.empty(indices.shape, dtype=weight.dtype, device=weight.device)
    moved = bits(out)
    for entries, flat, address in flat_chunks("gather_entries", bits(weight), indices, write=False):
        torch.index_select(flat, 0, address, out=moved[entries])
    return out


def write_entries_reference_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """``weight.flatten()[indices] = values``, bit for bit."""
    moved = bits(values)
    for entries, flat, address in flat_chunks("write_entries_", bits(weight), indices, write=True):
        flat.put_(address, moved[entries])


def sum_entries(base: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """``rn(fp32(base) + values)``: one addition in fp32 (fp64 if an operand is), one rounding to
    ``dtype``.
    """
    wide = accumulation_dtype(base.dtype, values.dtype)
    return (base.to(wide) + values.to(wide)).to(dtype)


def write_sum_reference_(weight: Tensor, indices: Tensor, base: Tensor, values: Tensor) -> None:
    """``weight.flatten()[indices] = rn(fp32(base) + values)``."""
    for entries, flat, address in flat_chunks("write_sum_", weight, indices, write=True):
        flat.put_(address, sum_entries(base[entries], values[entries], weight.dtype))


# Registration: dispatch, fake, autograd.


@operator("gather_entries(Tensor weight, Tensor indices, str backend='') -> Tensor")
def _gather_entries(weight: Tensor, indices: Tensor, backend: str = "") -> Tensor:
    if resolve_backend("gather_entries", weight, indices, backend=backend) == "triton":
        from sparseft_kernels.entries import launch_capture

        return launch_capture(weight, indices)
    return gather_entries_reference(weight, indices)


@operator("write_entries_(Tensor(a!) weight, Tensor indices, Tensor values, str backend='') -> ()")
def _write_entries_(weight: Tensor, indices: Tensor, values: Tensor, backend: str = "") -> None:
    if resolve_backend("write_entries_", weight, indices, values, backend=backend) == "triton":
        from sparseft_kernels.entries import launch_restore

        return launch_restore(weight, indices, values)
    return write_entries_reference_(weight, indices, values)


@operator(
    "write_sum_(Tensor(a!) weight, Tensor indices, Tensor base, Tensor values, str backend='') -> "
    "()"
)
def _write_sum_(
    weight: Tensor, indices: Tensor, base: Tensor, values: Tensor, backend: str = ""
) -> None:
    if resolve_backend("write_sum_", weight, indices, base, values, backend=backend) == "triton":
        from sparseft_kernels.entries import launch_write_sum

        return launch_write_sum(weight, indices, base, values)
    return write_sum_reference_(weight, indices, base, values)


@operator("write_entries(Tensor weight, Tensor indices, Tensor values, str backend='') -> Tensor")
def _write_entries(weight: Tensor, indices: Tensor, values: Tensor, backend: str = "") -> Tensor:
    out = weight.clone(memory_format=torch.contiguous_format)
    _write_entries_(out, indices, values, backend)
    return out


@operator(
    "write_sum(Tensor weight, Tensor indices, Tensor base, Tensor values, str backend='') -> Tensor"
)
def _write_sum(
    weight: Tensor, indices: Tensor, base: Tensor, values: Tensor, backend: str = ""
) -> Tensor:
    out = weight.clone(memory_format=torch.contiguous_format)
    _write_sum_(out, indices, base, values, backend)
    return out


@torch.library.register_fake("sparseft::gather_entries")
def _(weight, indices, backend=""):
    return weight.new_empty(indices.shape)


@torch.library.register_fake("sparseft::write_entries_")
def _(weight, indices, values, backend=""):
    return None


@torch.library.register_fake("sparseft::write_sum_")
def _(weight, indices, base, values, backend=""):
    return None


@torch.library.register_fake("sparseft::write_entries")
def _(weight, indices, values, backend=""):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@torch.library.register_fake("sparseft::write_sum")
def _(weight, indices, base, values, backend=""):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _setup_gather(ctx, inputs, output):
    weight, indices, ctx.backend = inputs
    ctx.shape = weight.shape
    ctx.save_for_backward(indices)


def _gather_backward(ctx, grad):
    (indices,) = ctx.saved_tensors
    dense = grad.new_zeros(ctx.shape)
    return torch.ops.sparseft.write_entries.default(dense, indices, grad, ctx.backend), None, None


def _setup_write(ctx, inputs, output):
    indices, *others, ctx.backend = inputs[1:]
    ctx.save_for_backward(indices)
    ctx.dtypes = [t.dtype for t in others]


def _write_backward(ctx, grad):
    (indices,) = ctx.saved_tensors
    picked = torch.ops.sparseft.gather_entries.default(grad, indices, ctx.backend)
    rest = torch.ops.sparseft.write_entries.default(
        grad, indices, torch.zeros_like(picked), ctx.backend
    )
    return rest, None, *(picked.to(dtype) for dtype in ctx.dtypes), None


torch.library.register_autograd(
    "sparseft::gather_entries", _gather_backward, setup_context=_setup_gather
)
torch.library.register_autograd(
    "sparseft::write_entries", _write_backward, setup_context=_setup_write
)
torch.library.register_autograd("sparseft::write_sum", _write_backward, setup_context=_setup_write)


# Public functions.


def gather_entries(weight: Tensor, indices: Tensor, *, backend: str | None = None) -> Tensor:
    """Return the entries of a weight at flat positions, bit for bit.

    ``values[i] = weight.flatten()[indices[i]]``

    Args:
        weight: any shape, floating; non-contiguous weights are read in place through their strides.
        indices: (nnz,) int32 or int64, flat row-major, in range (checked where patterns are made).
        backend: ``"auto"``, ``"reference"`` or ``"triton"``; None takes the context's or the
            environment's.

    Returns:
        (nnz,) in the weight's dtype. Differentiable in ``weight``.

    Raises:
        DiffError: shapes, dtypes or devices that do not belong together.
        BackendError: ``"triton"`` cannot run here.

    Numerics: a copy of bits; NaN payloads and signed zeros survive.
    """
    check_entries("gather_entries", weight, indices)
    return _gather_entries(weight, indices, backend or "")


def _check_same_dtype(op: str, weight: Tensor, values: Tensor) -> None:
    if values.dtype != weight.dtype:
        raise DiffError(
            f"{op}: values are {values.dtype} but weight is {weight.dtype}; this op moves bits, so "
            "cast first"
        )


def write_entries_(
    weight: Tensor, indices: Tensor, values: Tensor, *, backend: str | None = None
) -> None:
    """Overwrite entries of a weight in place, bit for bit: ``weight.flatten()[indices] = values``.

    Args:
        weight: any shape, floating; changed in place, also when non-contiguous. No gradient is
            recorded.
        indices: (nnz,) int32 or int64, flat row-major, unique.
        values: (nnz,) in the weight's dtype.
        backend: as in :func:`gather_entries`.

    Raises:
        DiffError: shapes, dtypes or devices that do not belong together; a weight whose elements
            share memory.
        BackendError: ``"triton"`` cannot run here.
    """
    check_entries("write_entries_", weight, indices, values=values)
    _check_same_dtype("write_entries_", weight, values)
    _write_entries_(weight.detach(), indices, values.detach(), backend or "")


def write_entries(
    weight: Tensor, indices: Tensor, values: Tensor, *, backend: str | None = None
) -> Tensor:
    """Return a copy of ``weight`` with entries replaced; differentiable in ``weight`` and
    ``values``.

    Arguments and errors as in :func:`write_entries_`; the result is contiguous.
    """
    check_entries("write_entries", weight, indices, values=values)
    _check_same_dtype("write_entries", weight, values)
    return _write_entries(weight, indices, values, backend or "")


def write_sum_(
    weight: Tensor, indices: Tensor, base: Tensor, values: Tensor, *, backend: str | None = None
) -> None:
    """Write base plus diff into a weight in place: ``weight.flatten()[indices] = rn(fp32(base) +
    values)``.

    Args:
        weight: any shape, floating; changed in place, also when non-contiguous. No gradient is
            recorded.
        indices: (nnz,) int32 or int64, flat row-major, unique.
        base: (nnz,) floating, usually the entries captured from this weight.
        values: (nnz,) floating, usually the fp32 diff.
        backend: as in :func:`gather_entries`.

    Raises:
        DiffError: shapes or devices that do not belong together; a weight whose elements share
            memory.
        BackendError: ``"triton"`` cannot run here.

    Numerics: the sum is taken in fp32 (fp64 if base or values is) and rounded once, to nearest
    even.
    """
    check_entries("write_sum_", weight, indices, base=base, values=values)
    _write_sum_(weight.detach(), indices, base.detach(), values.detach(), backend or "")


def write_sum(
    weight: Tensor, indices: Tensor, base: Tensor, values: Tensor, *, backend: str | None = None
) -> Tensor:
    """Return a copy of ``weight`` with base + values written; differentiable in weight, base and
    values.

    Arguments, errors and numerics as in :func:`write_sum_`; the result is contiguous.
    """
    check_entries("write_sum", weight, indices, base=base, values=values)
    return _write_sum(weight, indices, base, values, backend or "")


def apply_diff_(
    weight: Tensor, diff: SparseDiff, *, coeff: float = 1.0, backend: str | None = None
) -> Tensor:
    """Apply one diff to a weight in place and return what it overwrote.

    ``mode="add"``: ``weight[indices] = rn(fp32(weight[indices]) + coeff * values)``;
    ``mode="set"``: ``weight[indices] = values`` (only with ``coeff == 1``).

    Args:
        weight: the diff's shape, floating; changed in place.
        diff: the diff; its values are moved to the weight's device for the call.
        coeff: scalar; 0 writes nothing, so that not even the sign of a zero changes.
        backend: as in :func:`gather_entries`.

    Returns:
        (nnz,) saved entries in the weight's dtype; ``undo_(weight, diff.indices, saved)`` restores
        every bit.

    Raises:
        DiffError: the diff's shape is not the weight's; ``mode="set"`` with a coefficient other
            than 0 or 1.

    Numerics: product and sum are rounded separately in fp32, then once to the weight's dtype.
    """
    if tuple(diff.shape) != tuple(weight.shape):
        raise DiffError(
            f"apply_diff_: diff has shape {tuple(diff.shape)} but weight has "
            f"{tuple(weight.shape)}; "
            "was it made for another layer, or for the transposed orientation?"
        )
    if diff.mode == "set" and coeff not in (0, 1):
        raise DiffError(
            f"apply_diff_: a diff with mode 'set' replaces values, so coeff={coeff} has no "
            "meaning; use 1, or 0 to skip"
        )
    indices = diff.indices.to(weight.device)
    saved = gather_entries(weight.detach(), indices, backend=backend)
    if coeff == 0:
        return saved
    values = diff.values.detach().to(weight.device)
    if diff.mode == "set":
        write_entries_(weight, indices, values.to(weight.dtype), backend=backend)
        return saved
    if coeff != 1:
        values = values.to(accumulation_dtype(values.dtype)) * coeff
    write_sum_(weight, indices, saved, values, backend=backend)
    return saved


def undo_(weight: Tensor, indices: Tensor, saved: Tensor, *, backend: str | None = None) -> None:
    """Write back what :func:`apply_diff_` returned; the weight is then bit-equal to before it.

    Args, raises: as in :func:`write_entries_`. Diffs on one weight are undone last applied first.
    """
    write_entries_(weight, indices, saved, backend=backend)
