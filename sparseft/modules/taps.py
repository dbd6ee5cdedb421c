"""The autograd Functions that hand a compact leaf its gradient.

Fused: the layer's own forward on the stock weight; backward makes dX and the gradient at the mask,
never dW, and saves the input and a reference to the weight (autocast's low-precision weight lives
inside one call). Generic: an alias of the weight, whose dense gradient is gathered and dropped.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseft.errors import AttachError
from sparseft.modules.leaves import MaskedParameter
from sparseft.ops import gather_entries
from sparseft.ops.live_rows import live_rows
from sparseft.ops.sampled_grad import embedding_grad_at, weight_grad_at

__all__ = ["alias_at_mask", "conv1d_at_mask", "embedding_at_mask", "linear_at_mask"]


class _FirstOrderOnly(torch.autograd.Function):
    """Identity on gradients made under ``create_graph=True``; differentiating them is an error."""

    @staticmethod
    def forward(ctx: Any, name: str, origins: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tensors[origins:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AttachError(
            f"double backward through the masked parameter {ctx.name!r}: the gradient at a mask "
            "has no second derivative here. Use torch.func (grad, hessian, jvp, ...), which works "
            "with masks at the price of dense gradients, detach the masks for gradient penalties "
            "and the like, or compute the penalty without create_graph."
        )


def _first_order(
    ctx: Any, origins: tuple[Tensor, ...], *grads: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return ``grads``, guarded against a second differentiation where one could follow.

    Args:
        ctx: of the Function.
        origins: what the gradients depend on, besides the leaf: whoever differentiates them with
            respect to any of it, and to nothing else, has to arrive at the guard, too.
        grads: the gradients.
    """
    if not torch.is_grad_enabled():
        return grads
    # The results depend on the leaf, through the weight, even where grad_output is a constant; a
    # tensor that requires grad makes a second backward always arrive at the guard.
    reached = torch.zeros((), requires_grad=True)
    origins = (reached, *origins, *(() if ctx.leaf is None else (ctx.leaf,)))
    present = [g.detach() for g in grads if g is not None]
    guarded = iter(_FirstOrderOnly.apply(ctx.name, len(origins), *origins, *present))
    return tuple(None if g is None else next(guarded) for g in grads)


def _kept(leaf: Tensor) -> Tensor | None:
    """Return what the context keeps of the leaf: compiled graphs have no second backward."""
    return None if torch.compiler.is_compiling() else leaf


def _refuse_batched(name: str, grad_output: Tensor) -> None:
    """Raise AttachError for a batch of gradients: a kernel takes one."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.is_legacy_batchedtensor(grad_output):
        raise AttachError(
            f"a batch of gradients reached the masked parameter {name!r} (is_grads_batched=True, "
            "or vectorize=True in torch.autograd.functional), which takes one at a time. Use "
            "torch.func.vjp or jacrev, which work with masks, drop the option, or detach()."
        )


class _LinearAtMask(torch.autograd.Function):
    """``y = x W^T + b`` (or ``x W + b`` transposed) with the weight's gradient only at the mask."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        leaf: Tensor,
        indices: Tensor,
        transposed: bool,
        name: str,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, indices)
        ctx.transposed, ctx.name, ctx.backend = transposed, name, backend
        ctx.leaf_dtype, ctx.tokens, ctx.leaf = leaf.dtype, x.shape[0], _kept(leaf)
        ctx.bias_dtype = None if bias is None else bias.dtype
        if not transposed:
            return F.linear(x, weight, bias)
        return x.mm(weight) if bias is None else torch.addmm(bias, x, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        _refuse_batched(ctx.name, grad_output)
        x, weight, indices = ctx.saved_tensors
        need_x, _, need_bias, need_leaf = ctx.needs_input_grad[:4]
        origins = grad_output, x
        dx = db = dleaf = None
        with torch.no_grad():
            if need_bias:
                db = grad_output.sum(0).to(ctx.bias_dtype)
            live = live_rows(grad_output, x)
            if live is not None:
                grad_output, x = grad_output[live], x[live]
            if need_x:
                w = weight.to(grad_output.dtype)
                dx = grad_output.mm(w.t() if ctx.transposed else w)
                if live is not None:
                    dx = dx.new_zeros(ctx.tokens, dx.shape[1]).index_copy_(0, live, dx)
            if need_leaf:
                dleaf = weight_grad_at(grad_output, x, indices, ctx.transposed, ctx.backend).to(
                    ctx.leaf_dtype
                )
        dx, db, dleaf = _first_order(ctx, origins, dx, db, dleaf)
        return dx, None, db, dleaf, None, None, None, None


class _EmbeddingAtMask(torch.autograd.Function):
    """``y = W[ids]`` with the table's gradient only at the mask."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        weight: Tensor,
        leaf: Tensor,
        indices: Tensor,
        padding_idx: int,
        scale_grad_by_freq: bool,
        name: str,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(ids, indices)
        ctx.vocab, ctx.padding_idx = weight.shape[0], padding_idx
        ctx.scale_grad_by_freq, ctx.name, ctx.backend = scale_grad_by_freq, name, backend
        ctx.leaf_dtype, ctx.leaf = leaf.dtype, _kept(leaf)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        _refuse_batched(ctx.name, grad_output)
        ids, indices = ctx.saved_tensors
        dleaf = None
        if ctx.needs_input_grad[2]:
            with torch.no_grad():
                dleaf = embedding_grad_at(
                    grad_output,
                    ids,
                    indices,
                    ctx.vocab,
                    ctx.padding_idx,
                    ctx.scale_grad_by_freq,
                    ctx.backend,
                ).to(ctx.leaf_dtype)
        (dleaf,) = _first_order(ctx, (grad_output,), dleaf)
        return None, None, dleaf, None, None, None, None, None


class _AliasAtMask(torch.autograd.Function):
    """The weight itself; backward gathers the dense gradient at the mask and drops it."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, leaf: Tensor, indices: Tensor, name: str, backend: str
    ) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.name, ctx.backend, ctx.leaf_dtype = name, backend, leaf.dtype
        ctx.leaf = _kept(leaf)
        # Shares storage and version counter: a step between forward and backward is still noticed.
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        _refuse_batched(ctx.name, grad_output)
        (indices,) = ctx.saved_tensors
        with torch.no_grad():
            dense = grad_output.to_dense() if grad_output.is_sparse else grad_output
            picked = gather_entries(dense, indices, backend=ctx.backend or None)
        (dleaf,) = _first_order(ctx, (grad_output,), picked.to(ctx.leaf_dtype))
        return None, dleaf, None, None, None


