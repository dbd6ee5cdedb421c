"""Rows of an embedding's sparse diff, added to the rows that tokens look up.

The counterpart of `spmm` for one-hot inputs: ``W[ids[t]] + S[ids[t]]``, rows of one batch with
different S, or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparseft.diff import SparseDiff
from sparseft.errors import DiffError
from sparseft.ops._backend import resolve_backend
from sparseft.ops._common import operator
from sparseft.ops._csr import csr_of
from sparseft.ops._row_groups import (
    RowGroups,
    call_op,
    checked,
    flattened,
    rows_of_group,
    segments_of,
    spans,
    why_no_kernel,
    wide_of,
)
from sparseft.ops._spmm_cpu import embedding_diff_cpu_

__all__ = ["embedding_diff"]


# The definition.


def embedding_diff_reference(
    add_to: Tensor,
    ids: Tensor,
    values: Sequence[Tensor],
    indices: Sequence[Tensor],
    order: Tensor | None,
    ends: Sequence[int],
    rows: int,
) -> Tensor:
    """``add_to[r] + S_g[ids[r]]`` for the rows r of group g; groups as in `spmm_reference`."""
    wide = wide_of(add_to, None, values)
    out, cols = add_to.to(wide), add_to.shape[-1]
    for g, start in enumerate([0, *ends[:-1]]):
        mine = slice(start, ends[g]) if order is None else order[start : ends[g]].long()
        dense = torch.zeros(rows * cols, dtype=wide, device=add_to.device)
        dense = dense.index_put((indices[g].long(),), values[g].to(wide)).view(rows, cols)
        added = torch.zeros_like(out)
        added[mine] = dense[ids[mine]]
        out = out + added
    return out.to(add_to.dtype)


# Registration: dispatch, fake, autograd. No defaults in the schema, as for `spmm`.


@operator(
    "embedding_diff(Tensor add_to, Tensor ids, Tensor[] values, Tensor[] indices, Tensor? order, "
    "int[] ends, SymInt rows, int padding_idx, bool scale_grad_by_freq, str backend) -> Tensor"
)
def _embedding_diff(
    add_to, ids, values, indices, order, ends, rows,
    padding_idx, scale_grad_by_freq, backend,
):  # fmt: skip
    operands = (add_to, *values)
    out = flattened(add_to).clone()
    ids2 = ids.reshape(out.shape[:2]).contiguous()
    chosen = resolve_backend(
        "embedding_diff", out, ids2, *values, *indices,
        backend=backend, why_not=why_no_kernel(operands, indices, rows),
    )  # fmt: skip
    cols = add_to.shape[-1]
    if out.numel() == 0 or not values:
        return out.view(add_to.shape)
    if chosen == "triton":
        from sparseft_kernels.spmm import launch_embedding_diff

        segments = segments_of(values, indices, (), ends, rows, cols, False)
        launch_embedding_diff(out, ids2, segments, order)
        return out.view(add_to.shape)
    if out.device.type != "cpu":
        return embedding_diff_reference(add_to, ids, values, indices, order, ends, rows)
    wide = wide_of(add_to, None, values)
    for g, (start, end) in enumerate(spans(ends)):
        csr = csr_of(indices[g], rows, cols, transposed=False)
        held = values[g].detach().to(wide)
        if order is None:
            part = out[start:end].view(-1, cols)
            embedding_diff_cpu_(part, ids2[start:end].reshape(-1), csr, held)
        else:
            mine = order[start:end].long()
            part = out[mine]
            embedding_diff_cpu_(part.view(-1, cols), ids2[mine].reshape(-1), csr, held)
            out.index_copy_(0, mine, part)
    return out.view(add_to.shape)


@torch.library.register_fake("sparseft::embedding_diff")
def _(
    add_to, ids, values, indices, order, ends, rows,
    padding_idx, scale_grad_by_freq, backend,
):  # fmt: skip
    return add_to.new_empty(add_to.shape)


def _setup_embedding(ctx, inputs, output):
    _, ids, values, indices, order, ends, rows, padding_idx, scale_grad_by_freq, backend = inputs
    ctx.plan = (list(ends), rows, padding_idx, scale_grad_by_freq, backend)
    ctx.count = len(values)
    ctx.dtypes = [v.dtype for v in values]
    ctx.save_for_backward(ids, order, *indices)


def _embedding_backward(ctx, grad):
    ids, order, *indices = ctx.saved_tensors
    ends, *options = ctx.plan
    needs_y, _, needs_values, *_ = ctx.needs_input_grad
    dvalues: list[Tensor | None] = [None] * ctx.count
    for g, (start, end) in enumerate(spans(ends)):
        if needs_values[g]:
            dvalues[g] = torch.ops.sparseft.sampled_embedding_grad.default(
                rows_of_group(grad, order, start, end), rows_of_group(ids, order, start, end),
                indices[g], *options,
            ).to(ctx.dtypes[g])  # fmt: skip
    return grad if needs_y else None, None, dvalues, [None] * ctx.count, *[None] * 6


torch.library.register_autograd(
    "sparseft::embedding_diff", _embedding_backward, setup_context=_setup_embedding
)


# Public functions.


def embedding_diff_at(*args: Any) -> Tensor:
    """``(add_to, ids, values, indices, order, ends, rows, padding_idx, scale_grad_by_freq,
    backend)``, as in `embedding_diff_reference`.
    """
    return call_op(_embedding_diff, args)


def embedding_diff(
    add_to: Tensor,
    token_ids: Tensor,
    diffs: SparseDiff | Sequence[SparseDiff],
    *,
    rows: RowGroups | None = None,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Return ``add_to[t] + S[token_ids[t]]``, S the sparse diff of a (vocab, d) table.

    Args:
        add_to: (B, ..., d) floating, the table's own rows ``W[token_ids]``.
        token_ids: (B, ...) int32 or int64.
        diffs: "add" diff of shape (vocab, d), or one per group of rows.
        rows: as in `spmm`.
        padding_idx: row whose values get no gradient, as in ``nn.Embedding``; forward adds its
            diff like any other.
        scale_grad_by_freq: divide each row's gradient by how often its token occurs in the group.
        backend: as in `spmm`.

    Returns:
        Like ``add_to``. Differentiable in it and in the diffs' values.

    Raises:
        DiffError, BackendError: as in `spmm`.

    Numerics: one sum in fp32 (fp64) and one rounding per entry: with ``add_to = W[token_ids]`` the
    bits of a table that has the diff written in.
    """
    many, groups = checked("embedding_diff", diffs, rows, add_to)
    vocab, dim = many[0].shape
    if add_to.shape != (*token_ids.shape, dim):
        raise DiffError(
            f"embedding_diff: add_to has shape {tuple(add_to.shape)}; token_ids "
            f"{tuple(token_ids.shape)} and diffs of shape {(vocab, dim)} need "
            f"{(*token_ids.shape, dim)}"
        )
    padding = -1 if padding_idx is None else padding_idx % vocab
    return embedding_diff_at(
        add_to, token_ids, [d.values for d in many], [d.indices for d in many],
        groups.order, list(groups.ends), vocab, padding, scale_grad_by_freq, backend or "",
    )  # fmt: skip
