"""What a low-rank part leaves of each matrix of a batch: its largest entries kept, in place.

A key is the bits of ``|delta - left @ right|`` in fp32, whose integer order is the order of
magnitudes. No pass stores it: each recomputes its tile of the product, at 4 bytes and 2 r
operations an entry.

1. Four passes, one per 8 bits of the key, count digits under the prefix found so far, per matrix;
   after each a program per matrix moves the prefix one digit down. A tile where no key has the
   prefix adds nothing, one with a few of them adds those, one by one; others their histogram.
2. The host waits once, for each matrix's keep-th key, how many keys equal to it are kept, and
   whether there was a NaN.
3. Only if some matrix keeps a part of its ties: one pass counts them per row and tile, and a
   running sum gives each its rank in flat order.
4. One pass writes.

All decisions are counts and comparisons of integers, and all passes share one tile and one order of
summation, so that they see the same keys: the count is exact, and the bits are the same every time.

Roofline, not a measurement (nothing here was timed on a GPU): the encoder matrices of XLM-R base,
85 M entries at rank 64, are 0.08 ms of memory and, as three TF32 products, 0.1 ms of tensor cores a
pass: five passes stay near 1 ms. In torch the stored product and its keys alone move 24 bytes an
entry, and a sort per matrix, or a top-k of a tenth of it, comes on top. Hence this is the default;
the benchmark suite measures it (`benchmarks/run.py suite --only 'svd/prune/*'`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft_kernels._configs import RESIDUAL, residual_precision
from sparseft_kernels._launch import device_guard, empty, target_of

__all__ = ["MOST_COLUMNS", "NotRankable", "launch_prune_residual"]

INFINITY = tl.constexpr(0x7F80_0000)
BINS = tl.constexpr(256)
# Keys of a tile up to which each is added by itself: a histogram costs 17 instructions a key.
FEW = tl.constexpr(256)

# Places inside a tile are 32-bit.
MOST_COLUMNS = 2**31 // RESIDUAL.block_m - 1
# Digits, most significant first: (lowest bit, bit above the highest).
_DIGITS = ((23, 31), (15, 23), (7, 15), (0, 7))
_ALL, _NONE = -1, 0x7FFF_FFFF  # cuts that every key, and no key, is above


class NotRankable(Exception):
    """A matrix, or its low-rank part, holds NaN."""

    def __init__(self, matrix: int) -> None:
        super().__init__(f"matrix {matrix} holds NaN")
        self.matrix = matrix


@triton.jit
def _open_tile(n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the program's matrix, tile of columns, first row and first column."""
    tiles_n = tl.cdiv(n, BLOCK_N)
    tile = tl.program_id(0)
    tile_n = tile % tiles_n
    return tl.program_id(1).to(tl.int64), tile_n, (tile // tiles_n) * BLOCK_M, tile_n * BLOCK_N


@triton.jit
def _tile(
    delta_ptr, left_ptr, right_ptr, matrix, first_m, first_n, m, n, pitch, r,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return delta, its low-rank part, the keys (-1 out of bounds), where delta's entries lie and
    which are in bounds; each [BLOCK_M, BLOCK_N].

    left (B, m, r), right (B, r, pitch), r a multiple of BLOCK_K and pitch of 16: else loads are 4
    bytes wide, and what holds their addresses spills on sm_80.
    """
    lane_m = tl.arange(0, BLOCK_M)
    lane_n = tl.arange(0, BLOCK_N)
    lane_k = tl.arange(0, BLOCK_K)
    m_in_bounds = (first_m + lane_m < m)[:, None]
    has_right = (first_n + lane_n < pitch)[None, :]
    n_in_bounds = (first_n + lane_n < n)[None, :]
    # 64-bit up to the tile, 32-bit inside it
    left_ptrs = left_ptr + (matrix * m + first_m) * r + (lane_m[:, None] * r + lane_k[None, :])
    right_ptrs = (
        right_ptr + matrix * r * pitch + first_n + (lane_k[:, None] * pitch + lane_n[None, :])
    )
    low = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, r, BLOCK_K):
        x = tl.load(left_ptrs, mask=m_in_bounds, other=0.0)
        y = tl.load(right_ptrs, mask=has_right, other=0.0)
        low = tl.dot(x, y, low, input_precision=PRECISION)
        left_ptrs += BLOCK_K
        right_ptrs += BLOCK_K * pitch
    in_bounds = m_in_bounds & n_in_bounds
    delta_ptr += (matrix * m + first_m) * n + first_n
    delta_ptrs = delta_ptr + (lane_m[:, None] * n + lane_n[None, :])
    delta = tl.load(delta_ptrs, mask=in_bounds, other=0.0)
    key = (delta - low).to(tl.int32, bitcast=True) & 0x7FFF_FFFF
    return delta, low, tl.where(in_bounds, key, -1), delta_ptrs, in_bounds


@triton.jit(do_not_specialize=["m", "low", "high"])
def _residual_histogram_kernel(
    delta_ptr, left_ptr, right_ptr, state_ptr, histogram_ptr, nan_ptr, m, n, pitch, r, low, high,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """histogram[matrix, d] += keys with digit d in bits low:high under the prefix of the matrix's
    state; nan[matrix] = 1 where a key of the first digit's pass is a NaN's.
    """
    matrix, tile_n, first_m, first_n = _open_tile(n, BLOCK_M, BLOCK_N)
    if tl.load(state_ptr + 3 * matrix + 1) > 0:  # 0: nothing to rank
        delta, low_part, key, delta_ptrs, in_bounds = _tile(
            delta_ptr, left_ptr, right_ptr, matrix, first_m, first_n, m, n, pitch, r,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        if low == 23:
            if tl.max(tl.max(key, 1), 0) > INFINITY:
                tl.store(nan_ptr + matrix, 1)
        prefix = tl.load(state_ptr + 3 * matrix).to(tl.int32) >> high
        # -1 out of bounds stays -1 when shifted, and no prefix is
        digit = tl.where((key >> high) == prefix, (key >> low) & ((1 << (high - low)) - 1), -1)
        digit = tl.reshape(digit, (BLOCK_M * BLOCK_N,))
        many = tl.sum((digit >= 0).to(tl.int32), 0)
        row_ptr = histogram_ptr + matrix * BINS
        if many > FEW:
            bins = tl.arange(0, BINS)
            counts = tl.histogram(tl.maximum(digit, 0), BINS, mask=digit >= 0)
            tl.atomic_add(row_ptr + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
        elif many > 0:
            one = (digit >= 0).to(tl.int64)
            tl.atomic_add(row_ptr + tl.maximum(digit, 0), one, mask=digit >= 0, sem="relaxed")


@triton.jit(do_not_specialize=["low"])
def _residual_digit_kernel(histogram_ptr, state_ptr, low):
    """Move each matrix's state = [prefix, entries still to find under it, keys under it] one digit
    down, and clear its histogram. One program per matrix.
    """
    matrix = tl.program_id(0).to(tl.int64)
    row_ptr = histogram_ptr + matrix * BINS
    bins = tl.arange(0, BINS)
    counts = tl.load(row_ptr + (BINS - 1 - bins))  # from the largest digit
    need = tl.load(state_ptr + 3 * matrix + 1)
    if need > 0:
        place = tl.sum((tl.cumsum(counts, 0) < need).to(tl.int64), 0)
        prefix = tl.load(state_ptr + 3 * matrix) | ((BINS - 1 - place) << low)
        above = tl.sum(tl.where(bins < place, counts, 0), 0)
        among = tl.sum(tl.where(bins == place, counts, 0), 0)
        tl.store(state_ptr + 3 * matrix, prefix)
        tl.store(state_ptr + 3 * matrix + 1, need - above)
        tl.store(state_ptr + 3 * matrix + 2, among)
    tl.store(row_ptr + bins, tl.zeros((BINS,), tl.int64))


@triton.jit(do_not_specialize=["m"])
def _residual_ties_kernel(
    delta_ptr, left_ptr, right_ptr, cut_ptr, ties_ptr, m, n, pitch, r,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ties[matrix, row, tile of columns] = keys equal to the cut; 0 where it keeps none of them."""
    matrix, tile_n, first_m, first_n = _open_tile(n, BLOCK_M, BLOCK_N)
    count = tl.zeros((BLOCK_M,), tl.int32)
    if tl.load(cut_ptr + 2 * matrix + 1) > 0:
        delta, low, key, delta_ptrs, in_bounds = _tile(
            delta_ptr, left_ptr, right_ptr, matrix, first_m, first_n, m, n, pitch, r,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        count = tl.sum((key == tl.load(cut_ptr + 2 * matrix).to(tl.int32)).to(tl.int32), 1)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    dst = ties_ptr + (matrix * m + offs_m) * tl.cdiv(n, BLOCK_N) + tile_n
    tl.store(dst, count, mask=offs_m < m)


@triton.jit(do_not_specialize=["m"])
def _residual_write_kernel(
    delta_ptr, left_ptr, right_ptr, cut_ptr, ties_ptr, before_ptr, m, n, pitch, r,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    TIES: tl.constexpr,
):  # fmt: skip
    """delta = low-rank part, but for keys above the matrix's cut and the first of those equal to
    it.

    `before` is the running sum of `ties`, its own row included; neither is read unless TIES.
    """
    matrix, tile_n, first_m, first_n = _open_tile(n, BLOCK_M, BLOCK_N)
    cut = tl.load(cut_ptr + 2 * matrix).to(tl.int32)
    if cut >= 0:  # below: everything stays
        delta, low, key, delta_ptrs, in_bounds = _tile(
            delta_ptr, left_ptr, right_ptr, matrix, first_m, first_n, m, n, pitch, r,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        replaced = key <= cut
        if TIES:
            room = tl.load(cut_ptr + 2 * matrix + 1)
            if room > 0:
                offs_m = first_m + tl.arange(0, BLOCK_M)
                at = (matrix * m + offs_m) * tl.cdiv(n, BLOCK_N) + tile_n
                here = tl.load(ties_ptr + at, mask=offs_m < m, other=0)
                before = tl.load(before_ptr + at, mask=offs_m < m, other=0) - here
                # how many of this row's ties are kept, then which: no 64-bit tile of ranks
                left = tl.minimum(tl.maximum(room - before, 0), BLOCK_N).to(tl.int32)
                tied = (key == cut).to(tl.int32)
                rank = tl.cumsum(tied, 1)
                replaced = replaced & ((tied == 0) | (rank > left[:, None]))
        # whole rows: the mask is no matter of the values, so that stores stay 16 bytes wide
        tl.store(delta_ptrs, tl.where(replaced, low, delta), mask=in_bounds)


def _read(
    kernel: Any,
    factored: tuple[Tensor, Tensor, Tensor],
    tables: Sequence[Tensor],
    digits: tuple[int, ...] = (),
    **meta: Any,
) -> None:
    """Launch a kernel over all tiles of all matrices, in the one shape that all passes share."""
    delta, left, right = factored
    count, m, n = delta.shape
    config = RESIDUAL
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    with device_guard(delta.device):
        kernel[(tiles, count)](
            delta, left, right, *tables, m, n, right.shape[2], right.shape[1], *digits,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            PRECISION=residual_precision(target_of(delta.device)),
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
            **meta,
        )  # fmt: skip


def _uploaded(rows: list[Any], device: torch.device) -> Tensor:
    """Return an int64 table on the device, not waited for."""
    table = torch.tensor(rows)
    if device.type == "cuda":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


def _cuts(delta: Tensor, left: Tensor, right: Tensor, keep: Sequence[int]) -> list[tuple[int, int]]:
    """Return (key, room) of each matrix: kept are keys above it, and the first ``room`` equal to
    it. Waits for the device.

    Raises:
        NotRankable: a NaN where entries are to be ranked.
    """
    count, numel = len(delta), delta[0].numel()
    ranked = [0 if k == numel else k for k in keep]
    state = _uploaded([[0, k, 0] for k in ranked], delta.device)
    histogram = empty(count * BINS.value, delta, torch.int64).zero_()
    nan = empty(count, delta, torch.int32).zero_()
    if any(ranked):
        for low, high in _DIGITS:
            tables = (state, histogram, nan)
            _read(_residual_histogram_kernel, (delta, left, right), tables, (low, high))
            with device_guard(delta.device):
                _residual_digit_kernel[(count,)](histogram, state, low, num_warps=4)
    cuts = []
    for i, (key, need, among, bad) in enumerate(
        torch.cat([state, nan[:, None].long()], 1).tolist()
    ):
        if bad:
            raise NotRankable(i)
        if not ranked[i]:
            cuts.append((_ALL if keep[i] else _NONE, 0))
        elif need == among:  # all ties are kept: as a rule there is one
            cuts.append((key - 1, 0))
        else:
            cuts.append((key, need))
    return cuts


def _padded(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors with zeros up to the sizes that the tiles want."""
    more = -right.shape[1] % RESIDUAL.block_k
    wider = -right.shape[2] % 16
    if more:
        left = torch.nn.functional.pad(left, (0, more))
    if more or wider:
        right = torch.nn.functional.pad(right, (0, wider, 0, more))
    return left.contiguous(), right.contiguous()


def launch_prune_residual(delta: Tensor, left: Tensor, right: Tensor, keep: Sequence[int]) -> None:
    """Replace every matrix by ``left @ right``, but for its ``keep`` entries that differ most from
    it; ties to the lowest flat index.

    Args:
        delta: (B, m, n) fp32, contiguous, B < 2**16, n <= MOST_COLUMNS; overwritten.
        left: (B, m, r) fp32.
        right: (B, r, n) fp32.
        keep: B counts, 0 to m * n.

    Raises:
        NotRankable: a NaN where entries are to be ranked; nothing is written then.
    """
    if not delta.numel():
        return
    left, right = _padded(left, right)
    cuts = _cuts(delta, left, right, keep)
    if all(cut == _ALL for cut, _ in cuts):
        return
    cut = _uploaded(cuts, delta.device)
    tied = any(room for _, room in cuts)
    ties = before = cut
    if tied:
        count, m, n = delta.shape
        ties = empty(count * m * triton.cdiv(n, RESIDUAL.block_n), delta, torch.int32)
        _read(_residual_ties_kernel, (delta, left, right), (cut, ties))
        before = ties.view(count, -1).cumsum(1)
    _read(_residual_write_kernel, (delta, left, right), (cut, ties, before), TIES=tied)
