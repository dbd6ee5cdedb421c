"""Products with sparse diffs: what a layer gives with a diff that is not written into its weight.

For ``y = x @ W.T`` and a diff S of W, ``x @ (W + S).T = y + x @ S.T``; rows of one batch may have
different diffs, or none. `spmm_embedding` has the embedding's counterpart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparseft.diff import SparseDiff
from sparseft.errors import DiffError
from sparseft.ops._backend import resolve_backend
from sparseft.ops._common import accumulation_dtype, operator
from sparseft.ops._csr import csr_of
from sparseft.ops._row_groups import (
    RowGroups,
    bias_of,
    call_op,
    checked,
    flattened,
    rows_of_group,
    segments_of,
    spans,
    why_no_kernel,
    wide_of,
)
from sparseft.ops._spmm_cpu import spmm_cpu

__all__ = ["RowGroups", "spmm"]


# The definition.


def spmm_reference(
    x: Tensor,
    add_to: Tensor | None,
    values: Sequence[Tensor],
    indices: Sequence[Tensor],
    biases: Sequence[Tensor],
    order: Tensor | None,
    ends: Sequence[int],
    rows: int,
    cols: int,
    transposed: bool = False,
) -> Tensor:
    """``add_to[r] + x[r] @ S_g.T + bias_g`` for the rows r of group g, with S_g dense.

    Group g has the rows ``order[ends[g - 1]:ends[g]]`` of dim 0, or that very slice without
    ``order``. ``transposed``: ``x[r] @ S_g``. Rows of no group get ``add_to``, or zeros. An empty
    bias stands for none.
    """
    wide = wide_of(x, add_to, values)
    width = cols if transposed else rows
    like = x.new_zeros(*x.shape[:-1], width) if add_to is None else add_to
    out = like.to(wide)
    for g, start in enumerate([0, *ends[:-1]]):
        mine = slice(start, ends[g]) if order is None else order[start : ends[g]].long()
        dense = torch.zeros(rows * cols, dtype=wide, device=x.device)
        dense = dense.index_put((indices[g].long(),), values[g].to(wide)).view(rows, cols)
        product = x[mine].to(wide) @ (dense if transposed else dense.t())
        if biases and biases[g].numel():
            product = product + biases[g].to(wide)
        added = torch.zeros_like(out)
        added[mine] = product
        out = out + added
    return out.to(like.dtype)


# Registration: dispatch, fake, autograd. The schemas have no defaults: the dispatcher drops
# arguments that equal theirs, and torch's autograd for lists of tensors then counts too few.


@operator(
    "segment_spmm(Tensor x, Tensor? add_to, Tensor[] values, Tensor[] indices, Tensor[] biases, "
    "Tensor? order, int[] ends, SymInt rows, SymInt cols, bool transposed, str backend) -> Tensor"
)
def _segment_spmm(x, add_to, values, indices, biases, order, ends, rows, cols, transposed, backend):
    batch, width = x.shape[0], cols if transposed else rows
    shape = (*x.shape[:-1], width)
    dtype = x.dtype if add_to is None else add_to.dtype
    x3 = flattened(x)
    y3 = None if add_to is None else flattened(add_to)
    operands = [x3, *(() if y3 is None else (y3,)), *values]
    chosen = resolve_backend(
        "segment_spmm", *operands, *indices, *biases,
        backend=backend, why_not=why_no_kernel(operands, indices, max(rows, cols)),
    )  # fmt: skip
    if ends and ends[-1] == batch:
        out = x3.new_empty(*x3.shape[:-1], width, dtype=dtype)
    elif y3 is None:
        out = x3.new_zeros(*x3.shape[:-1], width, dtype=dtype)
    else:
        out = y3.clone()
    if out.numel() == 0 or not values:
        return out.view(shape)
    if chosen == "triton":
        from sparseft_kernels.spmm import launch_spmm

        segments = segments_of(values, indices, biases, ends, rows, cols, transposed)
        launch_spmm(x3, y3, out, segments, order)
        return out.view(shape)
    if x.device.type != "cpu":
        return spmm_reference(
            x, add_to, values, indices, biases, order, ends, rows, cols, transposed
        )
    wide = wide_of(x, add_to, values)
    for g, (start, end) in enumerate(spans(ends)):
        csr = csr_of(indices[g], rows, cols, transposed=transposed)
        held = csr.arranged(values[g].detach().to(wide))
        bias = bias_of(biases, g)
        if order is None:
            y, target = None if y3 is None else y3[start:end], out[start:end]
            taken = x3[start:end]
        else:
            mine = order[start:end]
            taken = x3.index_select(0, mine)
            y = None if y3 is None else y3.index_select(0, mine)
            target = out.new_empty(end - start, *out.shape[1:])
        flat = None if y is None else y.flatten(0, 1)
        spmm_cpu(taken.flatten(0, 1), csr, held, bias, flat, target.flatten(0, 1))
        if order is not None:
            out.index_copy_(0, mine.long(), target)
    return out.view(shape)


@torch.library.register_fake("sparseft::segment_spmm")
def _(x, add_to, values, indices, biases, order, ends, rows, cols, transposed, backend):
    dtype = x.dtype if add_to is None else add_to.dtype
    return x.new_empty((*x.shape[:-1], cols if transposed else rows), dtype=dtype)


def _setup_spmm(ctx, inputs, output):
    x, add_to, values, indices, biases, order, ends, rows, cols, transposed, backend = inputs
    ctx.plan = (list(ends), rows, cols, transposed, backend)
    ctx.counts = (len(values), len(biases))
    ctx.y_dtype = None if add_to is None else add_to.dtype
    ctx.save_for_backward(x, order, *values, *indices, *biases)


def _spmm_backward(ctx, grad):
    x, order, *rest = ctx.saved_tensors
    n, n_bias = ctx.counts
    values, indices, biases = rest[:n], rest[n : 2 * n], rest[2 * n :]
    ends, rows, cols, transposed, backend = ctx.plan
    needs_x, needs_y, needs_values, _, needs_biases, *_ = ctx.needs_input_grad
    dx = dy = None
    if needs_x:
        dx = torch.ops.sparseft.segment_spmm.default(
            grad, None, values, indices, [], order, ends, rows, cols, not transposed, backend
        ).to(x.dtype)
    if needs_y:
        dy = grad.to(ctx.y_dtype)
    dvalues: list[Tensor | None] = [None] * n
    dbiases: list[Tensor | None] = [None] * n_bias
    for g, (start, end) in enumerate(spans(ends)):
        if needs_values[g]:
            dvalues[g] = torch.ops.sparseft.sampled_weight_grad.default(
                rows_of_group(grad, order, start, end), rows_of_group(x, order, start, end),
                indices[g], transposed, backend,
            ).to(values[g].dtype)  # fmt: skip
        if n_bias and needs_biases[g] and biases[g].numel():
            mine = rows_of_group(grad, order, start, end).flatten(0, -2)
            dbiases[g] = mine.to(accumulation_dtype(grad.dtype)).sum(0).to(biases[g].dtype)
    return dx, dy, dvalues, [None] * n, dbiases, *[None] * 6


torch.library.register_autograd("sparseft::segment_spmm", _spmm_backward, setup_context=_setup_spmm)
# Public functions.


# The ops as modules call them: flat tensors, nothing checked.


def segment_spmm(*args: Any) -> Tensor:
    """``(x, add_to, values, indices, biases, order, ends, rows, cols, transposed, backend)``, as in
    `spmm_reference`.
    """
    return call_op(_segment_spmm, args)


def spmm(
    x: Tensor,
    diffs: SparseDiff | Sequence[SparseDiff],
    *,
    rows: RowGroups | None = None,
    add_to: Tensor | None = None,
    transposed: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Return ``add_to + x @ S.T``, S the diff of an (out, in) weight; the weight is not needed.

    Args:
        x: (B, ..., in) floating.
        diffs: "add" diff of shape (out, in), (in, out) with ``transposed`` (Conv1D); or one per
            group of rows.
        rows: the groups, of dim 0 of ``x``; None: one diff for all rows. Rows in no group get
            ``add_to`` alone.
        add_to: (B, ..., out) floating, what the layer gives without a diff; None: zeros.
        transposed: the weight's orientation.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``; None takes the context's or the
            environment's.

    Returns:
        (B, ..., out) in the dtype of ``add_to``, of ``x`` without. Differentiable in ``x``,
        ``add_to`` and the diffs' values (those of its rows only).

    Raises:
        DiffError: shapes, groups, modes or devices that do not fit.
        BackendError: ``"triton"`` was asked for and cannot run here, or an operand is fp64.

    Numerics: products and sums in fp32 (fp64 with any fp64 operand), entry by entry in the order of
    a row, then ``add_to``, then one rounding. Deterministic. On a CPU a row's bits depend on no
    other row; on a GPU on the size of the largest group, through the tile.

    Inputs that are not contiguous are copied. The first call with a diff lays it out and waits for
    the device.
    """
    many, groups = checked("spmm", diffs, rows, x)
    out, inner = many[0].shape[::-1] if transposed else many[0].shape
    if x.shape[-1] != inner:
        raise DiffError(
            f"spmm: x has shape {tuple(x.shape)} but diffs of shape {tuple(many[0].shape)} take "
            f"{inner} inputs (transposed={transposed}); a weight stored (in, out), as Conv1D does, "
            "needs transposed=True"
        )
    if x.ndim == 1:
        raise DiffError("spmm: x has one dimension; pass x[None]")
    if add_to is not None and add_to.shape != (*x.shape[:-1], out):
        raise DiffError(
            f"spmm: add_to has shape {tuple(add_to.shape)}; it should be {(*x.shape[:-1], out)}"
        )
    return segment_spmm(
        x, add_to, [d.values for d in many], [d.indices for d in many], [],
        groups.order, list(groups.ends), *many[0].shape, transposed, backend or "",
    )  # fmt: skip
