"""Products with sparse diffs of a weight, one diff per group of batch rows, in one launch a layer.

``out[t] = y[t] + sum_j S_g(t)[m, j] * x[t, j]``: every group g of batch rows has a sparse matrix
S_g of its own, found through a table of addresses. Matrices are compressed by rows of the output,
so a program owns BLOCK_M neighbouring outputs of BLOCK_T tokens and sums their entries in order:
one writer per element, no atomics, the same bits every time. They do not depend on the other
groups; on the number of tokens only through the choice of a tile (`_config`).

Masks are uneven: a block lasts as long as its longest row. Rows far longer than the mean are
therefore left out of their block and get a program of their own, which takes BLOCK_M times as many
entries of the one row at a time.

With few tokens (decoding) ``x`` is read where it lies. With many, a transposed copy in the groups'
order makes the gathers contiguous: BLOCK_T tokens of one column at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft_kernels._configs import EMBEDDING_DIFF, SPMM_FEW, SPMM_MANY, SPMM_ONE, SpmmConfig
from sparseft_kernels._launch import device_guard, empty, round_to, triton_dtype

__all__ = ["Segment", "launch_embedding_diff", "launch_spmm"]

# Fields of a group's row in the table, all int64.
FIELDS = tl.constexpr(9)
_TABLES = 4096  # of some hundred bytes each


class Segment(NamedTuple):
    """One group's matrix, compressed by rows of the output, and its rows of the batch.

    Args:
        offsets: (M + 1,) int32.
        index: (nnz,) int32 column of each entry; ``values`` (nnz,) fp32 beside it.
        values: see ``index``.
        bias: (M,) fp32 added to every token, or None.
        long_rows: (n,) int32, the rows with more than ``limit`` entries.
        limit: see ``long_rows``.
        first: place of its first batch row in the order.
        count: how many batch rows it has.
    """

    offsets: Tensor
    index: Tensor
    values: Tensor
    bias: Tensor | None
    long_rows: Tensor
    limit: int
    first: int
    count: int


@triton.jit
def _tokens(order_ptr, offs, in_bounds, first, per_row, ORDERED: tl.constexpr):
    """Return where in the batch the tokens ``offs`` of a group lie."""
    if ORDERED:
        row = tl.load(order_ptr + first + offs // per_row, mask=in_bounds, other=0).to(tl.int64)
        return row * per_row + offs % per_row
    else:
        return first * per_row + offs


@triton.jit(do_not_specialize=["per_row", "width", "blocks"])
def _spmm_kernel(
    x_ptr, y_ptr, order_ptr, table_ptr, out_ptr,
    per_row, width, blocks, stride_xt, stride_xk,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr, ORDERED: tl.constexpr, ADD: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """out[t, m] = rn(y[t, m] + bias[m] + sum_j value[m, j] * x[t, j]) for the tokens of a group.

    x is addressed by (token, column) through its strides: tokens of the batch, or PACKED, those of
    the groups one after another. y, out (tokens, width) contiguous, possibly the same. order: batch
    rows of the groups, each ``per_row`` tokens. table (groups, FIELDS): addresses of offsets,
    index, values, bias (0: none) and long rows; first place in order, number of batch rows, number
    of long rows, their limit. Program (b, t, g): output block b, or long row b - blocks.
    """
    group = table_ptr + tl.program_id(2) * FIELDS
    first = tl.load(group + 5)
    count = tl.load(group + 6) * per_row
    start = tl.program_id(1).to(tl.int64) * BLOCK_T
    block = tl.program_id(0)
    if start < count:
        offsets_ptr = tl.load(group).to(tl.pointer_type(tl.int32))
        index_ptr = tl.load(group + 1).to(tl.pointer_type(tl.int32))
        values_ptr = tl.load(group + 2).to(tl.pointer_type(tl.float32))
        bias_at = tl.load(group + 3)
        bias_ptr = bias_at.to(tl.pointer_type(tl.float32))
        offs = start + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        t_in_bounds = offs < count
        token = _tokens(order_ptr, offs, t_in_bounds, first, per_row, ORDERED)
        if PACKED:
            x_ptrs = x_ptr + (first * per_row + offs) * stride_xt
        else:
            x_ptrs = x_ptr + token * stride_xt
        if block < blocks:
            rows = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
            row_start = tl.load(offsets_ptr + rows, mask=rows < width, other=0)
            length = tl.load(offsets_ptr + rows + 1, mask=rows < width, other=0) - row_start
            keep = (rows < width) & (length <= tl.load(group + 8))
            length = tl.where(keep, length, 0)
            # Summed over its last dimension once, at the end: warps lie along it.
            parts = tl.zeros((BLOCK_T, BLOCK_M, BLOCK_K), tl.float32)
            for k in range(0, tl.max(length, 0), BLOCK_K):
                places = k + tl.arange(0, BLOCK_K)  # [BLOCK_K]
                held = places[None, :] < length[:, None]  # [BLOCK_M, BLOCK_K]
                entry = row_start[:, None] + places[None, :]
                col = tl.load(index_ptr + entry, mask=held, other=0).to(tl.int64)
                value = tl.load(values_ptr + entry, mask=held, other=0.0)
                src = x_ptrs[:, None, None] + (col * stride_xk)[None, :, :]
                both = t_in_bounds[:, None, None] & held[None, :, :]
                parts += tl.load(src, mask=both, other=0.0).to(tl.float32) * value[None, :, :]
            acc = tl.sum(parts, 2)
            if bias_at != 0:
                acc += tl.load(bias_ptr + rows, mask=keep, other=0.0)[None, :]
            dst = (token * width)[:, None] + rows[None, :]
            both = t_in_bounds[:, None] & keep[None, :]
            if ADD:
                acc += tl.load(y_ptr + dst, mask=both, other=0.0).to(tl.float32)
            tl.store(out_ptr + dst, round_to(acc, DTYPE), mask=both)
        elif block - blocks < tl.load(group + 7):
            long_ptr = tl.load(group + 4).to(tl.pointer_type(tl.int32))
            row = tl.load(long_ptr + block - blocks)
            row_end = tl.load(offsets_ptr + row + 1)
            line = tl.zeros((BLOCK_T, BLOCK_M * BLOCK_K), tl.float32)
            for k in range(tl.load(offsets_ptr + row), row_end, BLOCK_M * BLOCK_K):
                entries = k + tl.arange(0, BLOCK_M * BLOCK_K)
                held = entries < row_end
                col = tl.load(index_ptr + entries, mask=held, other=0).to(tl.int64)
                value = tl.load(values_ptr + entries, mask=held, other=0.0)
                src = x_ptrs[:, None] + (col * stride_xk)[None, :]
                both = t_in_bounds[:, None] & held[None, :]
                line += tl.load(src, mask=both, other=0.0).to(tl.float32) * value[None, :]
            total = tl.sum(line, 1)
            if bias_at != 0:
                total += tl.load(bias_ptr + row)
            dst = token * width + row
            if ADD:
                total += tl.load(y_ptr + dst, mask=t_in_bounds, other=0.0).to(tl.float32)
            tl.store(out_ptr + dst, round_to(total, DTYPE), mask=t_in_bounds)


@triton.jit(do_not_specialize=["per_row", "dim"])
def _embedding_diff_kernel(
    ids_ptr, order_ptr, table_ptr, out_ptr, per_row, dim,
    BLOCK: tl.constexpr, ORDERED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """out[t, col(e)] = rn(out[t, col(e)] + value[e]) for the entries e of row ids[t] of a table.

    ids (tokens,), out (tokens, dim) contiguous; table and order as in `_spmm_kernel`. Program
    (t, g): one token of a group; a row's columns are unique, so each address has one writer.
    """
    group = table_ptr + tl.program_id(1) * FIELDS
    place = tl.program_id(0).to(tl.int64)
    if place < tl.load(group + 6) * per_row:
        offsets_ptr = tl.load(group).to(tl.pointer_type(tl.int32))
        index_ptr = tl.load(group + 1).to(tl.pointer_type(tl.int32))
        values_ptr = tl.load(group + 2).to(tl.pointer_type(tl.float32))
        token = _tokens(order_ptr, place, place >= 0, tl.load(group + 5), per_row, ORDERED)
        row = tl.load(ids_ptr + token).to(tl.int64)
        end = tl.load(offsets_ptr + row + 1)
        for start in range(tl.load(offsets_ptr + row), end, BLOCK):
            entries = start + tl.arange(0, BLOCK)  # [BLOCK]
            in_bounds = entries < end
            col = tl.load(index_ptr + entries, mask=in_bounds, other=0)
            value = tl.load(values_ptr + entries, mask=in_bounds, other=0.0)
            dst = out_ptr + token * dim + col
            held = tl.load(dst, mask=in_bounds, other=0.0).to(tl.float32)
            tl.store(dst, round_to(held + value, DTYPE), mask=in_bounds)


_tables: OrderedDict[tuple, Tensor] = OrderedDict()


def _table(segments: Sequence[Segment], device: torch.device) -> Tensor:
    """Return (groups, FIELDS) int64 on the device, from the cache if the same addresses were there.

    The key is the whole content, so an address that was freed and used again finds a right table.
    Only a new table makes the host wait (its copy is from pageable memory).
    """
    rows = tuple(
        (
            s.offsets.data_ptr(), s.index.data_ptr(), s.values.data_ptr(),
            0 if s.bias is None else s.bias.data_ptr(), s.long_rows.data_ptr(),
            s.first, s.count, s.long_rows.numel(), s.limit,
        )
        for s in segments
    )  # fmt: skip
    key = (device, rows)
    table = _tables.get(key)
    if table is None:
        table = _tables[key] = torch.tensor(rows, dtype=torch.int64).to(device)
        if len(_tables) > _TABLES:
            _drop_half()
    return table


def _drop_half() -> None:
    """Forget the older half of the tables, once no launch on any stream reads them."""
    dropped = [_tables.popitem(last=False) for _ in range(_TABLES // 2)]
    for device in {key[0] for key, _ in dropped}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _config(tokens: int) -> tuple[SpmmConfig, bool]:
    """Return the tile for the most tokens that a group has, and whether to pack ``x``."""
    if tokens <= SPMM_FEW.block_t * 2:
        return (SPMM_ONE if tokens == 1 else SPMM_FEW), False
    return SPMM_MANY, True


def launch_spmm(
    x: Tensor,
    y: Tensor | None,
    out: Tensor,
    segments: Sequence[Segment],
    order: Tensor | None,
) -> None:
    """Write ``out = y + x @ S.T + bias`` for the batch rows of each segment; others are untouched.

    Args:
        x: (B, L, K) fp32, bf16 or fp16, contiguous.
        y: (B, L, M) likewise, or None for zeros; may be ``out``.
        out: (B, L, M) likewise.
        segments: at least one.
        order: (rows,) int32 or int64, the batch rows that segments refer to; None: as they come.
    """
    per_row, inner, width = x.shape[1], x.shape[2], out.shape[2]
    most = max(s.count for s in segments) * per_row
    if most == 0 or width == 0:
        return
    config, packed = _config(most)
    stride_xt, stride_xk = inner, 1
    if packed:
        taken = x if order is None else x.index_select(0, order)
        taken = taken[: max(s.first + s.count for s in segments)].reshape(-1, inner)
        copy = empty(taken.numel(), x).view(inner, taken.shape[0])
        copy.copy_(taken.t())
        x, stride_xt, stride_xk = copy, 1, taken.shape[0]
    blocks = triton.cdiv(width, config.block_m)
    extra = max(s.long_rows.numel() for s in segments)
    grid = (blocks + extra, triton.cdiv(most, config.block_t), len(segments))
    with device_guard(out.device):
        _spmm_kernel[grid](
            x, out if y is None else y, out if order is None else order,
            _table(segments, out.device), out,
            per_row, width, blocks, stride_xt, stride_xk,
            BLOCK_T=config.block_t, BLOCK_M=config.block_m, BLOCK_K=config.block_k,
            PACKED=packed, ORDERED=order is not None, ADD=y is not None,
            DTYPE=triton_dtype(out.dtype), num_warps=config.num_warps,
        )  # fmt: skip


def launch_embedding_diff(
    out: Tensor, ids: Tensor, segments: Sequence[Segment], order: Tensor | None
) -> None:
    """Add, in place, the diff's rows of the tokens to the looked-up rows.

    Args:
        out: (B, L, dim) fp32, bf16 or fp16, contiguous.
        ids: (B, L) int32 or int64, contiguous.
        segments: at least one; matrices of (vocab, dim).
        order: as in `launch_spmm`.
    """
    per_row = ids.shape[1]
    most = max(s.count for s in segments) * per_row
    if most == 0:
        return
    with device_guard(out.device):
        _embedding_diff_kernel[(most, len(segments))](
            ids, ids if order is None else order, _table(segments, out.device), out,
            per_row, out.shape[2], BLOCK=EMBEDDING_DIFF.block, ORDERED=order is not None,
            DTYPE=triton_dtype(out.dtype), num_warps=EMBEDDING_DIFF.num_warps,
        )  # fmt: skip
