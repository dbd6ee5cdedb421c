"""A mask in the tile kernels' order, built on its device once and kept beside its index tensor.

The kernels of `sparseft_kernels.sampled_grad` walk 128x128 tiles of the weight; values stay in flat
order. So each entry gets a code that says where inside its tile to read and where in flat order to
write: the epilogue stores through it, and no pass re-orders anything. The rows of a band of tiles
are consecutive in both orders, so the place need only count from the band's first entry; place and
tile coordinates then share 32 bits, where a permutation and flat indices would take 8 bytes an
entry and a chain of two gathers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sparseft_kernels._configs import GROUP, PLACE_SHIFT, TILE, plan_sampled_grad

if TYPE_CHECKING:
    from sparseft_kernels._configs import SampledPlan, Target
    from sparseft_kernels.sampled_grad import TileWork

__all__ = ["Tiles", "tiles_of"]

# Entries sorted together: a few int64 vectors of this length are all the memory building needs.
_CHUNK = 1 << 24
# Inactive rows or columns are left out by copying the active columns of an operand. That must leave
# 0.7 of a dimension, and of the tiles, to be worth the copy (a choice; not measured).
_PACKED = 0.7
# Packed operands have whole 16-byte pieces in a row, whatever the dtype.
_ROUND = 8


class _Axis(NamedTuple):
    """Rows or columns of the weight as tiles see them: all, or the active ones packed together."""

    size: int
    active: Tensor | None = None  # ascending; the last one repeated up to a multiple of 8
    place: Tensor | None = None  # int32, of each row among the active ones

    def take(self, x: Tensor) -> Tensor:
        """Return the columns of a (T, all) operand that the tiles refer to."""
        return x if self.active is None else x.index_select(1, self.active)

    def places(self, at: Tensor) -> Tensor:
        return at if self.place is None else self.place[at]


@dataclass
class Tiles:
    """Where the entries of one mask lie, by tiles.

    ``edges`` holds the first entry of each row of tiles, and nnz; ``work`` the non-empty programs,
    by how many tiles wide a program is.
    """

    shape: tuple[int, int]
    rows: _Axis
    cols: _Axis
    edges: list[int]
    work: dict[int, TileWork]
    version: int
    _codes: Tensor | None = None
    _plans: dict[tuple, SampledPlan] = field(default_factory=dict)

    def codes(self, indices: Tensor) -> Tensor:
        """Return (nnz,) in tile order, as `_tile_grad_kernel` describes them.

        Made when first asked for: a mask so sparse that dot products win never needs them.
        """
        if self._codes is None:
            self._codes = _codes(indices, self)
        return self._codes

    def plan(self, tokens: int, itemsize: int, precision: str, target: Target) -> SampledPlan:
        """Return the way to compute the gradient from so many tokens."""
        key = (tokens, itemsize, precision, target)
        if key not in self._plans:
            if len(self._plans) >= 64:  # ragged batches: token counts never repeat
                self._plans.clear()
            programs = {width: work.table.shape[0] for width, work in self.work.items()}
            self._plans[key] = plan_sampled_grad(
                tokens, self.shape, self.edges[-1], programs, itemsize, precision, target
            )
        return self._plans[key]


_known = WeakIdKeyDictionary()


def tiles_of(indices: Tensor, rows: int, cols: int) -> Tiles:
    """Return the tiles of a mask's flat indices, nnz > 0; cached while the tensor is unchanged.

    Building waits for the device a few times; a cached answer never does.
    """
    known = _known.get(indices)
    if known is not None and (*known.shape, known.version) == (rows, cols, indices._version):
        return known
    _known[indices] = tiles = _build(indices, rows, cols)
    return tiles


def _build(indices: Tensor, rows: int, cols: int) -> Tiles:
    shape = (rows, cols)
    axes = _Axis(rows), _Axis(cols)
    edges, counts = _count(indices, shape, axes)
    packed = _packed_axes(indices, shape)
    if packed != axes:
        other_edges, other_counts = _count(indices, shape, packed)
        if int(other_counts.count_nonzero()) <= _PACKED * int(counts.count_nonzero()):
            axes, edges, counts = packed, other_edges, other_counts
    work = {width: _work(counts, edges, width) for width in (1, 2)}
    return Tiles(shape, *axes, edges, work, indices._version)


def _packed_axes(indices: Tensor, shape: tuple[int, int]) -> tuple[_Axis, _Axis]:
    """Return both axes, packed where enough of it is inactive."""
    marks = [torch.zeros(n, dtype=torch.bool, device=indices.device) for n in shape]
    for part in indices.split(_CHUNK):
        row = torch.div(part, shape[1], rounding_mode="trunc")
        for mark, at in zip(marks, (row, part - row * shape[1]), strict=True):
            mark.index_fill_(0, at.long(), True)
    axes = []
    for size, mark in zip(shape, marks, strict=True):
        active = mark.nonzero().view(-1)
        if active.numel() > _PACKED * size:
            axes.append(_Axis(size))
            continue
        place = (mark.cumsum(0) - 1).to(torch.int32)
        active = torch.cat((active, active[-1:].expand(-active.numel() % _ROUND)))
        axes.append(_Axis(active.numel(), active, place))
    return axes[0], axes[1]


def _chunks(edges: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, end) row of tiles so that each stretch has about ``_CHUNK`` entries at most."""
    first = 0
    for band in range(1, len(edges)):
        last = band == len(edges) - 1
        if last or edges[band + 1] - edges[first] > _CHUNK:
            yield first, band
            first = band


