"""``rows``: whole rows, or columns, with the largest scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from sparseft._text import did_you_mean
from sparseft.errors import OptionError
from sparseft.selection.registry import Candidates, register_selector
from sparseft.selection.scopes import Kept, Scope
from sparseft.selection.structured import Grid, Rewound, budgets, keep_units

__all__ = ["select_rows"]

Dim = Literal["out", "in"]


@register_selector("rows", reference="https://arxiv.org/abs/2412.06289", kind="structure")
def select_rows(
    candidates: Candidates,
    *,
    nnz: Sequence[int],
    scope: Scope = "global",
    score: str = "magnitude",
    dim: Dim = "out",
    **options: Any,
) -> list[Kept]:
    """Keep whole rows of weights, those with the largest sum of scores.

    Exactly nnz entries: of the first row that does not fit whole, its best entries are kept.

    Args:
        candidates: parameters. Rows of all of them compete by sum, so a longer row has the better
            chance; a vector or scalar is one row.
        nnz: filled in.
        scope: "global", or "tensor": each tensor its share by size.
        score: the method that scores entries; it is computed twice.
        dim: "out": what lies behind one index of dim 0 (the weights of one output of `nn.Linear`,
            one token of an `nn.Embedding`). "in": the columns of the matrix (dim 0, the rest).
            transformers' `Conv1D` stores its weight transposed: there the words change places.
        options: of the scoring method.

    Raises:
        OptionError: another dim; options of the scoring method that cannot be used here.
        MaskError: scope "row"; scores that are NaN or negative, naming the tensor.

    Example:
        >>> import sparseft, torch
        >>> layer = torch.nn.Linear(2, 3, bias=False)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[0.1, 0.1], [0.0, 0.9], [0.4, 0.3]]))
        >>> masks = sparseft.select(layer, "rows", score="weight_magnitude", nnz=3)
        >>> masks["weight"].indices.tolist()
        [2, 3, 4]
    """
    if dim not in get_args(Dim):
        raise OptionError(
            f"dim={dim!r} is not 'out' or 'in'.{did_you_mean(str(dim), get_args(Dim))}"
        )
    groups = budgets(candidates, nnz, scope, "rows")
    grids = {}
    for name, parameter in candidates.parameters.items():
        by_column = dim == "in" and parameter.ndim > 1
        grids[name] = Grid.of(parameter.shape, *((0, 1) if by_column else (1, 0)))
    return keep_units(candidates, Rewound(candidates, score, options), grids, nnz, groups)
