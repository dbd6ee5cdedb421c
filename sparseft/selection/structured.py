"""What structured methods share: units (rows, blocks, tiles) ranked by the mass of their scores.

The mass of a unit is the sum of its entries' scores. One walk over the scores adds up the masses, a
second one reads entries where single ones must be chosen; no score is kept in between. Whatever a
scoring method yields twice, it must therefore be able to compute twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseft.errors import MaskError, OptionError
from sparseft.ops import topk_single
from sparseft.pattern import index_dtype_for
from sparseft.selection.counts import apportion, rows_of
from sparseft.selection.registry import REGISTRY, Candidates, Piece
from sparseft.selection.scopes import (
    Kept,
    Scope,
    by_tensor,
    check_scores,
    pattern_of,
    whole_rows,
)

__all__ = ["Grid", "Ranked", "Rewound", "budgets", "keep_units", "unit_masses"]


class Rewound:
    """The scores of a registered method, computed anew by every walk over them.

    Args:
        candidates: what may be chosen from.
        score: name of a method of kind "scores" or "either" (`select` has checked that).
        options: its options.
        ranked: scores are only compared, in one walk; else they are summed as well, in two.

    Raises:
        OptionError: options that allow no second walk, or whose scores have no meaningful sum.
    """

    def __init__(
        self,
        candidates: Candidates,
        score: str,
        options: Mapping[str, Any],
        *,
        ranked: bool = False,
    ) -> None:
        self._fn = REGISTRY.get(score).fn
        self._candidates, self._options = candidates, options
        if ranked:
            return
        for name, value in options.items():
            if isinstance(value, Iterator):
                raise OptionError(
                    f"{name} is a {type(value).__name__}, which can be read once, but the scores "
                    f"of {score!r} are read twice. Give a list or a DataLoader."
                )
        if options.get("largest") is False:
            raise OptionError(
                "largest=False ranks entries, but units are ranked by the sum of their scores, "
                "which has no such order. Leave it out, or write scores of your own for method "
                "'function'."
            )

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._fn(self._candidates, **self._options))


class Grid(NamedTuple):
    """A matrix cut into units of ``height`` x ``width``; those at the edges may be smaller.

    Tensors of more dimensions are seen as (dim 0, the rest), vectors and scalars as one row.
    """

    rows: int
    cols: int
    height: int
    width: int

    @classmethod
    def of(cls, shape: Sequence[int], height: int, width: int) -> Grid:
        """Cut a tensor; a height or width of 0 means its whole extent."""
        rows = rows_of(shape)
        cols = math.prod(shape) // rows if rows else 0
        return cls(rows, cols, height or max(1, rows), width or max(1, cols))

    @property
    def down(self) -> int:
        return -(-self.rows // self.height)

    @property
    def across(self) -> int:
        return -(-self.cols // self.width)

    def sizes(self) -> Tensor:
        """Return (units,) int64: entries of every unit, row by row of the grid."""
        heights, widths = (
            (torch.arange(0, whole, part) + part).clamp_(max=whole) - torch.arange(0, whole, part)
            for whole, part in ((self.rows, self.height), (self.cols, self.width))
        )
        return (heights[:, None] * widths).view(-1)

    def columns(self, chosen: Tensor, band: int) -> Tensor:
        """Return the columns, ascending, of the chosen units (bool) in a row of the grid."""
        mine = chosen.view(self.down, self.across)[band]
        return mine.repeat_interleave(self.width)[: self.cols].nonzero().view(-1)

    def entries(self, chosen: Tensor) -> Tensor:
        """Return the flat positions, ascending, of all entries of the chosen units (bool)."""
        dtype = index_dtype_for(self.rows * self.cols)
        if self.across <= 1:
            rows = chosen.repeat_interleave(self.height)[: self.rows].nonzero().to(dtype)
            return (rows * self.cols + torch.arange(self.cols, dtype=dtype)).view(-1)
        parts = [torch.empty(0, dtype=dtype)]
        for band in chosen.view(self.down, self.across).any(1).nonzero().view(-1).tolist():
            first = band * self.height
            rows = torch.arange(first, min(first + self.height, self.rows), dtype=dtype)
            parts.append(
                (rows[:, None] * self.cols + self.columns(chosen, band).to(dtype)).view(-1)
            )
        return torch.cat(parts)


class Ranked(NamedTuple):
    """The units of some tensors, the largest mass first, ties to the first by name and place.

    Args:
        grids: name -> grid, in order.
        order: (units,) int64: which unit, counted through all grids.
        ends: (units,) int64: entries of the units so far.
        masses: (units,) fp64, descending.
    """

    grids: dict[str, Grid]
    order: Tensor
    ends: Tensor
    masses: Tensor

    @classmethod
    def of(cls, grids: dict[str, Grid], masses: Mapping[str, Tensor]) -> Ranked:
        none = torch.empty(0, dtype=torch.int64)
        sizes = torch.cat([none, *(grid.sizes() for grid in grids.values())])
        ranked = torch.cat([none.double(), *(masses[name].view(-1) for name in grids)]).sort(
            descending=True, stable=True
        )
        return cls(grids, ranked.indices, sizes[ranked.indices].cumsum(0), ranked.values)

    def whole(self, count: int) -> tuple[int, int]:
        """Return how many of the first units fit into ``count`` entries, and the entries left."""
        units = int(torch.searchsorted(self.ends, count, right=True))
        return units, count - (int(self.ends[units - 1]) if units else 0)

    def first(self, units: int) -> dict[str, Tensor]:
        """Return the first units as a bool mask over each tensor's grid, flat."""
        chosen = torch.zeros(self.order.numel(), dtype=torch.bool)
        chosen[self.order[:units]] = True
        parts = chosen.split([grid.down * grid.across for grid in self.grids.values()])
        return dict(zip(self.grids, parts, strict=True))

    def unit(self, place: int) -> tuple[str, int]:
        """Return the tensor, and the number within its grid, of the unit at a place."""
        at = int(self.order[place])
        for name, grid in self.grids.items():
            if at < grid.down * grid.across:
                return name, at
            at -= grid.down * grid.across
        raise IndexError(place)

    def massless(self, units: int) -> int:
        """Return how many entries of the first units lie in units whose scores are all 0."""
        if not units:
            return 0
        live = min(units, int(self.masses.count_nonzero()))
        return int(self.ends[units - 1]) - (int(self.ends[live - 1]) if live else 0)


