"""``gradient``: the entries with the largest gradient, or the largest product with the weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from torch import Tensor

from sparseft._text import did_you_mean
from sparseft.errors import OptionError
from sparseft.selection.batches import LossFn, Shortlist, gradient_pieces
from sparseft.selection.registry import Candidates, Piece, register_selector

__all__ = ["select_gradient"]


@register_selector(
    "gradient",
    reference="https://arxiv.org/abs/1810.02340",
    zero="got no gradient in these batches",
)
def select_gradient(
    candidates: Candidates,
    *,
    batches: Iterable[Any],
    kind: Literal["sum", "snip"] = "sum",
    loss_fn: LossFn | None = None,
    max_batches: int | None = None,
    shortlist: Shortlist = "auto",
    train: bool = False,
    group: Any = None,
    nnz: int | None = None,
) -> Iterator[Piece]:
    """Keep the largest gradients ``|sum g|`` over batches, or sensitivities ``|theta * sum g|``.

    Args:
        candidates: parameters; the model is left as it was, as by ``fisher``.
        batches, loss_fn, max_batches, shortlist, train, group, nnz: as for ``fisher``; the
            shortlist is chosen by the same score of the first batch.
        kind: "sum": where the loss falls fastest to first order. "snip": connection sensitivity,
            the first-order effect of setting an entry to 0 (Lee, Ajanthan, Torr 2019; the paper
            normalises it, which changes no order).

    Raises:
        OptionError: another ``kind``; as ``fisher``.
        DataError, NonFiniteLossError, MaskError: as ``fisher``.

    Example:
        >>> import sparseft, torch
        >>> layer = torch.nn.Linear(3, 1, bias=False)
        >>> rows = [torch.tensor([1.0, -2.0, 0.0]), torch.tensor([1.0, 2.0, 0.5])]
        >>> masks = sparseft.select(
        ...     layer, "gradient", nnz=1, batches=rows, loss_fn=lambda model, x: model(x).sum())
        >>> masks["weight"].indices.tolist()
        [0]
    """
    if kind not in ("sum", "snip"):
        raise OptionError(
            f"kind={kind!r} is not 'sum' or 'snip'.{did_you_mean(str(kind), _SCORES)}"
        )
    return gradient_pieces(
        candidates,
        batches,
        _SCORES[kind],
        statistic="sum",
        weighted=kind == "snip",
        loss_fn=loss_fn,
        max_batches=max_batches,
        shortlist=shortlist,
        nnz=nnz,
        train=train,
        group=group,
    )


def _sum(sums: Tensor, weight: Tensor, batches: int) -> Tensor:
    return sums.abs_()


def _snip(sums: Tensor, weight: Tensor, batches: int) -> Tensor:
    return sums.mul_(weight).abs_()


_SCORES = {"sum": _sum, "snip": _snip}
