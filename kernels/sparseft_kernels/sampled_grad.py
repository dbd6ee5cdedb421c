"""The gradient of a weight at a mask: dW = A^T B at nnz entries, and an embedding's rows by token.

Two ways to the same numbers. *Tiles*: a program computes one tile of dW on tensor cores, keeps it
in registers, and picks the mask's entries out of it by `tl.gather`; dW never reaches memory, tiles
without entries are never launched. *Dots*: at very low density one dot product over the tokens per
entry, from transposed slabs of the operands. `_configs.plan_sampled_grad` chooses.

Every value has one writer and every sum a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft_kernels._configs import (
    DOTS,
    EMBEDDING_ROWS,
    ENTRYWISE,
    GROUP,
    PLACE_SHIFT,
    TILE,
    TRANSPOSE,
    TileConfig,
)
from sparseft_kernels._launch import INTERPRETING, device_guard, empty, launch

__all__ = [
    "TileWork",
    "aligned",
    "is_copied",
    "launch_dot_grad",
    "launch_embedding_grad",
    "launch_tile_grad",
]

# A misaligned operand is copied this many columns at a time: 16 Ki columns of 4096 bf16 tokens are
# 128 MiB, where the gradient of a 250,002-row head would be 2 GiB.
PANEL = 16384


# Sizes are not specialised on: a ragged batch's token count would compile anew whenever it happens
# to be a multiple of 16.
@triton.jit(do_not_specialize=["tokens", "rows", "cols", "slab", "part_stride", "first_tile"])
def _tile_grad_kernel(
    a_ptr, b_ptr, codes_ptr, work_ptr, out_ptr,
    tokens, rows, cols, slab, part_stride, first_tile,
    stride_at, stride_am, stride_bt, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, CAP: tl.constexpr,
    A_UNIT: tl.constexpr, B_UNIT: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    ACCUMULATE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """out[e] (+)= sum_t a[t, m] * b[t, n] for the entries e = (m, n) of one tile of the weight.

    a (tokens, rows * A_UNIT), b (tokens, cols * B_UNIT), any strides, given in units: a caller
    that knows row lengths and strides to be multiples of 8 says so by passing them divided by 8,
    and 16-byte loads follow. codes (nnz,): entries in tile order, each ``place << 14 | r * 128 +
    c``, place counted from the first entry of the tile's 128 rows, (r, c) inside the 128x128 tile.
    work (programs, 6): row tile (``a`` starts with tile first_tile), column group, first / middle /
    end code, the flat position that places count from. Program (w, z) takes tokens [z * slab, z *
    slab + slab) and writes part z of out (parts, nnz), in flat order.
    """
    item = work_ptr + tl.program_id(0) * 6
    row_tile = tl.load(item).to(tl.int32)
    col_group = tl.load(item + 1).to(tl.int32)
    first = tl.load(item + 2).to(tl.int64)
    middle = tl.load(item + 3).to(tl.int64)
    end = tl.load(item + 4).to(tl.int64)
    base = tl.load(item + 5).to(tl.int64)
    part = tl.program_id(1)

    offs_m = (row_tile - first_tile) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_n = col_group * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offs_t = tl.arange(0, BLOCK_T)  # [BLOCK_T]
    m_in_bounds = offs_m < rows * A_UNIT
    n_in_bounds = offs_n < cols * B_UNIT
    t0 = part * slab
    t1 = tl.minimum(tokens, t0 + slab)
    # int64 throughout: tokens x stride passes 2**31 for the head of a large vocabulary
    step_a = tl.full((), BLOCK_T, tl.int64) * stride_at * A_UNIT
    step_b = tl.full((), BLOCK_T, tl.int64) * stride_bt * B_UNIT
    offs_at = (t0 + offs_t).to(tl.int64) * stride_at * A_UNIT
    offs_bt = (t0 + offs_t).to(tl.int64) * stride_bt * B_UNIT
    # [BLOCK_M, BLOCK_T] directly: transposing a [BLOCK_T, BLOCK_M] load goes through registers on
    # sm_80, and at 128x256 spilled 3.5 KB there.
    a_ptrs = a_ptr + offs_at[None, :] + (offs_m.to(tl.int64) * stride_am)[:, None]
    b_ptrs = b_ptr + offs_bt[:, None] + (offs_n.to(tl.int64) * stride_bn)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for t in range(t0, t1, BLOCK_T):
        t_in_bounds = offs_t < t1 - t
        a = tl.load(a_ptrs, mask=t_in_bounds[None, :] & m_in_bounds[:, None], other=0.0)
        b = tl.load(b_ptrs, mask=t_in_bounds[:, None] & n_in_bounds[None, :], other=0.0)
        # operands of two dtypes; the interpreter would multiply bf16 bit patterns as integers
        if WIDEN or INTERPRETING:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptrs += step_a
        b_ptrs += step_b

    # Blocks of 8x8 contiguous: a warp's fragment of the accumulator is then 256 consecutive bytes
    # of shared memory. Row by row, rows 8 apart fall on the same banks. (Read off the compiled
    # layout; not measured.) The buffer aliases the pipeline's dead stages.
    blocks = tl.reshape(acc, (BLOCK_M // 8, 8, BLOCK_N // 8, 8))
    flat = tl.reshape(tl.permute(blocks, (0, 2, 1, 3)), (BLOCK_M * BLOCK_N,))
    out_ptr += part.to(tl.int64) * part_stride + base
    for start in range(first, end, CAP):
        offs = start + tl.arange(0, CAP)  # [CAP]
        keep = offs < end
        code = tl.load(codes_ptr + offs, mask=keep, other=0)
        local = (code & ((1 << SHIFT) - 1)).to(tl.int32)
        r = local >> 7
        c = local & 127
        if BLOCK_N == 256:
            c += tl.where(offs >= middle, 128, 0)
        local = ((r >> 3) * (BLOCK_N // 8) + (c >> 3)) * 64 + (r & 7) * 8 + (c & 7)
        values = tl.gather(flat, local, 0)
        dst = out_ptr + (code >> SHIFT).to(tl.int64)
        if ACCUMULATE:
            values += tl.load(dst, mask=keep, other=0.0)
        tl.store(dst, values, mask=keep)


@triton.jit(do_not_specialize=["part_stride", "parts", "nnz"])
def _sum_parts_kernel(
    parts_ptr, out_ptr, part_stride, parts, nnz,
    BLOCK: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """out[e] (+)= parts[0, e] + parts[1, e] + ..., in that order. parts (parts, part_stride)."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    in_bounds = offs < nnz
    total = tl.load(parts_ptr + offs, mask=in_bounds, other=0.0)
    for part in range(1, parts):
        src = parts_ptr + offs + tl.full((), part, tl.int64) * part_stride
        total += tl.load(src, mask=in_bounds, other=0.0)
    if ACCUMULATE:
        total += tl.load(out_ptr + offs, mask=in_bounds, other=0.0)
    tl.store(out_ptr + offs, total, mask=in_bounds)


