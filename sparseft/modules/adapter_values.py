"""Leaf values from an adapter's diff."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseft.diff import SparseDiff
from sparseft.errors import MaskError
from sparseft.modules.leaves import MaskedParameter

__all__ = ["values_at"]


def values_at(masked: MaskedParameter, diff: SparseDiff | None) -> Tensor:
    """Return (nnz,) leaf values for a diff that lies inside the mask, zeros elsewhere.

    Args:
        masked: the masked parameter.
        diff: of its shape, at any of its positions; None for all zeros. Mode "set" becomes the
            difference from the base.

    Raises:
        MaskError: another shape, or entries outside the mask.
    """
    values = torch.zeros_like(masked.leaf)
    if diff is None:
        return values
    if tuple(diff.shape) != tuple(masked.pattern.shape):
        raise MaskError(
            f"{masked.name!r}: the diff has shape {tuple(diff.shape)}, the mask "
            f"{tuple(masked.pattern.shape)}."
        )
    diff = diff.to(masked.weight.device)
    place = torch.searchsorted(masked.indices, diff.indices).clamp_(max=masked.pattern.nnz - 1)
    outside = masked.indices[place] != diff.indices
    if bool(outside.any()):
        first = int(diff.indices[outside][0])
        raise MaskError(
            f"{masked.name!r}: {int(outside.sum())} entries of the adapter lie outside the mask, "
            f"the first at flat index {first}. Attach with the union of both."
        )
    new = diff.values.to(values.dtype)
    if diff.mode == "set":
        new = new - masked.base[place].to(values.dtype)
    values[place] = new
    return values
