"""``fisher``: the entries with the largest mean squared gradient (FISH masks)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from sparseft.selection.batches import LossFn, Shortlist, gradient_pieces
from sparseft.selection.registry import Candidates, Piece, register_selector

__all__ = ["select_fisher"]


@register_selector(
    "fisher", reference="https://arxiv.org/abs/2111.09839", zero="got no gradient in these batches"
)
def select_fisher(
    candidates: Candidates,
    *,
    batches: Iterable[Any],
    loss_fn: LossFn | None = None,
    max_batches: int | None = None,
    shortlist: Shortlist = "auto",
    train: bool = False,
    group: Any = None,
    nnz: int | None = None,
) -> Iterator[Piece]:
    """Keep the largest mean squared gradients, the empirical Fisher information (FISH mask).

    The score is the mean over batches of the square of a batch's gradient, of the loss as it is,
    labels included. The paper squares the gradient of each example: give batches of one example for
    that.

    Args:
        candidates: parameters. The model is left as it was: values, buffers, modes, what requires
            grad, any ``.grad``; so are the global generators of torch, numpy and Python (one of the
            DataLoader's own goes on). Masks may be attached.
        batches: what ``loss_fn`` takes; tensors are moved to the model's device. An iterator is
            read once, and only as far as ``max_batches``.
        loss_fn: (model, batch) -> scalar loss; default ``model(**batch).loss``.
        max_batches: look at so many at most.
        shortlist: gradients are summed at that many times the entries to keep, each tensor's share
            by its size and chosen exactly by its gradient in the first batch; vectors are summed
            whole. An entry that is not on it ranks last, so the first batch should be a large one.
            None: all entries are summed, exactly, in 4 bytes each. "auto": None for up to 537
            million candidates (2 GiB), for densities above 3 %, and for structures, which sum
            scores; else 10, which is logged as a warning. For scope "row" give None: each
            row needs entries of its own.
        train: run the model in train mode (dropout draws, from the generators as they are; running
            means are put back).
        group: processes whose batches count together, so that all choose the same entries; None:
            all, where ``torch.distributed`` is initialised; False: this one alone.
        nnz: filled in by `select`.

    Raises:
        OptionError: batches that are no iterable, a model without forward and no loss_fn.
        DataError: no batches; a loss that is no scalar or depends on no candidate.
        NonFiniteLossError: a loss is NaN or infinite; names the batch.
        MaskError: gradients, or their squares, that overflow; names the tensor.

    Memory and numerics: as `sparseft.modules.GradientScores`; no dense gradient of a Linear,
    Embedding or Conv1D weight is formed. Scores of one seed, machine and thread count repeat bit
    for bit.

    Example:
        >>> import sparseft, torch
        >>> layer = torch.nn.Linear(3, 1, bias=False)
        >>> rows = [torch.tensor([1.0, -2.0, 0.0]), torch.tensor([1.0, 2.0, 0.5])]
        >>> masks = sparseft.select(
        ...     layer, "fisher", nnz=1, batches=rows, loss_fn=lambda model, x: model(x).sum())
        >>> masks["weight"].indices.tolist()
        [1]
    """
    return gradient_pieces(
        candidates,
        batches,
        _mean,
        statistic="square",
        loss_fn=loss_fn,
        max_batches=max_batches,
        shortlist=shortlist,
        nnz=nnz,
        train=train,
        group=group,
    )


def _mean(squares: Tensor, weight: Tensor, batches: int) -> Tensor:
    return squares / batches
