"""A mask's entries compressed by rows or by columns, made once and kept beside its index tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sparseft.ops._streams import Readers, settle

__all__ = ["Csr", "csr_of"]

# A row of so many times the mean length (and at least so many entries) is a long one: the kernels
# give it a program of its own. Random masks have none; of skewed ones few rows are.
_LONG = 4
_LONG_AT_LEAST = 64


class Csr(NamedTuple):
    """A sparse matrix by outputs: row m holds entries ``offsets[m]:offsets[m + 1]``.

    Args:
        offsets: (outputs + 1,) int32; int64 where int32 is too small for nnz or a dimension.
        inputs: (nnz,) the input that each entry multiplies, in the same dtype.
        order: (nnz,) place of each entry in flat order; None: they are in flat order.
        long_rows: (n,) int32, rows with more than ``limit`` entries.
        limit: see ``long_rows``.
    """

    offsets: Tensor
    inputs: Tensor
    order: Tensor | None
    long_rows: Tensor
    limit: int

    def arranged(self, values: Tensor) -> Tensor:
        """Return flat-ordered ``values`` in this matrix's order."""
        return values if self.order is None else values.index_select(0, self.order)


_known = WeakIdKeyDictionary()


def csr_of(indices: Tensor, rows: int, cols: int, *, transposed: bool) -> Csr:
    """Return the (rows, cols) matrix with entries at ``indices``, or its transpose.

    Cached while the index tensor is unchanged; the first call waits for the device.

    Args:
        indices: (nnz,) ascending flat positions, int32 or int64.
        rows: of the weight, as its diff is stored.
        cols: of the weight.
        transposed: outputs are the weight's columns.
    """
    # Tensors of inference mode have no version, and cannot be changed in place outside of it.
    key = (rows, cols, 0 if indices.is_inference() else indices._version)
    known = _known.get(indices)
    if known is None or known[0] != key:
        known = _known[indices] = (key, {})
    made = known[1]
    if transposed not in made:
        made[transposed] = _build(indices, rows, cols, transposed), Readers()
    csr, readers = made[transposed]
    readers.note(indices.device, csr.offsets, csr.inputs, csr.order, csr.long_rows)
    return csr


def _build(indices: Tensor, rows: int, cols: int, transposed: bool) -> Csr:
    nnz, device = indices.numel(), indices.device
    short = max(nnz, rows, cols) < 2**31
    narrow = torch.int32 if short else torch.int64
    if transposed:
        column = indices % max(cols, 1)
        column, order = column.sort(stable=True)
        index = (indices[order] // max(cols, 1)).to(narrow)
        edges = torch.arange(cols + 1, dtype=indices.dtype, device=device)
        offsets = torch.searchsorted(column, edges, out_int32=short)
        order = order.to(narrow)
    else:
        order = None
        index = (indices % max(cols, 1)).to(narrow)
        edges = torch.arange(rows + 1, dtype=torch.int64, device=device).mul_(cols)
        # The last edge is numel, at most 2**31 - 1 where indices are int32.
        offsets = torch.searchsorted(indices, edges.to(indices.dtype), out_int32=short)
    lengths = offsets.diff()
    limit = max(_LONG_AT_LEAST, _LONG * -(-nnz // max(lengths.numel(), 1)))
    long_rows = (lengths > limit).nonzero().view(-1).to(torch.int32)
    settle(device)
    return Csr(offsets, index, order, long_rows, limit)
