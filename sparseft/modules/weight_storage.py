"""Read and write entries of a weight wherever its memory is: here, or in row shards over processes.

A weight that FSDP2's ``fully_shard`` has cut is a ``DTensor``, ``Shard(0)`` over one dimension of a
mesh. Rows are contiguous in flat row-major order, so ascending flat indices that fall into this
process's rows are one slice of them. Nothing here leaves the sharded form but `full_value`.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparseft.errors import AttachError
from sparseft.ops import gather_entries, write_entries_, write_sum_

__all__ = [
    "OwnEntries",
    "full_value",
    "is_sharded",
    "local_value",
    "own_rows",
    "read_entries",
    "unsupported_placement",
    "write_entries",
    "write_sum",
]


def is_sharded(weight: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``: cut, or copied, over several processes."""
    if type(weight) is nn.Parameter or type(weight) is Tensor:
        return False  # the ordinary case, in each step
    # Whoever has one has imported it.
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(weight, tensors.DTensor)


def unsupported_placement(weight: Any) -> str | None:
    """Say how a ``DTensor`` is placed where that is not row shards; None where it is.

    Row shards: ``Shard(0)`` over one dimension of its mesh, ``Replicate()`` over any others.
    """
    cut = [p for p in weight.placements if not p.is_replicate()]
    # A _StridedShard (rows cut by tensor parallelism first) says is_shard(0), too.
    plain = all(type(p).__name__ == "Shard" and p.is_shard(0) for p in cut)
    return None if len(cut) <= 1 and plain else str(tuple(weight.placements))


class Rows(NamedTuple):
    """What this process holds of a sharded weight.

    Attributes:
        local: its rows, contiguous memory; none on ranks beyond the last row.
        first: flat position of their first entry.
        last: one past the flat position of their last entry.
    """

    local: Tensor
    first: int
    last: int


@torch.no_grad()
def own_rows(weight: Any) -> Rows:
    """Return what this process holds of a sharded weight.

    Raises:
        AttachError: it is not cut by rows.
    """
    wrong = unsupported_placement(weight)
    if wrong is not None:
        raise AttachError(
            f"a weight of shape {tuple(weight.shape)} is placed as {wrong}; masks are on row "
            "shards, Shard(0) over one dimension of the mesh."
        )
    local = weight.to_local()
    rows = weight.shape[0] if weight.ndim else 1
    width = weight.numel() // rows if rows else 0
    start = 0
    for dim, placement in enumerate(weight.placements):
        if placement.is_shard():
            each = -(-rows // weight.device_mesh.size(dim))  # as torch.chunk cuts
            start = min(weight.device_mesh.get_local_rank(dim) * each, rows)
    return Rows(local, start * width, start * width + local.numel())


class OwnEntries:
    """The part of a pattern's entries that lies in this process's rows.

    Args:
        weight: sharded.
        indices: (nnz,) flat positions in the whole weight, ascending, on its device.

    Attributes:
        where: the slice of ``indices``.
        positions: ``indices[where]`` as flat positions in the local rows.
    """

    def __init__(self, weight: Tensor, indices: Tensor) -> None:
        rows = own_rows(weight)
        self.weight, self.indices = weight, indices
        ends = torch.tensor([rows.first, rows.last], dtype=indices.dtype, device=indices.device)
        self.where = slice(*torch.searchsorted(indices, ends).tolist())
        self.positions = indices[self.where] - rows.first

    def of(self, weight: Tensor, indices: Tensor) -> bool:
        """Whether these are still the entries of this weight and pattern."""
        return self.weight is weight and self.indices is indices

    def read(self, *, backend: str | None = None) -> Tensor:
        """Return the weight's own entries, bit for bit; not collective."""
        return gather_entries(own_rows(self.weight).local, self.positions, backend=backend)

    def write(self, values: Tensor, *, backend: str | None = None) -> None:
        """Write the own ones of (nnz,) ``values``, bit for bit."""
        self.write_own(values[self.where], backend=backend)

    def write_own(self, values: Tensor, *, backend: str | None = None) -> None:
        """Write values of the own entries alone, bit for bit."""
        write_entries_(own_rows(self.weight).local, self.positions, values, backend=backend)

    def write_sum(self, base: Tensor, leaf: Tensor, *, backend: str | None = None) -> None:
        """Write the own ones of ``rn(base + leaf)``, both (nnz,)."""
        local = own_rows(self.weight).local
        write_sum_(local, self.positions, base[self.where], leaf[self.where], backend=backend)


@torch.no_grad()
def read_entries(weight: Tensor, indices: Tensor, *, backend: str | None = None) -> Tensor:
    """Return ``weight.flatten()[indices]``, (nnz,), bit for bit, on every process.

    Of a sharded weight this is a collective: each process calls it, with the same indices.
    """
    if not is_sharded(weight):
        return gather_entries(weight.detach(), indices, backend=backend)
    own, sharded = OwnEntries(weight, indices), cast(Any, weight)
    values = torch.zeros(indices.shape, dtype=weight.dtype, device=indices.device)
    values[own.where] = own.read(backend=backend)
    for dim, placement in enumerate(sharded.placements):
        if placement.is_shard():
            # As bytes, of which all but one process have zeros: -0.0 and NaN payloads survive, and
            # every backend adds them.
            dist.all_reduce(values.view(torch.uint8), group=sharded.device_mesh.get_group(dim))
    return values


@torch.no_grad()
def write_entries(
    weight: Tensor, indices: Tensor, values: Tensor, *, backend: str | None = None
) -> None:
    """Write ``weight.flatten()[indices] = values`` in place, bit for bit; each process its rows.

    Args:
        weight: plain or sharded.
        indices: (nnz,) flat positions, ascending.
        values: (nnz,) in the weight's dtype.
        backend: of the op.
    """
    if is_sharded(weight):
        OwnEntries(weight, indices).write(values, backend=backend)
    else:
        write_entries_(weight, indices, values, backend=backend)


@torch.no_grad()
def write_sum(
    weight: Tensor, indices: Tensor, base: Tensor, leaf: Tensor, *, backend: str | None = None
) -> None:
    """Write ``weight.flatten()[indices] = rn(base + leaf)`` in place; each process its rows."""
    if is_sharded(weight):
        OwnEntries(weight, indices).write_sum(base, leaf, backend=backend)
    else:
        write_sum_(weight, indices, base, leaf, backend=backend)


def local_value(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor: its rows where it is sharded, else itself."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return cast(Tensor, cast(Any, tensor).to_local())


@torch.no_grad()
def full_value(tensor: Tensor) -> Tensor:
    """Return a whole tensor, detached: gathered, a collective, where it is sharded."""
    if not is_sharded(tensor):
        return tensor.detach()
    return cast(Tensor, cast(Any, tensor.detach()).full_tensor())