def _autocast_input(x: Tensor) -> Tensor:
    """Cast as autocast would inside the layer, but once, so that what is saved is the cast."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _apply_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, masked: MaskedParameter, transposed: bool
) -> Tensor:
    x = _autocast_input(x)
    # Two-dimensional inside, so that the Function's output is no view: a view made in a Function
    # refuses in-place operations (nn.ReLU(inplace=True) after a Linear).
    y = _LinearAtMask.apply(
        x.reshape(-1, x.shape[-1]),
        weight,
        bias,
        masked.leaf,
        masked.pattern.indices,
        transposed,
        masked.name,
        masked.backend or "",
    )
    shape = (*x.shape[:-1], y.shape[-1])
    if getattr(masked, "shards", None) is not None:
        # The same without being a view: FSDP2 puts hooks on what a layer returns, and an in-place
        # operation on a view would lose them.
        return torch.ops.aten._unsafe_view.default(y, shape)
    return y.view(shape)


def linear_at_mask(
    x: Tensor, weight: Tensor, bias: Tensor | None, masked: MaskedParameter
) -> Tensor:
    """Return ``x W^T + b``; x (..., in), weight (out, in); the leaf gets dW at its mask."""
    return _apply_linear(x, weight, bias, masked, False)


def conv1d_at_mask(
    x: Tensor, weight: Tensor, bias: Tensor | None, masked: MaskedParameter
) -> Tensor:
    """Return ``x W + b``; x (..., in), weight (in, out); the leaf gets dW at its mask."""
    return _apply_linear(x, weight, bias, masked, True)


def embedding_at_mask(
    ids: Tensor,
    weight: Tensor,
    masked: MaskedParameter,
    *,
    padding_idx: int | None,
    scale_grad_by_freq: bool,
) -> Tensor:
    """Return ``W[ids]``; ids (...) integers, weight (vocab, d); the leaf gets dW at its mask."""
    return _EmbeddingAtMask.apply(
        ids,
        weight,
        masked.leaf,
        masked.pattern.indices,
        -1 if padding_idx is None else padding_idx,
        scale_grad_by_freq,
        masked.name,
        masked.backend or "",
    )


def alias_at_mask(weight: Tensor, masked: MaskedParameter) -> Tensor:
    """Return an alias of ``weight`` through which the leaf gets the dense gradient at its mask."""
    return _AliasAtMask.apply(
        weight, masked.leaf, masked.pattern.indices, masked.name, masked.backend or ""
    )
