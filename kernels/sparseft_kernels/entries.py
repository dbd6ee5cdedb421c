"""Entries of one weight: capture them, restore them bit for bit, write base + diff with one
rounding.

Each program owns BLOCK consecutive entries. Indices are unique, so every address has one writer: no
atomics, and the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft_kernels._configs import ENTRYWISE
from sparseft_kernels._launch import as_bits, empty, launch, round_to, triton_dtype

__all__ = ["launch_capture", "launch_restore", "launch_write_sum"]


@triton.jit
def _capture_kernel(weight_ptr, indices_ptr, saved_ptr, nnz, BLOCK: tl.constexpr):
    """saved[e] = weight[indices[e]], on integers."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    in_bounds = offs < nnz
    src = tl.load(indices_ptr + offs, mask=in_bounds, other=0).to(tl.int64)  # may pass 2**31
    bits = tl.load(weight_ptr + src, mask=in_bounds, other=0)
    tl.store(saved_ptr + offs, bits, mask=in_bounds)


@triton.jit
def _restore_kernel(indices_ptr, saved_ptr, weight_ptr, nnz, BLOCK: tl.constexpr):
    """weight[indices[e]] = saved[e], on integers."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    in_bounds = offs < nnz
    dst = tl.load(indices_ptr + offs, mask=in_bounds, other=0).to(tl.int64)
    bits = tl.load(saved_ptr + offs, mask=in_bounds, other=0)
    tl.store(weight_ptr + dst, bits, mask=in_bounds)


@triton.jit
def _write_sum_kernel(
    indices_ptr, base_ptr, values_ptr, weight_ptr, nnz,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """weight[indices[e]] = rn(base[e] + values[e]); the sum is taken in WIDE."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    in_bounds = offs < nnz
    dst = tl.load(indices_ptr + offs, mask=in_bounds, other=0).to(tl.int64)
    # widened right after the load: the interpreter would add bf16 bit patterns as integers
    base = tl.load(base_ptr + offs, mask=in_bounds, other=0.0).to(WIDE)
    values = tl.load(values_ptr + offs, mask=in_bounds, other=0.0).to(WIDE)
    tl.store(weight_ptr + dst, round_to(base + values, DTYPE), mask=in_bounds)


def launch_capture(weight: Tensor, indices: Tensor) -> Tensor:
    """Return (nnz,) in the weight's dtype: entries of a contiguous weight at flat ``indices``."""
    saved = empty(indices.numel(), weight)
    launch(
        _capture_kernel, indices.numel(), weight.device,
        as_bits(weight), indices, as_bits(saved), **ENTRYWISE._asdict(),
    )  # fmt: skip
    return saved


def launch_restore(weight: Tensor, indices: Tensor, saved: Tensor) -> None:
    """Overwrite entries of a contiguous ``weight`` with ``saved`` (nnz,), same dtype, in place."""
    launch(
        _restore_kernel, indices.numel(), weight.device,
        indices, as_bits(saved), as_bits(weight), **ENTRYWISE._asdict(),
    )  # fmt: skip


def launch_write_sum(weight: Tensor, indices: Tensor, base: Tensor, values: Tensor) -> None:
    """Overwrite entries of a contiguous ``weight`` with ``base + values`` (nnz,), in place.

    The sum is taken in fp32, in fp64 when either operand is fp64, and rounded once.
    """
    double = torch.float64 in (base.dtype, values.dtype)
    launch(
        _write_sum_kernel, indices.numel(), weight.device,
        indices, base, values, weight,
        WIDE=tl.float64 if double else tl.float32, DTYPE=triton_dtype(weight.dtype),
        **ENTRYWISE._asdict(),
    )  # fmt: skip