@triton.jit(do_not_specialize=["tokens", "width"])
def _transpose_kernel(
    x_ptr, out_ptr, tokens, width, pitch, stride_t, stride_n,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[n, t] = x[t, n]; zeros from ``tokens`` up to ``pitch``. x any strides, out (width, pitch)
    contiguous.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offs_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    n_in_bounds = offs_n < width
    src = x_ptr + (offs_t.to(tl.int64) * stride_t)[:, None]
    src += (offs_n.to(tl.int64) * stride_n)[None, :]
    x = tl.load(src, mask=(offs_t < tokens)[:, None] & n_in_bounds[None, :], other=0.0)
    dst = out_ptr + (offs_n.to(tl.int64) * pitch)[:, None] + offs_t[None, :]
    tl.store(dst, tl.trans(x), mask=n_in_bounds[:, None] & (offs_t < pitch)[None, :])


@triton.jit(do_not_specialize=["nnz", "cols"])
def _dot_grad_kernel(
    at_ptr, bt_ptr, indices_ptr, out_ptr, nnz, cols, pitch,
    ENTRIES: tl.constexpr, BLOCK_T: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """out[e] (+)= sum_t at[m, t] * bt[n, t] with (m, n) = divmod(indices[e], cols).

    at (rows, pitch), bt (cols, pitch) contiguous, pitch a multiple of BLOCK_T, zeros behind the
    last token. Entries in flat order: neighbours share a row of ``at`` in L1.
    """
    offs = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)  # [ENTRIES]
    in_bounds = offs < nnz
    index = tl.load(indices_ptr + offs, mask=in_bounds, other=0)
    row = index // cols
    col = index - row * cols
    offs_t = tl.arange(0, BLOCK_T)  # [BLOCK_T]
    a_ptrs = at_ptr + (row.to(tl.int64) * pitch)[:, None] + offs_t[None, :]
    b_ptrs = bt_ptr + (col.to(tl.int64) * pitch)[:, None] + offs_t[None, :]
    acc = tl.zeros((ENTRIES, BLOCK_T), tl.float32)
    for t in range(0, pitch, BLOCK_T):
        # entries past the end read those of entry 0: no mask between loads and 16-byte pieces
        a = tl.load(a_ptrs + t).to(tl.float32)
        b = tl.load(b_ptrs + t).to(tl.float32)
        acc += a * b
    values = tl.sum(acc, 1)
    if ACCUMULATE:
        values += tl.load(out_ptr + offs, mask=in_bounds, other=0.0)
    tl.store(out_ptr + offs, values, mask=in_bounds)


@triton.jit(do_not_specialize=["dim", "padding"])
def _embedding_grad_kernel(
    grad_ptr, ids_ptr, order_ptr, run_end_ptr, entry_first_ptr, entry_end_ptr, indices_ptr, out_ptr,
    dim, padding, stride_t, stride_d,
    POSITIONS: tl.constexpr, ENTRIES: tl.constexpr, BY_FREQUENCY: tl.constexpr,
):  # fmt: skip
    """out[e] = sum of grad[t, col(e)] over the positions t of one token, for its masked entries e.

    ids (T,) sorted, order (T,) the position each came from, ascending within a token; run_end (T,)
    one past the last sorted place of the same token; entry_first, entry_end (T,) that token's
    entries in indices (nnz,). grad (T, dim), any strides. Program (j, g) works where a token's run
    starts at j, on every num_programs(1)-th block of its entries.
    """
    j = tl.program_id(0).to(tl.int64)
    token = tl.load(ids_ptr + j).to(tl.int64)
    before = tl.load(ids_ptr + tl.maximum(j - 1, 0)).to(tl.int64)
    if (j == 0) | (before != token):
        if token != padding:
            run_end = tl.load(run_end_ptr + j).to(tl.int64)
            first = tl.load(entry_first_ptr + j).to(tl.int64)
            end = tl.load(entry_end_ptr + j).to(tl.int64)
            step = tl.num_programs(1).to(tl.int64) * ENTRIES
            for start in range(first + tl.program_id(1).to(tl.int64) * ENTRIES, end, step):
                offs = start + tl.arange(0, ENTRIES)  # [ENTRIES]
                in_bounds = offs < end
                index = tl.load(indices_ptr + offs, mask=in_bounds, other=0).to(tl.int64)
                col = tl.where(in_bounds, index - token * dim, 0)
                acc = tl.zeros((POSITIONS, ENTRIES), tl.float32)
                for place in range(j, run_end, POSITIONS):
                    places = place + tl.arange(0, POSITIONS)  # [POSITIONS]
                    held = places < run_end
                    t = tl.load(order_ptr + places, mask=held, other=0).to(tl.int64)
                    src = grad_ptr + (t * stride_t)[:, None] + (col * stride_d)[None, :]
                    keep = held[:, None] & in_bounds[None, :]
                    acc += tl.load(src, mask=keep, other=0.0).to(tl.float32)
                values = tl.sum(acc, 0)
                if BY_FREQUENCY:
                    values = values / (run_end - j).to(tl.float32)
                tl.store(out_ptr + offs, values, mask=in_bounds)


class TileWork(NamedTuple):
    """The non-empty program tiles of a mask; what `_tile_grad_kernel` calls work.

    ``table`` (programs, 6), ``groups[g]`` the first program of the g-th 8 row tiles (one more than
    there are groups), ``widest`` the most entries any program has.
    """

    table: Tensor
    groups: list[int]
    widest: int


def aligned(x: Tensor) -> bool:
    """Say whether rows of a (T, N) operand can be read in 16-byte pieces throughout."""
    return (
        x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.shape[1] % 8 == 0 and x.data_ptr() % 16 == 0
    )


def _padded(x: Tensor) -> Tensor:
    """Return a copy of (T, N) whose rows start at multiples of 16 bytes, with N rounded up to 8.

    What lies in the added columns reaches only parts of a tile that hold no entries.
    """
    width = triton.cdiv(x.shape[1], 8) * 8
    copy = empty(x.shape[0] * width, x).view(x.shape[0], width)
    copy[:, : x.shape[1]].copy_(x)
    return copy


def is_copied(x: Tensor, other: int, *, whole: bool) -> bool:
    """Say whether `launch_tile_grad` copies an operand: it is misaligned, and several tiles along
    the ``other`` dimension would read it piecemeal. ``whole``: not in panels, so not when wide.
    """
    return not aligned(x) and other > 2 * TILE and (not whole or x.shape[1] <= PANEL)


def _operand(x: Tensor) -> tuple[int, int, int, int]:
    """Return (unit, width, stride_t, stride_n) as `_tile_grad_kernel` takes them."""
    if aligned(x):
        return 8, x.shape[1] // 8, x.stride(0) // 8, 1
    return 1, x.shape[1], x.stride(0), x.stride(1)


def launch_tile_grad(
    a: Tensor,
    b: Tensor,
    codes: Tensor,
    work: TileWork,
    out: Tensor,
    config: TileConfig,
    *,
    split: int = 1,
    accumulate: bool = False,
    precision: str = "ieee",
) -> None:
    """Write, or add, ``(a.T @ b)`` at a mask's entries to ``out``, a tile at a time.

    Args:
        a: (T, M) fp32, bf16 or fp16, T > 0, any strides.
        b: (T, N) likewise.
        codes: (nnz,) int32, bits of unsigned numbers, or int64; see `_tile_grad_kernel`.
        work: for programs of ``config``'s width.
        out: (nnz,) fp32, flat order.
        config: a row of the tile table.
        split: parts that the tokens are cut into; each writes a vector of its own, and those are
            summed in order.
        accumulate: add to ``out`` instead of overwriting it.
        precision: of fp32 products: "ieee" or "tf32".

    A misaligned operand that several tiles read is copied with padded rows first: ``a`` in panels
    of 16 Ki columns, ``b`` whole unless it is wider than that.
    """
    nnz = out.numel()
    tokens = a.shape[0]
    slab = triton.cdiv(triton.cdiv(tokens, split), config.block_t) * config.block_t
    split = triton.cdiv(tokens, slab)
    target = empty(split * nnz, out) if split > 1 else out
    columns = b.shape[1]
    if is_copied(b, a.shape[1], whole=True):
        b = _padded(b)
    panels = [(a, 0, 0, work.groups[-1])]
    if is_copied(a, columns, whole=False):
        panels = list(_panels(a, work))
    codes = codes.view(torch.uint32) if codes.dtype == torch.int32 else codes
    b_unit, b_width, stride_bt, stride_bn = _operand(b)
    # Every chunk writes the tile to shared memory again: idle lanes are cheaper than a second one.
    cap = min(max(triton.next_power_of_2(work.widest), 256), config.cap)
    with device_guard(out.device):
        for panel, first_tile, lo, hi in panels:
            if lo == hi:
                continue
            piece = panel if panel is a else _padded(panel)
            a_unit, a_width, stride_at, stride_am = _operand(piece)
            _tile_grad_kernel[(hi - lo, split)](
                piece, b, codes, work.table[lo:hi], target,
                tokens, a_width, b_width, slab, nnz, first_tile,
                stride_at, stride_am, stride_bt, stride_bn,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_T=config.block_t, CAP=cap,
                A_UNIT=a_unit, B_UNIT=b_unit, WIDEN=a.dtype != b.dtype, PRECISION=precision,
                ACCUMULATE=accumulate and split == 1, SHIFT=PLACE_SHIFT,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
    if split > 1:
        launch(
            _sum_parts_kernel, nnz, out.device, target, out, nnz, split,
            ACCUMULATE=accumulate, **ENTRYWISE._asdict(),
        )  # fmt: skip


def _panels(a: Tensor, work: TileWork) -> Iterator[tuple[Tensor, int, int, int]]:
    """Yield (columns of ``a``, their first row tile, first and end program) per panel."""
    step = PANEL // (GROUP * TILE)
    for group in range(0, len(work.groups) - 1, step):
        stop = min(group + step, len(work.groups) - 1)
        first = group * GROUP * TILE
        yield a[:, first : first + PANEL], group * GROUP, work.groups[group], work.groups[stop]


def launch_dot_grad(
    a: Tensor, b: Tensor, indices: Tensor, out: Tensor, *, accumulate: bool = False
) -> None:
    """Write, or add, ``(a.T @ b).flatten()[indices]`` to ``out``, a dot product per entry.

    Args:
        a: (T, M) fp32, bf16 or fp16, T > 0, any strides.
        b: (T, N) likewise.
        indices: (nnz,) ascending flat positions in (M, N), int32 or int64.
        out: (nnz,) fp32.
        accumulate: add to ``out`` instead of overwriting it.

    The operands are transposed a slab of tokens at a time; two slabs fit a GPU's L2, from which
    every entry then reads 2 rows.
    """
    tokens, (rows, cols) = a.shape[0], (a.shape[1], b.shape[1])
    per_token = rows * a.element_size() + cols * b.element_size()
    block = DOTS.block_t
    pitch = min(max(DOTS.slab_bytes // per_token // block, 1), triton.cdiv(tokens, block)) * block
    at, bt = empty(rows * pitch, a), empty(cols * pitch, b)
    with device_guard(out.device):
        for start in range(0, tokens, pitch):
            for x, xt in ((a, at), (b, bt)):
                slab = x[start : start + pitch]
                tile = TRANSPOSE.block
                _transpose_kernel[(triton.cdiv(slab.shape[1], tile), triton.cdiv(pitch, tile))](
                    slab, xt, slab.shape[0], slab.shape[1], pitch, slab.stride(0), slab.stride(1),
                    BLOCK_T=tile, BLOCK_N=tile, num_warps=TRANSPOSE.num_warps,
                )  # fmt: skip
            _dot_grad_kernel[(triton.cdiv(out.numel(), DOTS.entries),)](
                at, bt, indices, out, out.numel(), cols, pitch,
                ENTRIES=DOTS.entries, BLOCK_T=block, ACCUMULATE=accumulate or start > 0,
                num_warps=DOTS.num_warps,
            )  # fmt: skip


def launch_embedding_grad(
    grad_output: Tensor,
    ids: Tensor,
    indices: Tensor,
    vocab: int,
    *,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """Return (nnz,) fp32: the gradient of a (vocab, dim) table at flat ``indices``.

    Args:
        grad_output: (T, dim) fp32, bf16 or fp16, any strides.
        ids: (T,) int32 or int64, T > 0.
        indices: (nnz,) ascending, int32 or int64.
        vocab: rows of the table.
        padding_idx: row that gets nothing; -1 for none.
        scale_grad_by_freq: divide by how often the token occurs in ``ids``.

    Tokens are sorted on the device, so that one program sums a token's positions in order. Nothing
    of the vocabulary's size is made, and the host waits for nothing.
    """
    dim = grad_output.shape[1]
    tokens, order = ids.sort(stable=True)
    run_end = torch.searchsorted(tokens, tokens, right=True)
    # numel fits the indices' dtype, hence so does the end of the last row
    starts = tokens.to(indices.dtype) * dim
    entry_first = torch.searchsorted(indices, starts)
    entry_end = torch.searchsorted(indices, starts + dim)
    out = empty(indices.numel(), grad_output, torch.float32).zero_()
    config = EMBEDDING_ROWS
    blocks = min(max(triton.cdiv(indices.numel(), max(vocab, 1) * config.entries), 1), 8)
    with device_guard(out.device):
        _embedding_grad_kernel[(ids.numel(), blocks)](
            grad_output, tokens, order, run_end, entry_first, entry_end, indices, out,
            dim, padding_idx, grad_output.stride(0), grad_output.stride(1),
            POSITIONS=config.positions, ENTRIES=config.entries, BY_FREQUENCY=scale_grad_by_freq,
            num_warps=config.num_warps,
        )  # fmt: skip
    return out
