"""Small facts about a mask that its kernels need every step, computed once and kept beside its
index tensor.

Nothing here grows with nnz: one integer per block of rows and, where whole columns are inactive,
one per active column. (Row and column of each entry are recomputed per call instead of stored: 1.6
ns an entry, against 4 more bytes an entry.)
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["TILE", "Layout", "Run", "layout_of"]

# Elements of the dense tile that dW is computed in, a block of rows at a time (fp32: 4 MiB). GEMM
# speed is within 5 % of the whole matrix's from here on; at 128 Ki elements it loses 20 %.
TILE = 1 << 20
_BLOCK_ROWS = 64


class Costs(NamedTuple):
    """What the two ways cost on one core, fp32; only ratios matter."""

    gemm_per_ns: float  # multiply-adds of a GEMM
    dot_call_ns: float  # one dot product: a constant, and
    dot_per_ns: float  # multiply-adds while the transposed input slab fits L2,
    dot_per_ns_far: float  # and beyond it
    transpose_ns: float  # per element of an operand


# Measured with MKL, 384x384 .. 3072x768, T = 64 .. 1024. On AMD MKL's GEMM is slower and its dot
# quicker: dot products win up to 18 % of the entries there, up to 6 % on Intel.
_COSTS = {
    "GenuineIntel": Costs(60.0, 25.0, 8.2, 4.8, 1.0),  # Cascade Lake at 2.5 GHz, AVX-512
    "AuthenticAMD": Costs(51.0, 9.5, 11.8, 10.9, 0.5),  # EPYC with AVX-512
}
_L2_BYTES = 1 << 20


@functools.cache
def _costs() -> Costs:
    """Return the figures of this machine's maker, Intel's where it is another or not told."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^vendor_id\s*:\s*(\S+)", text, re.MULTILINE)
    return _COSTS.get(found[1] if found else "", _COSTS["GenuineIntel"])


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
        costs = _costs()
        dot = costs.dot_call_ns * -(-tokens // slab) + tokens / (
            costs.dot_per_ns if near else costs.dot_per_ns_far
        )
        runs: list[Run] = []
        for block in range(len(self.offsets) - 1):
            lo, hi = self.offsets[block], self.offsets[block + 1]
            if lo == hi:
                continue
            first = block * self.block_rows
            end = min(first + self.block_rows, self.rows)
            gemm = (end - first) * cols * tokens / costs.gemm_per_ns
            dots = (hi - lo) * dot + (end - first) * tokens * costs.transpose_ns
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
