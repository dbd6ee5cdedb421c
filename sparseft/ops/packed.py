"""Entries of several tensors laid end to end: how the multi-tensor kernels want them.

Each tensor's entries are padded to whole blocks, so that a block serves one tensor. Private to the
kernels: plans, files and users see one flat ascending list per tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sparseft.diff import index_dtype_for

__all__ = ["BLOCK", "EntryTable", "PackedTerm", "PackedUnion"]

# Entries per program of the kernels that read this layout (a test compares the two).
BLOCK = 512


@dataclass(frozen=True, eq=False)
class EntryTable:
    """Entries of several tensors of one device.

    Args:
        indices: (P,) int32 or int64, flat in each entry's own tensor, -1 on pads.
        block_tensor: (P / BLOCK,) int32, the tensor of each block.
        starts, sizes: where each tensor's entries begin, and how many it has.
    """

    indices: Tensor
    block_tensor: Tensor
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, indices: Sequence[Tensor]) -> EntryTable:
        """Lay ascending position lists, (nnz_t,) each on one device, end to end."""
        sizes = tuple(i.numel() for i in indices)
        blocks = [-(-n // BLOCK) for n in sizes]
        ends = torch.tensor([0, *blocks]).cumsum(0).tolist()
        device = indices[0].device
        wide = torch.int64 if any(i.dtype == torch.int64 for i in indices) else torch.int32
        flat = torch.full((ends[-1] * BLOCK,), -1, dtype=wide, device=device)
        starts = tuple(e * BLOCK for e in ends[:-1])
        for start, own in zip(starts, indices, strict=True):
            flat[start : start + own.numel()] = own
        counts = torch.tensor(blocks)
        block_tensor = torch.arange(len(blocks), dtype=torch.int32).repeat_interleave(counts)
        return cls(flat, block_tensor.to(device), starts, sizes)

    def empty(self, dtype: torch.dtype) -> Tensor:
        """Return uninitialised room for one number per entry, pads included."""
        return torch.empty(self.indices.numel(), dtype=dtype, device=self.indices.device)

    def pieces(self, arena: Tensor) -> list[Tensor]:
        """View (P,) numbers tensor by tensor, without the pads."""
        parts = [part for n in self.sizes for part in (n, -n % BLOCK)]
        return list(arena.split_with_sizes(parts)[::2])

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """Lay (nnz_t,) vectors of one dtype out as (P,), zeros on the pads."""
        arena = torch.zeros(self.indices.numel(), dtype=pieces[0].dtype, device=pieces[0].device)
        for start, own in zip(self.starts, pieces, strict=True):
            arena[start : start + own.numel()] = own
        return arena


class PackedTerm(NamedTuple):
    """What one adapter brings to one tensor.

    Args:
        ordinal: the adapter's place in the canonical order.
        values: (nnz,) floating.
        positions: (nnz,) places in the tensor's union, ascending; None: all of it.
    """

    ordinal: int
    values: Tensor
    positions: Tensor | None


@dataclass(frozen=True, eq=False)
class PackedUnion(EntryTable):
    """The union of several adapters' entries with, at each, their values in canonical order.

    Args:
        counts: (P,) uint8 (int16 from 256 adapters), values at each entry; 0 on pads.
        values: (E,) by entry and, in it, by ordinal; of the widest dtype among the adapters'.
        ordinals: (E,) uint8 or int16, the adapter of each.
        order: (E,) int32 or int64, where each lay when the adapters' values were concatenated,
            tensor by tensor and term by term.
        places: (E,) int32 or int64, each value's entry, as a place in ``indices``.
        block_entry: (P / BLOCK,) int64, the first value of each block.
        lists: the adapters' own positions, of one tensor, where somebody asks for them.
    """

    counts: Tensor
    values: Tensor
    ordinals: Tensor
    order: Tensor
    places: Tensor
    block_entry: Tensor
    lists: tuple[Tensor, ...] = ()

    @classmethod
    def pack(
        cls, indices: Sequence[Tensor], terms: Sequence[Sequence[PackedTerm]], adapters: int
    ) -> PackedUnion:
        """Build the layout.

        Args:
            indices: (size_t,) the union of each tensor, ascending, on one device.
            terms: per tensor, in canonical order.
            adapters: ordinals lie below it.
        """
        table = EntryTable.of(indices)
        device = table.indices.device
        small = torch.uint8 if adapters < 256 else torch.int16
        place_dtype = index_dtype_for(table.indices.numel())
        places, values, ordinals = [], [], []
        for start, size, own in zip(table.starts, table.sizes, terms, strict=True):
            for term in own:
                at = term.positions
                if at is None:
                    at = torch.arange(size, dtype=place_dtype, device=device)
                places.append(at.to(place_dtype) + start)
                values.append(term.values.detach())
                ordinals.append(torch.full(at.shape, term.ordinal, dtype=small, device=device))
        if not places:
            places, values = [table.indices[:0].to(place_dtype)], [table.empty(torch.float32)[:0]]
            ordinals = [places[0].to(small)]
        dtype = values[0].dtype
        for v in values[1:]:
            dtype = torch.promote_types(dtype, v.dtype)
        # Terms come in canonical order, so a stable sort by place keeps it within each entry.
        place, order = torch.sort(torch.cat(places), stable=True)
        counts = torch.bincount(place, minlength=table.indices.numel())
        before = counts.view(-1, BLOCK).sum(1).cumsum(0)
        return cls(
            table.indices,
            table.block_tensor,
            table.starts,
            table.sizes,
            counts.to(small),
            torch.cat([v.to(dtype) for v in values])[order],
            torch.cat(ordinals)[order],
            order.to(index_dtype_for(order.numel())),
            place,
            (before - counts.view(-1, BLOCK).sum(1)),
        )

    def for_writing(self) -> PackedUnion:
        """Return it without what only gradients need: 8 bytes a value."""
        return replace(self, order=self.order[:0].clone(), places=self.places[:0].clone())
