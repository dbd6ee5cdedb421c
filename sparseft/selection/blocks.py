"""``blocks``: whole rectangles of entries with the largest scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparseft.errors import OptionError
from sparseft.selection.counts import is_integer
from sparseft.selection.registry import Candidates, register_selector
from sparseft.selection.scopes import Kept, Scope
from sparseft.selection.structured import Grid, Rewound, budgets, keep_units

__all__ = ["select_blocks"]


@register_selector("blocks", reference="https://arxiv.org/abs/2405.15525", kind="structure")
def select_blocks(
    candidates: Candidates,
    *,
    nnz: Sequence[int],
    scope: Scope = "global",
    score: str = "magnitude",
    block: Sequence[int] = (16, 16),
    **options: Any,
) -> list[Kept]:
    """Keep whole blocks of weights, those with the largest sum of scores.

    Exactly nnz entries: of the first block that does not fit whole, its best entries are kept.

    Args:
        candidates: parameters, each seen as a matrix (dim 0, the rest); a vector or scalar is one
            row, cut into blocks of one row.
        nnz: filled in.
        scope: "global", or "tensor": each tensor its share by size.
        score: the method that scores entries; it is computed twice.
        block: rows and columns of a block. Blocks start at the first entry; those at the other
            edges are smaller and compete by the sum they have.
        options: of the scoring method.

    Raises:
        OptionError: a block that is no pair of positive integers; options of the scoring method
            that cannot be used here.
        MaskError: scope "row"; scores that are NaN or negative, naming the tensor.

    Memory: 8 bytes for each block of the model, and four times that while they are ranked.
    """
    sides = list(block) if isinstance(block, Sequence) and not isinstance(block, str) else []
    if len(sides) != 2 or not all(is_integer(side) and int(side) > 0 for side in sides):
        raise OptionError(f"block is {block!r}, wanted rows and columns, e.g. block=(16, 16).")
    groups = budgets(candidates, nnz, scope, "blocks")
    grids = {n: Grid.of(p.shape, *map(int, sides)) for n, p in candidates.parameters.items()}
    return keep_units(candidates, Rewound(candidates, score, options), grids, nnz, groups)
