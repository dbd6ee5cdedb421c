"""From what a foreign file says of one tensor to a checked `SparseDiff`."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseft._integrity import find_index_fault, find_value_fault
from sparseft.diff import VALUE_DTYPES, SparseDiff, index_dtype_for
from sparseft.errors import AdapterFormatError
from sparseft.io.foreign.names import checked_shape

__all__ = ["check_dense", "diff_from", "integers"]


def integers(tensor: Tensor, what: str) -> Tensor:
    """Return ``tensor`` as int64.

    Args:
        tensor: integers, or floats that are integers (PEFT writes those on Windows).
        what: file and tensor, for the message.

    Raises:
        AdapterFormatError: fractions, NaN, or floats too large to be exact.
    """
    if tensor.is_floating_point():
        exact = float(2 ** {torch.float32: 24, torch.float64: 53}.get(tensor.dtype, 8))
        if not bool(((tensor == tensor.trunc()) & (tensor.abs() <= exact)).all()):
            raise AdapterFormatError(
                f"{what}: indices are {tensor.dtype} and not all whole numbers up to {exact:.0f}, "
                "beyond which that dtype cannot hold them."
            )
    elif tensor.dtype == torch.bool or tensor.is_complex():
        raise AdapterFormatError(f"{what}: indices are {tensor.dtype}, wanted integers.")
    return tensor.to(torch.int64)


def diff_from(positions: Tensor, values: Tensor, shape: tuple[int, ...], what: str) -> SparseDiff:
    """Return the diff with ``values`` at flat row-major ``positions``, in any order.

    Args:
        positions: (nnz,) int64.
        values: (nnz,) floating.
        shape: of the parameter.
        what: file and tensor, for the message.

    Raises:
        AdapterFormatError: counts that differ, a dtype that weights cannot have, a position that
            is repeated or outside, a value that is not finite.
    """
    checked_shape(shape, what)
    if positions.dim() != 1 or values.shape != positions.shape:
        raise AdapterFormatError(
            f"{what}: {tuple(values.shape)} values for {tuple(positions.shape)} positions; wanted "
            "one each, in one row."
        )
    if values.dtype not in VALUE_DTYPES:
        wanted = ", ".join(map(str, VALUE_DTYPES))
        raise AdapterFormatError(f"{what}: values are {values.dtype}, wanted one of {wanted}.")
    numel = 1
    for size in shape:
        numel *= size
    if bool((positions[1:] <= positions[:-1]).any()):
        order = torch.argsort(positions)
        positions, values = positions[order], values[order]
    fault = find_index_fault(positions, numel)
    if fault is not None:
        raise AdapterFormatError(
            f"{what}: positions do not fit shape {tuple(shape)}; sorted, they are {fault}."
        )
    fault = find_value_fault(values)
    if fault is not None:
        raise AdapterFormatError(f"{what}: values must be finite; {fault}.")
    own = values.detach().clone(memory_format=torch.contiguous_format)
    return SparseDiff._trusted(positions.to(index_dtype_for(numel)), own, shape)


def check_dense(tensor: Tensor, what: str) -> Tensor:
    """Return a whole parameter of a file, checked and with memory of its own.

    Raises:
        AdapterFormatError: not floating, or not finite.
    """
    if tensor.dtype not in VALUE_DTYPES:
        wanted = ", ".join(map(str, VALUE_DTYPES))
        raise AdapterFormatError(f"{what} is {tensor.dtype}, wanted one of {wanted}.")
    fault = find_value_fault(tensor)
    if fault is not None:
        raise AdapterFormatError(f"{what} must be finite; {fault}.")
    return tensor.detach().clone(memory_format=torch.contiguous_format)
