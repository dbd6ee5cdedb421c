"""What the methods by gradients share: batches run through a model that stays as it is, and sums of
their gradients as scores.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from numbers import Real
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from sparseft.errors import DataError, MaskError, NonFiniteLossError, OptionError
from sparseft.modules import GradientScores, ParameterIndex
from sparseft.modules._gradient_sums import OVERFLOW
from sparseft.modules.gradient_scores import Statistic, TensorScores
from sparseft.modules.weight_storage import full_value
from sparseft.ops import gather_entries
from sparseft.ops.score_keys import flat_part
from sparseft.selection.counts import is_integer
from sparseft.selection.registry import Candidates, Piece, pieces_of

__all__ = ["LossFn", "Shortlist", "gradient_pieces"]

logger = logging.getLogger(__name__)

LossFn = Callable[[nn.Module, Any], Tensor]

# A multiple of what is kept; None: all entries; "auto": all up to `_EXACT`, and where a list would
# take as much memory (up to 12 bytes an entry, against 4); else `_MULTIPLE`. On an encoder of 31
# million parameters, 5 % kept, four batches of eight random rows, lists of 4 and 10 times what is
# kept led to masks that shared 53 % and 75 % of their entries with the exact one. What is missing
# is the first batch's noise, and to a smaller part tensors that would need more than their share.
Shortlist = float | Literal["auto"] | None
_EXACT = 1 << 29
_MULTIPLE = 10.0


def gradient_pieces(
    candidates: Candidates,
    batches: Iterable[Any],
    score: Callable[[Tensor, Tensor, int], Tensor],
    *,
    statistic: Statistic,
    weighted: bool = False,
    loss_fn: LossFn | None,
    max_batches: int | None,
    shortlist: Shortlist,
    nnz: int | None,
    train: bool,
    group: Any,
) -> Iterator[Piece]:
    """Yield the scores of every candidate, by sums of gradients over batches.

    Args:
        candidates: parameters.
        batches: read once, at most ``max_batches`` of them.
        score: (sums, weights in the sums' dtype, number of batches) -> scores, entry by entry; it
            may write into the first.
        statistic, weighted, group: as in `GradientScores`.
        loss_fn: (model, batch) -> scalar loss; None: ``model(**batch).loss``.
        shortlist, nnz: see `Shortlist`; nnz is how many entries `select` will keep, None where that
            is not known.
        train: run the model in train mode instead of eval mode.

    Raises:
        OptionError: options of the wrong kind.
        DataError: no batches; a loss that is no scalar, or that no candidate is part of.
        NonFiniteLossError: a loss is NaN or infinite; names the batch.
        MaskError: gradients that are not finite though the loss is; names the tensor.
    """
    _check_options(batches, max_batches, loss_fn)
    model = candidates.model
    loss_fn = _model_loss if loss_fn is None else loss_fn
    scores = GradientScores(
        model,
        candidates.parameters,
        statistic=statistic,
        candidates=_counts(candidates, shortlist, nnz),
        weighted=weighted,
        group=group,
    )
    with _left_alone(model, train), scores, torch.enable_grad():
        for number, batch in enumerate(islice(batches, max_batches)):
            _loss(model, batch, loss_fn, number).backward()
            scores.step()
    for total in scores.totals():
        if not scores.batches:
            raise DataError(
                "there are no batches to take gradients of: batches is empty. An iterator that "
                "was read before has none left; give a list or a DataLoader."
            )
        if scores.unreached:
            logger.warning(
                "no gradient reached %d of %d tensors: %s. Their entries rank last. Are they part "
                "of this loss?",
                len(scores.unreached), len(candidates.parameters), ", ".join(scores.unreached),
            )  # fmt: skip
            scores.unreached = []
        weight = full_value(candidates.parameters[total.name])
        yield from _pieces(total, weight, score, scores.batches)


def _pieces(
    total: TensorScores,
    weight: Tensor,
    score: Callable[[Tensor, Tensor, int], Tensor],
    batches: int,
) -> Iterator[Piece]:
    name, pattern, sums = total
    if pattern is None:
        for part in pieces_of(sums.numel()):
            scores = score(sums[part], flat_part(weight, part).to(sums), batches)
            _check_finite(name, scores, batches, part.start)
            yield Piece(name, part.start, scores)
        return
    indices = pattern.indices.long()
    values = score(sums, gather_entries(weight, pattern.indices).to(sums), batches)
    _check_finite(name, values, batches, indices)
    parts = list(pieces_of(weight.numel()))
    edges = torch.tensor([0, *(part.stop for part in parts)], device=indices.device)
    bounds = torch.searchsorted(indices, edges).tolist()
    for part, lo, hi in zip(parts, bounds[:-1], bounds[1:], strict=True):
        scores = sums.new_zeros(part.stop - part.start)
        scores[indices[lo:hi] - part.start] = values[lo:hi]
        yield Piece(name, part.start, scores)


def _check_finite(name: str, scores: Tensor, batches: int, places: Tensor | int) -> None:
    """Refuse overflown sums: infinite ones would rank first. ``places``: of the scores, or of the
    first of them.
    """
    finite = torch.isfinite(scores)
    if not bool(finite.all()):
        first = int((~finite).to(torch.uint8).argmax())
        at = places + first if isinstance(places, int) else int(places[first])
        raise MaskError(
            f"the gradient of {name!r} gives the score {float(scores[first])} at flat index "
            f"{at} after {batches} batches, though the loss is finite. {OVERFLOW}"
        )


def _check_options(batches: Any, max_batches: Any, loss_fn: Any) -> None:
    if torch.is_inference_mode_enabled():
        raise OptionError(
            "gradients are needed, but under torch.inference_mode() there are none. Select outside "
            "of it; torch.no_grad() does no harm."
        )
    if loss_fn is not None and not callable(loss_fn):
        raise OptionError(
            f"loss_fn is {loss_fn!r}, wanted a function (model, batch) -> scalar loss, or None for "
            "model(**batch).loss."
        )
    if isinstance(batches, Mapping | Tensor | str) or not isinstance(batches, Iterable):
        raise OptionError(
            f"batches is {type(batches).__name__}, wanted an iterable of batches: a DataLoader, or "
            "a list of what loss_fn takes ([batch] for a single one)."
        )
    if max_batches is not None and (not is_integer(max_batches) or int(max_batches) < 1):
        raise OptionError(
            f"max_batches is {max_batches!r}, wanted an integer >= 1 or None for all."
        )


def _counts(candidates: Candidates, shortlist: Shortlist, nnz: int | None) -> dict[str, int] | None:
    """Return how many candidates each tensor has, None for all entries."""
    if shortlist == "auto":
        whole = nnz is None or candidates.numel <= max(_EXACT, 3 * _MULTIPLE * nnz)
        shortlist = None if whole else _MULTIPLE
        if not whole:
            logger.warning(
                "shortlist='auto': of %s candidates, gradients are summed at %g times the %s "
                "entries to keep, chosen in the first batch; the mask differs from that of exact "
                "sums, which shortlist=None makes in 4 bytes an entry. shortlist=%g says the same "
                "without this warning.",
                f"{candidates.numel:,}", _MULTIPLE, f"{nnz:,}", _MULTIPLE,
            )  # fmt: skip
    if shortlist is None:
        return None
    number = isinstance(shortlist, Real) and not isinstance(shortlist, bool)
    if not number or not 1 <= float(shortlist) < math.inf:
        raise OptionError(
            f"shortlist is {shortlist!r}, wanted a multiple >= 1 of the entries to keep, None for "
            "all entries, or 'auto'."
        )
    if nnz is None:
        raise OptionError(
            f"shortlist={shortlist} is a multiple of the entries to keep, but a structure ranks "
            "sums over all entries. Leave it out, or give None."
        )
    each = float(shortlist) * nnz / max(1, candidates.numel)
    return {
        # Vectors (biases, norms) are small, and their gradients are often the largest.
        name: p.numel() if p.ndim < 2 else min(p.numel(), math.ceil(each * p.numel()))
        for name, p in candidates.parameters.items()
    }


# -- a batch ---


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    if getattr(model.forward, "__func__", None) is nn.Module.forward:
        raise OptionError(
            f"{type(model).__name__} has no forward, so there is no loss to take gradients of. "
            "Pass loss_fn=lambda model, batch: ..."
        )
    if not isinstance(batch, Mapping):
        raise OptionError(
            f"a batch is {type(batch).__name__}, wanted a mapping of the model's arguments. Pass "
            "loss_fn=lambda model, batch: ... for batches of another kind."
        )
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise DataError(
            "the model returned no loss: the batches hold no 'labels', or it is no Hugging Face "
            "model. Pass loss_fn=lambda model, batch: ..."
        )
    return loss


def _loss(model: nn.Module, batch: Any, loss_fn: LossFn, number: int) -> Tensor:
    first = next(model.parameters(), None)
    loss = loss_fn(model, batch if first is None else _to_device(batch, first.device))
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise DataError(
            f"the loss of batch {number} is {got}, wanted a scalar tensor. Return the mean, "
            "not a loss for each row, and not a number."
        )
    if not bool(torch.isfinite(loss.detach()).all()):
        raise NonFiniteLossError(
            f"the loss of batch {number} is {float(loss.detach())}, so its gradient says nothing. "
            f"{_why_not_finite(model)}"
        )
    if not loss.requires_grad:
        raise DataError(
            f"the loss of batch {number} does not depend on any candidate. Was it computed under "
            "no_grad or detached, or do include and exclude rule out what the model uses?"
        )
    return loss.reshape(())


def _why_not_finite(model: nn.Module) -> str:
    for name, parameter in ParameterIndex(model).items():
        if parameter.is_floating_point() and not bool(torch.isfinite(full_value(parameter)).all()):
            return f"Parameter {name!r} holds NaN or infinity itself: did training diverge?"
    return "Leave the batch out, or look for rows without labels in it."


def _to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch; containers of unknown kinds move themselves or stay."""
    move: Any = getattr(batch, "to", None)
    if callable(move):
        return move(device)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(_to_device(value, device) for value in batch)
    return batch


# -- the model as it was ---


@contextmanager
def _left_alone(model: nn.Module, train: bool) -> Iterator[None]:
    """Let nothing require grad, in one mode; put back both, the global generators' state, and the
    buffers that train mode writes (running means of norms).
    """
    modes = [(module, module.training) for module in model.modules()]
    trained = [p for p in model.parameters() if p.requires_grad]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in (model.modules() if train else ())
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    python, numpy = random.getstate(), np.random.get_state()
    gpus = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    # Gradients of weights are none of DDP's business here: only sums are exchanged.
    parallel = isinstance(model, nn.parallel.DistributedDataParallel)
    alone: AbstractContextManager[Any] = cast(Any, model).no_sync() if parallel else nullcontext()
    with torch.random.fork_rng(devices=gpus), alone:
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            model.train(train)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                with torch.no_grad():  # batch_norm writes without a new _version
                    buffer.copy_(before)
            for parameter in trained:
                parameter.requires_grad_(True)
            random.setstate(python)
            np.random.set_state(numpy)
