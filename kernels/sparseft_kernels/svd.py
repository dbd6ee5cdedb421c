"""What surrounds the matrix products of a batched truncated SVD: differences, the random signs, and
the inverse Cholesky factors of small Grams. The products themselves are cuBLAS's.

Difference: one read of both operands and one write of the wide result, transposed on the way where
the output is. torch takes a cast, a cast and a subtraction, through memory each time.

Signs: bit j % 32 of the Philox word of (seed, row, j // 32), the host's to the bit. Stored once for
all matrices of a batch: it is a hundredth of one, and drawing it again inside every product would
cost more arithmetic than the reads that it saves.

Cholesky: one program holds a matrix in registers, factorises it right-looking and forms the inverse
of the factor beside it, so that a CholeskyQR pass is two batched products and one launch that
nobody waits for.

Nothing here was timed on a GPU. Differences and signs are the default there by what they move: 8
bytes an entry of a bf16 difference against torch's 16 or more; signs in one launch, against some 60
over int64 words. The Cholesky kernel is no default: see `sparseft.ops.cholesky_inverse`. The
benchmark suite holds each against torch (`benchmarks/run.py suite --only 'svd/*'`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft_kernels._configs import DIFFERENCE, SKETCH, cholesky_warps
from sparseft_kernels._launch import device_guard, empty, triton_dtype

__all__ = ["MOST_COLUMNS", "launch_cholesky_inverse", "launch_difference", "launch_sign_sketch"]

# Two fp32 matrices of 128 x 128 are 128 registers a thread of 8 warps.
MOST_COLUMNS = 128


# Sizes are specialised: with a bound that is no known multiple of 16 masked loads are narrow.
@triton.jit
def _difference_kernel(
    theta1_ptr, theta0_ptr, out_ptr, m, n,
    stride_1m, stride_1n, stride_0m, stride_0n, stride_om, stride_on,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, SUBTRACT: tl.constexpr,
):  # fmt: skip
    """out[i, j] = theta1[i, j] - theta0[i, j], or theta1[i, j], in WIDE and rounded once; strides
    of each as they are.
    """
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    in_bounds = (offs_m < m)[:, None] & (offs_n < n)[None, :]
    i = offs_m.to(tl.int64)[:, None]
    j = offs_n.to(tl.int64)[None, :]
    x = tl.load(theta1_ptr + i * stride_1m + j * stride_1n, mask=in_bounds, other=0.0).to(WIDE)
    if SUBTRACT:
        y = tl.load(theta0_ptr + i * stride_0m + j * stride_0n, mask=in_bounds, other=0.0)
        x = x - y.to(WIDE)
    x = x.to(out_ptr.dtype.element_ty)  # wide to fp64 or fp32: the interpreter rounds it, too
    tl.store(out_ptr + i * stride_om + j * stride_on, x, mask=in_bounds)


@triton.jit(do_not_specialize=["seed", "rows", "first", "width"])
def _sign_sketch_kernel(
    out_ptr, seed, rows, first, width,
    BLOCK: tl.constexpr, TENSOR: tl.constexpr, STEP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """out[i, j] = +-1 for column first + j, from the words of Philox at (i, column // 32)."""
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    word_index = first // 32 + tl.program_id(1)
    low = offs_m.to(tl.uint32)
    high = low * 0 + word_index.to(tl.uint32)
    tensor = low * 0 + TENSOR
    step = low * 0 + STEP
    word, _, _, _ = tl.philox(seed, low, high, tensor, step, n_rounds=7)
    bit = tl.arange(0, 32)  # [32]
    sign = ((word.to(tl.int32, bitcast=True)[:, None] >> bit[None, :]) & 1) * 2 - 1
    column = word_index * 32 + bit - first
    in_bounds = (offs_m < rows)[:, None] & ((column >= 0) & (column < width))[None, :]
    dst = out_ptr + (offs_m.to(tl.int64) * width)[:, None] + column[None, :]
    tl.store(dst, sign.to(tl.float32).to(DTYPE), mask=in_bounds)


@triton.jit
def _cholesky_inverse_kernel(
    gram_ptr, shift_ptr, inverse_ptr, failed_ptr,
    R: tl.constexpr, PITCH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """inverse = L^-1 of gram + shift I = L L^T, and how many pivots were no positive number; one
    program per matrix of R columns in PITCH, a multiple of 4 so that rows are read 16 bytes wide:
    else as many addresses as entries are held throughout, and spill.
    """
    matrix = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, PADDED)  # [PADDED]
    i = lane[:, None]
    j = lane[None, :]
    in_bounds = (i < PITCH) & (j < PITCH)
    place = i * PITCH + j
    shift = tl.load(shift_ptr + matrix)
    rest = tl.load(gram_ptr + matrix * PITCH * PITCH + place, mask=in_bounds, other=0.0)
    rest = tl.where(i == j, rest + shift, rest)
    inverse = tl.where(i == j, 1.0, 0.0)
    failed = 0
    for k in range(R):
        column = tl.sum(tl.where(j == k, rest, 0.0), 1)
        pivot = tl.sum(tl.where(lane == k, column, 0.0), 0)
        good = pivot > 0.0  # no NaN is
        failed += tl.where(good, 0, 1)
        root = tl.sqrt(tl.where(good, pivot, 1.0))
        # A failed column adds nothing to the others: finite numbers come out, and the count.
        below = tl.where(lane > k, tl.where(good, column / root, 0.0), 0.0)
        rest -= below[:, None] * below[None, :]
        row = tl.sum(tl.where(i == k, inverse, 0.0), 0) / root
        inverse = tl.where(i == k, row[None, :], inverse - below[:, None] * row[None, :])
    tl.store(inverse_ptr + matrix * PITCH * PITCH + place, inverse, mask=in_bounds)
    tl.store(failed_ptr + matrix, failed)


def launch_difference(
    out: Tensor, theta1: Tensor, theta0: Tensor | None, wide: torch.dtype
) -> None:
    """Write ``theta1 - theta0``, or ``theta1``, into ``out``.

    Args:
        out: (m, n) fp32 or fp64, any strides without overlap.
        theta1: (m, n) floating, any strides, on the same device.
        theta0: the same, or None.
        wide: dtype of the subtraction.
    """
    m, n = out.shape
    if not out.numel():
        return
    other = theta1 if theta0 is None else theta0
    # Rows on the grid's first axis, which has no limit of 65535.
    if n > m:
        out, theta1, other, m, n = out.mT, theta1.mT, other.mT, n, m
    block = DIFFERENCE.block
    with device_guard(out.device):
        _difference_kernel[(triton.cdiv(m, block), triton.cdiv(n, block))](
            theta1, other, out, m, n,
            *theta1.stride(), *other.stride(), *out.stride(),
            BLOCK=block, WIDE=triton_dtype(wide), SUBTRACT=theta0 is not None,
            num_warps=DIFFERENCE.num_warps, enable_fp_fusion=False,
        )  # fmt: skip


def launch_sign_sketch(out: Tensor, columns: range, seed: int, *, tensor: int, step: int) -> None:
    """Write columns of the sign matrix of a seed into ``out``, (rows, len(columns)) contiguous.

    Args:
        out: fp64, fp32, bf16 or fp16.
        columns: consecutive.
        seed: below 2**64.
        tensor, step: the upper half of Philox's counter.
    """
    rows, width = out.shape
    if not out.numel():
        return
    words = (columns.stop - 1) // 32 - columns.start // 32 + 1
    with device_guard(out.device):
        _sign_sketch_kernel[(triton.cdiv(rows, SKETCH.block), words)](
            out, seed, rows, columns.start, width,
            BLOCK=SKETCH.block, TENSOR=tensor, STEP=step, DTYPE=triton_dtype(out.dtype),
            num_warps=SKETCH.num_warps,
        )  # fmt: skip


def launch_cholesky_inverse(gram: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``L^-1`` with ``gram + shift I = L L^T``, and how many pivots of each were no positive
    number: then it is not the inverse of anything.

    Args:
        gram: (B, r, r) fp32, contiguous, symmetric, 1 <= r <= 128.
        shift: (B,) fp32.

    Returns:
        (B, r, r) fp32 lower triangular, strided where r is no multiple of 4; (B,) int32.
    """
    count, r, _ = gram.shape
    pitch = -(-r // 4) * 4
    if pitch > r:
        gram = torch.nn.functional.pad(gram, (0, pitch - r, 0, pitch - r))
    inverse = empty(gram.numel(), gram).view(gram.shape)
    failed = empty(count, gram, torch.int32)
    if gram.numel():
        padded = max(16, triton.next_power_of_2(r))
        with device_guard(gram.device):
            _cholesky_inverse_kernel[(count,)](
                gram, shift, inverse, failed,
                R=r, PITCH=pitch, PADDED=padded, num_warps=cholesky_warps(padded),
            )  # fmt: skip
    return inverse[:, :r, :r], failed
