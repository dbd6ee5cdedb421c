"""Products of rows with the matrix of each one's expert, whose backward makes dW at the mask alone.

What `sparseft.modules.experts` puts in place of a layer's own products. Which rows are whose is
counted on the host, in backward; under fake tensors it is shared out evenly.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseft.diff import SparsePattern, index_dtype_for
from sparseft.modules.leaves import MaskedParameter
from sparseft.modules.taps import _first_order, _kept, _refuse_batched
from sparseft.ops.grouped_grad import grouped_grad_at

__all__ = ["entries_of", "under_fake_tensors"]


class _Entries(NamedTuple):
    """A stack's mask, expert by expert."""

    counts: list[int]
    local: list[Tensor]  # flat positions within the expert's matrix


_entries: weakref.WeakKeyDictionary[MaskedParameter, tuple[SparsePattern, _Entries]] = (
    weakref.WeakKeyDictionary()
)


def under_fake_tensors() -> bool:
    from torch._guards import active_fake_mode

    return active_fake_mode() is not None


def _even(total: int, parts: int) -> list[int]:
    """Share out what is not known under fake tensors."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def entries_of(masked: MaskedParameter) -> _Entries:
    """Return the entries of each expert; made once per mask, which waits for the device once.

    The positions within matrices stay as long as the mask: ops keep their layouts by them.
    """
    pattern = masked.pattern
    known = _entries.get(masked)
    if known is not None and known[0] is pattern:
        return known[1]
    experts, size = pattern.shape[0], math.prod(pattern.shape[1:])
    indices = pattern.indices
    if under_fake_tensors():
        counts, local = _even(indices.numel(), experts), torch.empty_like(indices)
    else:
        which = torch.div(indices, size, rounding_mode="floor")
        counts = torch.bincount(which, minlength=experts).tolist()
        local = (indices - which * size).to(index_dtype_for(size))
    found = _Entries(counts, list(local.split(counts)))
    if not under_fake_tensors():
        _entries[masked] = (pattern, found)
    return found


class _ExpertsAtMask(torch.autograd.Function):
    """Products of rows with the matrix of each one's expert; the leaf gets dW at its mask.

    ``how`` says which rows are whose: "groups": offsets (experts,) where each group of rows ends;
    "pairs": an expert (rows,) for each row; "blocks": nothing, as many rows for each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        leaf: Tensor,
        whose: Tensor | None,
        gathered: Tensor | None,
        how: str,
        transposed: bool,
        masked: MaskedParameter,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, whose)
        # Not the mask itself, which would keep a whole model for as long as there is a loss.
        ctx.how, ctx.transposed, ctx.name, ctx.backend = (
            how,
            transposed,
            masked.name,
            masked.backend,
        )
        ctx.leaf_dtype, ctx.leaf, ctx.entries = leaf.dtype, _kept(leaf), entries_of(masked)
        return _product(x, weight, whose, gathered, how, transposed)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        _refuse_batched(ctx.name, grad_output)
        x, weight, whose = ctx.saved_tensors
        dx = dleaf = None
        with torch.no_grad():
            if ctx.needs_input_grad[0]:
                w = weight if ctx.how == "pairs" else weight.to(grad_output.dtype)
                dy = grad_output.flatten(1) if ctx.how == "pairs" else grad_output
                dx = _product(dy, w, whose, None, ctx.how, not ctx.transposed)
                dx = dx.view(x.shape).to(x.dtype)
            if ctx.needs_input_grad[2]:
                dleaf = grouped_grad_at(
                    grad_output.flatten(1) if ctx.how == "pairs" else grad_output.flatten(0, -2),
                    x.flatten(0, -2),
                    _rows_by_expert(ctx.how, whose, x, len(ctx.entries.counts)),
                    ctx.entries.local,
                    ctx.transposed,
                    ctx.backend or "",
                ).to(ctx.leaf_dtype)
        dx, dleaf = _first_order(ctx, (grad_output, x), dx, dleaf)
        return dx, None, dleaf, None, None, None, None, None


def _product(
    x: Tensor,
    weight: Tensor,
    whose: Tensor | None,
    gathered: Tensor | None,
    how: str,
    transposed: bool,
) -> Tensor:
    """Return ``x W_e`` (``transposed``: the weight is stored (in, out)) or ``x W_e^T``.

    Of pairs as bmm gives it, (rows, 1, out) or (rows, out, 1): a view made in a Function refuses
    in-place operations.
    """
    if how == "groups":
        w = weight if transposed else weight.transpose(-2, -1)
        return F.grouped_mm(_aligned(x), w, offs=whose)
    if how == "blocks":
        return torch.bmm(x, weight if transposed else weight.transpose(-2, -1))
    if gathered is None:
        gathered = weight[whose].to(x.dtype)
    if transposed:
        return torch.bmm(x.unsqueeze(1), gathered)
    return torch.bmm(gathered, x.unsqueeze(-1))


def _aligned(x: Tensor) -> Tensor:
    """Return rows as grouped_mm takes them: one of its strides 1, as backward may not give them."""
    return x if x.stride(-1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _rows_by_expert(how: str, whose: Tensor | None, x: Tensor, experts: int) -> list[Any]:
    """Return which rows of ``x``, flattened to (rows, in), belong to each expert: slices, or their
    numbers.

    Waits for the device, except for "blocks".
    """
    if how == "blocks" or whose is None:
        sizes = [x.shape[1]] * experts
    elif under_fake_tensors():
        sizes = _even(x.shape[0], experts)
    elif how == "groups":
        ends = whose.tolist()
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    else:
        whose = whose % experts  # which may count from the end
        sizes = torch.bincount(whose, minlength=experts).tolist()
    if how == "pairs" and whose is not None:
        return list(whose.argsort(stable=True).split(sizes))
    slices, start = [], 0
    for size in sizes:
        slices.append(slice(start, start + size))
        start += size
    return slices
