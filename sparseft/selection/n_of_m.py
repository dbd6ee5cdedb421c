"""``n:m``: n of every m consecutive entries."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from sparseft.diff import SparsePattern
from sparseft.errors import OptionError
from sparseft.ops import topk_single
from sparseft.pattern import index_dtype_for
from sparseft.selection.counts import is_integer
from sparseft.selection.registry import Candidates, register_selector
from sparseft.selection.scopes import by_tensor, check_scores, pattern_of, whole_rows
from sparseft.selection.structured import Rewound

__all__ = ["select_n_of_m"]


# Entries of a group up to which all pairs are compared.
_COMPARED = 16


@register_selector("n:m", reference="https://arxiv.org/abs/2102.04010", kind="patterns")
def select_n_of_m(
    candidates: Candidates, *, score: str = "magnitude", n: int = 2, m: int = 4, **options: Any
) -> dict[str, SparsePattern]:
    """Keep the n entries with the largest scores of every m consecutive ones of the last dim.

    Ties go to the first. The structure says how many entries there are, in every row: leave nnz,
    density and scope out, or give exactly that number.

    Args:
        candidates: parameters; the last dim is the one that runs along a row (the inputs of
            `nn.Linear`). The last q < m entries of a row that m does not divide keep
            ``q * n // m``; so does a vector's end, and a scalar keeps nothing.
        score: the method that scores entries; computed once.
        n: entries kept of each group, 1 or more.
        m: entries of a group, n or more.
        options: of the scoring method.

    Raises:
        OptionError: n and m that are no such integers.
        MaskError: scores that are NaN or negative, naming the tensor.

    Memory: the result, which is as large as the number of entries kept, and one piece of scores.
    """
    if not is_integer(n) or not is_integer(m) or not 1 <= n <= m:
        raise OptionError(f"n={n!r}, m={m!r}; wanted integers with 1 <= n <= m, e.g. n=2, m=4.")
    n, m = int(n), int(m)
    shapes = {name: p.shape for name, p in candidates.parameters.items()}
    chosen = {}
    for name, shape, pieces in by_tensor(Rewound(candidates, score, options, ranked=True), shapes):
        width = int(shape[-1]) if shape else 1
        dtype = index_dtype_for(math.prod(shape))
        parts = []
        for row, table in whole_rows(pieces, width):
            if not bool(table.min() >= 0):  # NaN is not, either
                check_scores(name, row * width, table.reshape(-1))
            parts.append(_best(table, n, m).to(dtype) + row * width)
        chosen[name] = pattern_of(parts, shape, candidates.parameters[name].device)
    return chosen


def _best(table: Tensor, n: int, m: int) -> Tensor:
    """Return the flat positions, ascending, of the best n of every m entries of each row."""
    width = table.shape[1]
    rest = width % m
    if not rest:
        return _first(table.reshape(-1, m), n).reshape(-1).nonzero().view(-1)
    keep = torch.empty(table.shape, dtype=torch.bool, device=table.device)
    groups = _first(table[:, : width - rest].reshape(-1, m), n)
    keep[:, : width - rest] = groups.reshape(table.shape[0], width - rest)
    keep[:, width - rest :] = _first(table[:, width - rest :], rest * n // m)
    return keep.view(-1).nonzero().view(-1)


def _first(groups: Tensor, n: int) -> Tensor:
    """Return the bool mask of the n largest of each row, ties to the first.

    By counting who comes before whom while that is few comparisons: 14 ns an entry for 2 of 4,
    scores included, against 30 by `topk_single`, which serves long rows.
    """
    count = groups.shape[1]
    if count > _COMPARED:
        mask = torch.zeros(groups.shape, dtype=torch.bool, device=groups.device)
        mask.view(-1)[topk_single(groups, n, per_row=True).indices.long()] = True
        return mask
    places = groups.t().contiguous()
    before = torch.zeros(places.shape, dtype=torch.uint8, device=places.device)
    for i, j in itertools.combinations(range(count), 2):
        first = places[i] >= places[j]
        before[j] += first
        before[i] += ~first
    return (before < n).t()