def _positions(
    indices: Tensor, shape: tuple[int, int], axes: tuple[_Axis, _Axis]
) -> tuple[Tensor, Tensor]:
    """Return row and column of each entry, among the active ones where packed."""
    row = torch.div(indices, shape[1], rounding_mode="trunc")
    return axes[0].places(row), axes[1].places(indices - row * shape[1])


def _tile_columns(cols: _Axis) -> int:
    return -(-cols.size // TILE)


def _count(
    indices: Tensor, shape: tuple[int, int], axes: tuple[_Axis, _Axis]
) -> tuple[list[int], Tensor]:
    """Return the first entry of each row of tiles (and nnz), and the entries of each tile."""
    rows, cols = axes
    if rows.active is None:
        firsts = torch.arange(0, rows.size, TILE, device=indices.device)
    else:
        firsts = rows.active[::TILE]
    starts = (firsts * shape[1]).to(indices.dtype)
    edges = [*torch.searchsorted(indices, starts).tolist(), indices.numel()]
    across = _tile_columns(cols)
    counts = torch.zeros(len(edges) - 1, across, dtype=torch.int64, device=indices.device)
    for band, end in _chunks(edges):
        row, col = _positions(indices[edges[band] : edges[end]], shape, axes)
        tile = ((row // TILE) - band) * across + col // TILE
        counts[band:end] = torch.bincount(tile, minlength=(end - band) * across).view(-1, across)
    return edges, counts


def _work(counts: Tensor, edges: list[int], width: int) -> TileWork:
    """Return the non-empty programs of ``width`` tiles, 8 rows of tiles at a time, column by
    column: programs in flight together then share their operands in L2.
    """
    from sparseft_kernels.sampled_grad import TileWork

    down, across = counts.shape
    device = counts.device
    ends = counts.view(-1).cumsum(0)
    first_of = torch.cat((ends.new_zeros(1), ends))
    row = torch.arange(down, device=device)[:, None]
    group = torch.arange(-(-across // width), device=device)[None, :]
    first, middle, end = (
        first_of[row * across + (group * width + step).clamp(max=across)] for step in (0, 1, width)
    )
    order = (row // GROUP * group.numel() + group) * GROUP + row % GROUP
    base = torch.tensor(edges[:-1], device=device)[:, None]
    fields = torch.broadcast_tensors(row, group, first, middle, end, base)
    used = (end > first).view(-1).nonzero().view(-1)
    used = used[order.view(-1)[used].argsort()]
    table = torch.stack([f.reshape(-1)[used] for f in fields], 1)
    heads = torch.arange(-(-down // GROUP) + 1, device=device) * GROUP
    groups = torch.searchsorted(table[:, 0].contiguous() // GROUP * GROUP, heads).tolist()
    wide = edges[-1] >= 2**31
    return TileWork(table if wide else table.to(torch.int32), groups, int((end - first).max()))


def _codes(indices: Tensor, tiles: Tiles) -> Tensor:
    edges, axes = tiles.edges, (tiles.rows, tiles.cols)
    across = _tile_columns(tiles.cols)
    bands = torch.tensor(edges, device=indices.device)
    most = max(end - first for first, end in zip(edges, edges[1:], strict=False))
    # 32 bits, unsigned, while 2**18 entries suffice for 128 rows (11008 columns at 10 %)
    dtype = torch.int32 if most <= 1 << (32 - PLACE_SHIFT) else torch.int64
    codes = torch.empty(indices.numel(), dtype=dtype, device=indices.device)
    for band, end in _chunks(edges):
        span = slice(edges[band], edges[end])
        row, col = _positions(indices[span], tiles.shape, axes)
        tile = ((row // TILE) - band) * across + col // TILE
        order = tile.argsort(stable=True)
        place = torch.arange(span.start, span.stop, device=indices.device) - bands[row // TILE]
        local = row % TILE * TILE + col % TILE
        codes[span] = ((place << PLACE_SHIFT) | local)[order].to(dtype)
    return codes
