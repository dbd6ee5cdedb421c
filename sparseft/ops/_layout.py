"""Small facts about a mask that its kernels need every step, computed once and kept beside its
index tensor.

Nothing here grows with nnz: one integer per block of rows and, where whole columns are inactive,
one per active column. (Row and column of each entry are recomputed per call instead of stored: 1.6
ns an entry, against 4 more bytes an entry.)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["TILE", "Layout", "Run", "layout_of"]

# Elements of the dense tile that dW is computed in, a block of rows at a time (fp32: 4 MiB). GEMM
# speed is within 5 % of the whole matrix's from here on; at 128 Ki elements it loses 20 %.
TILE = 1 << 20
_BLOCK_ROWS = 64

# Cost model in nanoseconds, one core of a 2.5 GHz Xeon (Cascade Lake, AVX-512, MKL), fp32; only
# ratios matter. GEMM 384x384 .. 3072x768 at T = 1024: 59-61 multiply-adds per ns.
_GEMM_PER_NS = 60.0
# One dot product: 25 ns of call, then 8.2 multiply-adds per ns while the transposed input slab fits
# L2, 4.8 beyond it.
_DOT_CALL_NS = 25.0
_DOT_PER_NS = 8.2
_DOT_PER_NS_FAR = 4.8
_L2_BYTES = 1 << 20
# Transposing an operand, per element.
_TRANSPOSE_NS = 1.0

Run = tuple[int, int, int, int, bool]  # first row, end row, first entry, end entry, dense?


@dataclass
class Layout:
    """Where the entries of one mask lie, by blocks of rows.

    ``offsets[b]`` is the first entry of row block b (``block_rows`` rows each); ``columns`` lists
    the active columns when fewer than half are active, else None.
    """

    rows: int
    cols: int
    block_rows: int
    offsets: list[int]
    columns: Tensor | None
    version: int
    _runs: dict[tuple[int, int], list[Run]] = field(default_factory=dict)

    def runs(self, tokens: int, slab: int) -> list[Run]:
        """Return the row ranges that hold entries, each as tile or dot products by cost."""
        key = (tokens, slab)
        if key not in self._runs:
            if len(self._runs) >= 16:  # ragged batches: token counts never repeat
                self._runs.clear()
            self._runs[key] = self._plan(tokens, slab)
        return self._runs[key]

    def _plan(self, tokens: int, slab: int) -> list[Run]:
        cols = self.cols if self.columns is None else self.columns.numel()
        near = cols * min(slab, tokens) * 4 <= _L2_BYTES
        dot = _DOT_CALL_NS * -(-tokens // slab) + tokens / (
            _DOT_PER_NS if near else _DOT_PER_NS_FAR
        )
        runs: list[Run] = []
        for block in range(len(self.offsets) - 1):
            lo, hi = self.offsets[block], self.offsets[block + 1]
            if lo == hi:
                continue
            first = block * self.block_rows
            end = min(first + self.block_rows, self.rows)
            gemm = (end - first) * cols * tokens / _GEMM_PER_NS
            dots = (hi - lo) * dot + (end - first) * tokens * _TRANSPOSE_NS
            dense = gemm < dots and cols <= TILE
            if runs and runs[-1][4] == dense and runs[-1][1] == first:
                runs[-1] = (runs[-1][0], end, runs[-1][2], hi, dense)
            else:
                runs.append((first, end, lo, hi, dense))
        return runs


_layouts = WeakIdKeyDictionary()


def layout_of(indices: Tensor, rows: int, cols: int) -> Layout:
    """Return the layout of a mask's flat indices; cached while that index tensor is unchanged."""
    known = _layouts.get(indices)
    if known is not None and (known.rows, known.cols, known.version) == (
        rows,
        cols,
        indices._version,
    ):
        return known
    block_rows = max(1, min(_BLOCK_ROWS, TILE // max(1, cols)))
    starts = torch.arange(0, rows, block_rows, dtype=torch.int64) * cols
    offsets = torch.searchsorted(indices, starts.to(indices.dtype)).tolist()
    active = torch.zeros(cols, dtype=torch.bool)
    for part in indices.split(TILE):
        active[(part % cols).long()] = True
    columns = active.nonzero().view(-1)
    layout = Layout(
        rows,
        cols,
        block_rows,
        [*offsets, indices.numel()],
        columns if columns.numel() * 2 < cols else None,
        indices._version,
    )
    _layouts[indices] = layout
    return layout