def budgets(
    candidates: Candidates, counts: Sequence[int], scope: Scope, method: str
) -> list[tuple[list[str], list[int]]]:
    """Return groups of tensors whose units compete, each with its part of every count.

    Raises:
        MaskError: scope "row", which says nothing about units that are chosen whole.
    """
    names = list(candidates.parameters)
    if scope == "global":
        return [(names, list(counts))]
    if scope == "row":
        raise MaskError(
            f"scope='row' means nothing for {method!r}, which chooses among whole units; wanted "
            "'global' or 'tensor'."
        )
    sizes = [parameter.numel() for parameter in candidates.parameters.values()]
    shares = zip(*(apportion(count, sizes) for count in counts), strict=True)
    return [([name], list(share)) for name, share in zip(names, shares, strict=True)]


def unit_masses(
    pieces: Iterable[Piece], grids: Mapping[str, Grid], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Return name -> (down, across) fp64 on the CPU: the sum of scores in every unit.

    Raises:
        MaskError: NaN or negative scores, naming the tensor; pieces out of order.

    Numerics: sums in fp64, in an order that depends on shapes and the size of pieces only.
    """
    masses = {}
    for name, _, parts in by_tensor(pieces, shapes):
        grid = grids[name]
        total = masses[name] = torch.zeros(grid.down, grid.across, dtype=torch.float64)
        for row, table in whole_rows(parts, grid.cols):
            if not bool(table.min() >= 0):  # NaN is not, either
                check_scores(name, row * grid.cols, table.reshape(-1))
            last = row + table.shape[0]
            if grid.down == 1:
                total[0] += _across(table.sum(0, keepdim=True, dtype=torch.float64), grid)[0].cpu()
            elif grid.height == 1:
                total[row:last] = _across(table, grid).cpu()
            else:
                bands = torch.arange(row, last) // grid.height
                total.index_add_(0, bands, _across(table, grid).cpu())
    return masses


def _across(table: Tensor, grid: Grid) -> Tensor:
    """Return (rows, across): the sums of each row within the columns of every unit."""
    if grid.across == 1:
        return table.sum(1, keepdim=True, dtype=torch.float64)
    if grid.width == 1:
        return table.double()
    whole = grid.cols // grid.width * grid.width
    parts = table[:, :whole].unflatten(1, (-1, grid.width)).sum(2, dtype=torch.float64)
    if whole == grid.cols:
        return parts
    return torch.cat([parts, table[:, whole:].sum(1, keepdim=True, dtype=torch.float64)], 1)


def keep_units(
    candidates: Candidates,
    scores: Rewound,
    grids: dict[str, Grid],
    counts: Sequence[int],
    groups: Sequence[tuple[list[str], list[int]]],
) -> list[Kept]:
    """Return, for each count, the units with the largest mass, whole; of the first one that does
    not fit whole the best entries.

    Args:
        candidates: what may be chosen from.
        scores: read once, and up to the tensors of units that do not fit once more.
        grids: name -> grid of every candidate.
        counts: entries to keep in total.
        groups: of `budgets`.
    """
    shapes = {name: p.shape for name, p in candidates.parameters.items()}
    masses = unit_masses(scores, grids, shapes)
    chosen: list[dict[str, list[Tensor]]] = [{name: [] for name in shapes} for _ in counts]
    zeros = [0] * len(counts)
    cut: dict[str, list[tuple[int, int, int]]] = {}
    for names, shares in groups:
        ranked = Ranked.of({name: grids[name] for name in names}, masses)
        for i, share in enumerate(shares):
            units, left = ranked.whole(share)
            for name, mask in ranked.first(units).items():
                chosen[i][name].append(grids[name].entries(mask))
            zeros[i] += ranked.massless(units)
            if left:
                name, unit = ranked.unit(units)
                cut.setdefault(name, []).append((i, unit, left))
                zeros[i] += left * (float(ranked.masses[units]) == 0)
    for i, name, part in _best_of(scores, shapes, grids, cut):
        chosen[i][name] = [torch.cat([*chosen[i][name], part]).sort().values]
    return [
        Kept(
            {n: pattern_of(one[n], s, candidates.parameters[n].device) for n, s in shapes.items()},
            z,
        )
        for one, z in zip(chosen, zeros, strict=True)
    ]


def _best_of(
    scores: Rewound,
    shapes: Mapping[str, torch.Size],
    grids: Mapping[str, Grid],
    cut: Mapping[str, Sequence[tuple[int, int, int]]],
) -> Iterator[tuple[int, str, Tensor]]:
    """Yield (which count, tensor, flat positions) for units of which only some entries are kept.

    Args:
        cut: tensor -> (which count, unit, entries to keep).
    """
    left = len(cut)
    for name, _, parts in by_tensor(scores, shapes) if cut else ():
        if name not in cut:
            continue
        grid = grids[name]
        held: dict[int, list[Tensor]] = {unit: [] for _, unit, _ in cut[name]}
        for row, table in whole_rows(parts, grid.cols):
            for unit, rows in held.items():
                top, left_edge = _corner(grid, unit)
                inside = table[max(top - row, 0) : max(top + grid.height - row, 0)]
                if len(inside):  # a copy, as a view would keep the whole piece
                    rows.append(inside[:, left_edge : left_edge + grid.width].clone())
        for i, unit, count in cut[name]:
            top, left_edge = _corner(grid, unit)
            values = torch.cat(held[unit])
            best = topk_single(values, count, name=name).indices.to("cpu", torch.int64)
            width = values.shape[1]
            yield i, name, (top + best // width) * grid.cols + left_edge + best % width
        left -= 1
        if not left:
            return


def _corner(grid: Grid, unit: int) -> tuple[int, int]:
    """Return the first row and column of a unit."""
    return unit // grid.across * grid.height, unit % grid.across * grid.width
