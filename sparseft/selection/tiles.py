"""``tiles``: the best entries inside the best tiles, so that training skips the other tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from sparseft.errors import OptionError
from sparseft.pattern import index_dtype_for
from sparseft.selection.registry import Candidates, register_selector
from sparseft.selection.scopes import (
    Kept,
    Scope,
    SeveralTopK,
    by_tensor,
    pattern_of,
    whole_rows,
)
from sparseft.selection.structured import Grid, Ranked, Rewound, budgets, unit_masses

__all__ = ["TILE", "select_tiles"]

# The tile of the sampled gradient's kernels (sparseft_kernels/_configs.py), which cannot be
# imported without Triton.
TILE = 128


@register_selector("tiles", reference="https://arxiv.org/abs/2405.15525", kind="structure")
def select_tiles(
    candidates: Candidates,
    *,
    nnz: Sequence[int],
    scope: Scope = "global",
    score: str = "magnitude",
    fraction: float = 0.2,
    **options: Any,
) -> list[Kept]:
    """Keep the best entries inside the best tiles of 128 x 128, and nothing outside of them.

    The sampled weight gradient walks such tiles and skips those without an entry: with a fifth of
    the tiles it has a fifth of the work of a plain mask, which has entries in all of them at any
    but the smallest density. What the restriction costs in quality is for a study to say.

    Args:
        candidates: parameters, each seen as a matrix (dim 0, the rest). Vectors and scalars have no
            tiles, as their gradient costs nothing: all their entries take part.
        nnz: filled in.
        scope: "global", or "tensor": each tensor its share by size, in its own best tiles.
        score: the method that scores entries; it is computed twice.
        fraction: tiles to use, in (0, 1] of all there are (rounded up): those with the largest sum
            of scores. Tiles at the right and lower edges are smaller and compete by the sum they
            have. More are used where nnz would not fit; masks of a list of counts nest as long as
            none needs that.
        options: of the scoring method.

    Raises:
        OptionError: fraction out of range; options of the scoring method that cannot be used here.
        MaskError: scope "row"; scores that are NaN or negative, naming the tensor.

    Memory: about 16 bytes per kept entry, 32 per tile, one piece of scores and one row.
    """
    good = isinstance(fraction, Real) and not isinstance(fraction, bool)
    if not good or not 0 < float(fraction) <= 1:
        raise OptionError(f"fraction is {fraction!r}, wanted a part of the tiles in (0, 1].")
    scores = Rewound(candidates, score, options)
    shapes = {name: p.shape for name, p in candidates.parameters.items()}
    sides = {name: TILE if len(shape) > 1 else 0 for name, shape in shapes.items()}
    grids = {name: Grid.of(shape, sides[name], sides[name]) for name, shape in shapes.items()}
    groups = budgets(candidates, nnz, scope, "tiles")
    masses = unit_masses(scores, grids, shapes)
    areas = []
    for names, shares in groups:
        free = sum(math.prod(shapes[name]) for name in names if not sides[name])
        ranked = Ranked.of({name: grids[name] for name in names if sides[name]}, masses)
        wanted: dict[int, list[int]] = {}
        for i, share in enumerate(shares):
            enough, left = ranked.whole(max(0, share - free))
            used = max(enough + (left > 0), math.ceil(float(fraction) * ranked.order.numel()))
            wanted.setdefault(used, []).append(i)
        whole = {n: torch.ones(grids[n].down, dtype=torch.bool) for n in names if not sides[n]}
        for used, which in wanted.items():
            inside = whole | ranked.first(used)
            areas.append(_Area(grids, inside, {i: shares[i] for i in which}))
    for name, _, pieces in by_tensor(scores, shapes):
        mine = [area for area in areas if name in area.inside]
        for row, table in whole_rows(pieces, grids[name].cols):
            for area in mine:
                area.offer(name, row, table)
    chosen: list[dict[str, list[Tensor]]] = [{name: [] for name in shapes} for _ in nnz]
    zeros = [0] * len(nnz)
    for area in areas:
        for i, none in area.finish(chosen).items():
            zeros[i] += none
    return [
        Kept(
            {n: pattern_of(one[n], s, candidates.parameters[n].device) for n, s in shapes.items()},
            zero,
        )
        for one, zero in zip(chosen, zeros, strict=True)
    ]


class _Area:
    """The best entries inside some tiles, at several counts.

    Args:
        grids: name -> grid.
        inside: name -> which of its tiles, flat bool.
        counts: which count -> entries to keep.
    """

    def __init__(
        self, grids: Mapping[str, Grid], inside: Mapping[str, Tensor], counts: Mapping[int, int]
    ) -> None:
        self.inside = {name: tiles for name, tiles in inside.items() if bool(tiles.any())}
        self._grids = grids
        self._counts = counts
        self._top = SeveralTopK(max(counts.values()))
        self._origin: list[tuple[str, int]] = []  # of what was offered: tensor and first row

    def offer(self, name: str, row: int, table: Tensor) -> None:
        """Offer what lies inside of (rows, cols) scores that start at ``row``."""
        grid, last = self._grids[name], row + table.shape[0]
        while row < last:
            stop = min(last, (row // grid.height + 1) * grid.height)
            columns = grid.columns(self.inside[name], row // grid.height)
            scores, table = table[: stop - row], table[stop - row :]
            if columns.numel():
                if columns.numel() < grid.cols:
                    scores = scores.index_select(1, columns.to(scores.device))
                self._top.add(str(len(self._origin)), scores)
                self._origin.append((name, row))
            row = stop

    def finish(self, chosen: Sequence[dict[str, list[Tensor]]]) -> dict[int, int]:
        """Add the flat positions to each count's; return how many of them have score 0."""
        found = self._top.finish_each(list(self._counts.values()))
        for i, top in zip(self._counts, found, strict=True):
            for (name, row), pattern in zip(self._origin, top.patterns.values(), strict=True):
                if not pattern.nnz:
                    continue
                grid = self._grids[name]
                columns = grid.columns(self.inside[name], row // grid.height)
                place = pattern.indices.to("cpu", torch.int64)
                rows = torch.div(place, columns.numel(), rounding_mode="trunc")
                flat = (row + rows) * grid.cols + columns[place - rows * columns.numel()]
                chosen[i][name].append(flat.to(index_dtype_for(grid.rows * grid.cols)))
        return {i: top.zeros for i, top in zip(self._counts, found, strict=True)}
