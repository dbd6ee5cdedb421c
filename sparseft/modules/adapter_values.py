"""Leaf values from an adapter's diffs, and full parameters from its dense tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparseft._text import did_you_mean
from sparseft.adapter import Adapter
from sparseft.diff import SparseDiff
from sparseft.errors import MaskError, UnknownNameError
from sparseft.modules.leaves import MaskedParameter
from sparseft.modules.names import ParameterIndex
from sparseft.modules.weight_storage import is_sharded

__all__ = ["copy_whole_", "load_values_", "values_at"]


def load_values_(
    adapter: Adapter,
    index: ParameterIndex,
    masked: Mapping[str, MaskedParameter],
    full: Mapping[str, nn.Parameter],
) -> None:
    """Set leaves and full parameters; masked tensors the adapter lacks go to zero.

    Everything is checked before anything changes. The weights are not written.

    Args:
        adapter: any names of its tensors.
        index: of the model.
        masked: by canonical name.
        full: what is trained densely, by canonical name.

    Raises:
        UnknownNameError: a tensor that is not masked, or a dense one not trained densely.
        MaskError: another shape, or entries outside the mask.
    """
    diffs = {index.resolve(n): d for n, d in adapter.diffs.items() if d.nnz}
    dense = {index.resolve(n): t for n, t in adapter.dense.items()}
    for kind, names, known in (("masked", diffs, masked), ("in full_params", dense, full)):
        for name in names:
            if name not in known:
                raise UnknownNameError(
                    f"adapter {adapter.name!r} has {name!r}, which is not {kind} here."
                    f"{did_you_mean(name, known)}"
                )
    values = {n: values_at(m, diffs.get(n)) for n, m in masked.items()}
    for name, tensor in dense.items():
        if tensor.shape != full[name].shape:
            raise MaskError(
                f"adapter {adapter.name!r} has {name!r} of shape {tuple(tensor.shape)}, the "
                f"model {tuple(full[name].shape)}."
            )
    with torch.no_grad():
        for name, m in masked.items():
            m.leaf.copy_(values[name])
        for name, tensor in dense.items():
            copy_whole_(full[name], tensor)


@torch.no_grad()
def copy_whole_(parameter: nn.Parameter, value: Tensor) -> None:
    """Copy a whole tensor into a parameter, of a sharded one each process its part."""
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = parameter
        value = value.to(device=sharded.to_local().device, dtype=parameter.dtype)
        # Every process has the whole value, so that none has to send its own.
        value = distribute_tensor(
            value, sharded.device_mesh, sharded.placements, src_data_rank=None
        )
    parameter.copy_(value)


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
