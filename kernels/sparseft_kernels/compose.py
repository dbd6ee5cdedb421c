"""Compositions over all tensors of one dtype in one launch: capture, restore, write the sum.

The tensors' union entries lie end to end, each tensor padded to whole blocks (index -1 on pads), so
that a block serves one tensor and loads its entries without a mask; a table of int64 pointers says
where the weights lie. A union entry has `count` consecutive values, in canonical order of their
adapters. Each entry has one writer and its sum one order: no atomics, the same bits every time.

Bytes per union entry, bf16 weights and values, two adapters without overlap: indices 4, count 1,
value 2, ordinal 1, base 2, and the scattered 2-byte read and write of W: 32 to 64 B of sectors.
(Counted, not measured on a GPU.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft_kernels._configs import COMPOSE, GATHER_REDUCE, MULTI_TENSOR
from sparseft_kernels._launch import (
    as_bits,
    empty,
    launch,
    on_device,
    quotient,
    round_to,
    triton_dtype,
)

__all__ = [
    "BLOCK",
    "launch_capture_many",
    "launch_compose",
    "launch_compose_grad",
    "launch_restore_many",
]

BLOCK = COMPOSE.block


@triton.jit
def _weight_of(weights_ptr, block_tensor_ptr, pid, DTYPE: tl.constexpr):
    t = tl.load(block_tensor_ptr + pid).to(tl.int64)
    return tl.load(weights_ptr + t).to(tl.pointer_type(DTYPE))


@triton.jit
def _capture_many_kernel(
    weights_ptr, block_tensor_ptr, indices_ptr, saved_ptr, entries,
    BLOCK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """saved[e] = weight[indices[e]], on integers; 0 on pads."""
    pid = tl.program_id(0).to(tl.int64)
    weight_ptr = _weight_of(weights_ptr, block_tensor_ptr, pid, BITS)
    offs = pid * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    src = tl.load(indices_ptr + offs).to(tl.int64)
    tl.store(saved_ptr + offs, tl.load(weight_ptr + src, mask=src >= 0, other=0))


@triton.jit
def _restore_many_kernel(
    weights_ptr, block_tensor_ptr, indices_ptr, saved_ptr, entries,
    BLOCK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """weight[indices[e]] = saved[e], on integers."""
    pid = tl.program_id(0).to(tl.int64)
    weight_ptr = _weight_of(weights_ptr, block_tensor_ptr, pid, BITS)
    offs = pid * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    dst = tl.load(indices_ptr + offs).to(tl.int64)
    tl.store(weight_ptr + dst, tl.load(saved_ptr + offs), mask=dst >= 0)


@triton.jit
def _nothing(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """-0.0, which leaves whatever it is added to as it is; `tl.full` would make +0.0 of it."""
    if WIDE == tl.float64:
        return (tl.zeros((BLOCK,), tl.int64) + -9223372036854775808).to(WIDE, bitcast=True)
    else:
        return (tl.zeros((BLOCK,), tl.int32) + -2147483648).to(WIDE, bitcast=True)


@triton.jit
def _weighted(values_ptr, ordinals_ptr, coeffs_ptr, entry, there, WIDE: tl.constexpr):
    """One adapter's product at each entry, its coefficient, and whether it takes part."""
    # widened right after the load: the interpreter computes on bf16 bit patterns
    value = tl.load(values_ptr + entry, mask=there, other=0.0).to(WIDE)
    adapter = tl.load(ordinals_ptr + entry, mask=there, other=0).to(tl.int32)
    coeff = tl.load(coeffs_ptr + adapter, mask=there, other=0.0).to(WIDE)
    return value * coeff, coeff, there & (coeff != 0.0)


@triton.jit
def _sum(
    values_ptr, ordinals_ptr, coeffs_ptr, first, count, most,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    total = _nothing(BLOCK, WIDE)
    for j in range(0, most):
        own, _, used = _weighted(values_ptr, ordinals_ptr, coeffs_ptr, first + j, j < count, WIDE)
        total = tl.where(used, total + own, total)
    return total


@triton.jit
def _elect(
    values_ptr, ordinals_ptr, coeffs_ptr, first, count, most,
    VOTE: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    ballot = tl.zeros((BLOCK,), WIDE)
    for j in range(0, most):
        own, _, used = _weighted(values_ptr, ordinals_ptr, coeffs_ptr, first + j, j < count, WIDE)
        if VOTE == "count":
            sign = tl.where(own > 0.0, 1.0, 0.0) - tl.where(own < 0.0, 1.0, 0.0)
            ballot += tl.where(used, sign, 0.0).to(WIDE)
        else:
            ballot = tl.where(used, ballot + own, ballot)
    chosen = _nothing(BLOCK, WIDE)
    divisor = tl.zeros((BLOCK,), WIDE)
    for j in range(0, most):  # the values lie in L1 by now
        own, coeff, used = _weighted(
            values_ptr, ordinals_ptr, coeffs_ptr, first + j, j < count, WIDE
        )
        agrees = used & (((own > 0.0) & (ballot > 0.0)) | ((own < 0.0) & (ballot < 0.0)))
        chosen = tl.where(agrees, chosen + own, chosen)
        if MEAN == "count":
            divisor += tl.where(agrees, 1.0, 0.0).to(WIDE)
        elif MEAN == "weights":
            divisor = tl.where(agrees, divisor + tl.abs(coeff), divisor)
    if MEAN == "none":
        return chosen
    else:
        divisor = tl.where(divisor == 0.0, 1.0, divisor).to(WIDE)
        return quotient(chosen, divisor)


@triton.jit
def _largest(
    values_ptr, ordinals_ptr, coeffs_ptr, first, count, most,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    best = _nothing(BLOCK, WIDE)
    magnitude = tl.zeros((BLOCK,), WIDE) - 1.0
    for j in range(0, most):
        own, _, used = _weighted(values_ptr, ordinals_ptr, coeffs_ptr, first + j, j < count, WIDE)
        larger = used & (tl.abs(own) > magnitude)
        best = tl.where(larger, own, best)
        magnitude = tl.where(larger, tl.abs(own), magnitude)
    return best


@triton.jit
def _consensus(
    values_ptr, ordinals_ptr, coeffs_ptr, first, count, most, least, strength,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    total = _sum(values_ptr, ordinals_ptr, coeffs_ptr, first, count, most, BLOCK, WIDE)
    agreeing = tl.zeros((BLOCK,), tl.int32)
    for j in range(0, most):
        own, _, used = _weighted(values_ptr, ordinals_ptr, coeffs_ptr, first + j, j < count, WIDE)
        agrees = used & (tl.abs(own) >= tl.abs(total - own) * strength)
        agreeing += agrees.to(tl.int32)
    return tl.where(agreeing >= least, total, _nothing(BLOCK, WIDE))


@triton.jit
def _compose_kernel(
    weights_ptr, block_tensor_ptr, block_entry_ptr, indices_ptr, counts_ptr,
    values_ptr, ordinals_ptr, coeffs_ptr, base_ptr, saved_ptr, state_ptr, entries,
    least, strength_ptr,
    BLOCK: tl.constexpr, KIND: tl.constexpr, VOTE: tl.constexpr, MEAN: tl.constexpr,
    CAPTURE: tl.constexpr, WIDE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """weight[indices[e]] = rn(base[e] + combined[e]); with CAPTURE the base is read from the weight
    and saved.

    state: [started, overflowed]; every program that stores there stores 1.
    """
    pid = tl.program_id(0).to(tl.int64)
    weight_ptr = _weight_of(weights_ptr, block_tensor_ptr, pid, DTYPE)
    offs = pid * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    at = tl.load(indices_ptr + offs)
    inside = at >= 0
    if CAPTURE:
        found = tl.load(weight_ptr + at.to(tl.int64), mask=inside, other=0.0)
        tl.store(saved_ptr + offs, found)
        base = found.to(WIDE)
    else:
        base = tl.load(base_ptr + offs).to(WIDE)
    count = tl.load(counts_ptr + offs).to(tl.int32)  # 0 on pads
    # within the block 32 bits do: four wide positions a thread would cost eight registers
    first = tl.cumsum(count, 0) - count
    entry = tl.load(block_entry_ptr + pid)
    values_ptr += entry
    ordinals_ptr += entry
    most = tl.max(count, 0)  # blocks where little overlaps stop early
    if KIND == "elect":
        total = _elect(
            values_ptr, ordinals_ptr, coeffs_ptr, first, count, most, VOTE, MEAN, BLOCK, WIDE
        )
    elif KIND == "largest":
        total = _largest(values_ptr, ordinals_ptr, coeffs_ptr, first, count, most, BLOCK, WIDE)
    elif KIND == "consensus":
        strength = tl.load(strength_ptr).to(WIDE)
        total = _consensus(
            values_ptr, ordinals_ptr, coeffs_ptr, first, count, most, least, strength, BLOCK, WIDE
        )
    else:
        total = _sum(values_ptr, ordinals_ptr, coeffs_ptr, first, count, most, BLOCK, WIDE)
    written = round_to(base + total, DTYPE)
    tl.store(weight_ptr + at.to(tl.int64), written, mask=inside)
    tl.store(state_ptr, 1)
    # x - x is 0 for finite x only
    wide = written.to(WIDE)
    lost = inside & (wide - wide != 0.0) & (base - base == 0.0)
    if tl.max(lost.to(tl.int32), 0) > 0:
        tl.store(state_ptr + 1, 1)


@triton.jit
def _compose_grad_kernel(
    grad_ptr, indices_ptr, positions_ptr, values_ptr, ordinals_ptr, coeffs_ptr,
    grad_values_ptr, parts_ptr, entries, adapters,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """grad_values[e] = coeff * grad[index of e]; parts[block, i] = this block's share of the
    gradient of coefficient i.
    """
    pid = tl.program_id(0).to(tl.int64)
    offs = pid * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    in_bounds = offs < entries
    at = tl.load(positions_ptr + offs, mask=in_bounds, other=0).to(tl.int64)
    src = tl.load(indices_ptr + at, mask=in_bounds, other=0).to(tl.int64)
    grad = tl.load(grad_ptr + src, mask=in_bounds, other=0.0).to(WIDE)
    value = tl.load(values_ptr + offs, mask=in_bounds, other=0.0).to(WIDE)
    adapter = tl.load(ordinals_ptr + offs, mask=in_bounds, other=0).to(tl.int32)
    coeff = tl.load(coeffs_ptr + adapter, mask=in_bounds, other=0.0).to(WIDE)
    tl.store(grad_values_ptr + offs, round_to(coeff * grad, VALUE), mask=in_bounds)
    share = grad * value
    for i in range(0, adapters):
        own = tl.sum(tl.where(in_bounds & (adapter == i), share, 0.0), 0)
        tl.store(parts_ptr + pid * adapters + i, own)


def _pointers(weights: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return (tensors,) int64 on the device: where each weight begins."""
    found = tuple(w.data_ptr() for w in weights)
    return on_device(("weights", found), lambda: torch.tensor(found, dtype=torch.int64), device)


def launch_capture_many(
    weights: Sequence[Tensor], indices: Tensor, block_tensor: Tensor, saved: Tensor
) -> None:
    """Copy entries of contiguous weights of one dtype into ``saved`` (P,), bit for bit.

    Args:
        weights: the tensors that ``block_tensor`` counts.
        indices: (P,) flat in each tensor, -1 on pads; P a multiple of BLOCK.
        block_tensor: (P / BLOCK,) int32.
        saved: (P,) in the weights' dtype; 0 on pads.
    """
    launch(
        _capture_many_kernel, indices.numel(), indices.device,
        _pointers(weights, indices.device), block_tensor, indices, as_bits(saved),
        BITS=_bits_of(saved), **MULTI_TENSOR._asdict(),
    )  # fmt: skip


def launch_restore_many(
    weights: Sequence[Tensor], indices: Tensor, block_tensor: Tensor, saved: Tensor
) -> None:
    """Overwrite entries of contiguous weights with ``saved``; arguments as in the capture."""
    launch(
        _restore_many_kernel, indices.numel(), indices.device,
        _pointers(weights, indices.device), block_tensor, indices, as_bits(saved),
        BITS=_bits_of(saved), **MULTI_TENSOR._asdict(),
    )  # fmt: skip


def _bits_of(x: Tensor) -> tl.dtype:
    return {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}[x.element_size()]


def launch_compose(
    weights: Sequence[Tensor],
    indices: Tensor,
    counts: Tensor,
    values: Tensor,
    ordinals: Tensor,
    block_tensor: Tensor,
    block_entry: Tensor,
    base: Tensor | None,
    saved: Tensor,
    coeffs: Sequence[float] | Tensor,
    state: Tensor,
    *,
    kind: str,
    vote: str,
    mean: str,
    least: int,
    strength: float,
) -> None:
    """Write ``rn(base + combined values)`` over the union's entries of all weights, in one launch.

    Args:
        weights, indices, block_tensor: as in `launch_capture_many`.
        counts: (P,) uint8 or int16, values at each union entry; 0 on pads.
        values: (E,) by union entry and, in it, in canonical order.
        ordinals: (E,) uint8 or int16, the adapter of each value.
        block_entry: (P / BLOCK,) int64, the first value of each block.
        base: (P,) entries to add to; None: those of the weights, which ``saved`` then gets.
        saved: (P,) in the weights' dtype.
        coeffs: by ordinal, as numbers or on the device; 0 leaves an adapter out.
        state: (2,) int32: [0] becomes 1 when the launch runs, [1] when a finite base met a sum that
            the dtype cannot hold.
        kind, vote, mean, least, strength: the rule.
    """
    device, dtype = indices.device, saved.dtype
    double = torch.float64 in (dtype, values.dtype, saved.dtype if base is None else base.dtype)
    wide = torch.float64 if double else torch.float32
    if isinstance(coeffs, Tensor):
        table = coeffs.to(wide)
    else:
        chosen = tuple(coeffs)
        table = on_device(
            ("coeffs", wide, chosen), lambda: torch.tensor(chosen, dtype=wide), device
        )
    bound = on_device(
        ("strength", wide, strength), lambda: torch.tensor([strength], dtype=wide), device
    )
    launch(
        _compose_kernel, indices.numel(), device,
        _pointers(weights, device), block_tensor, block_entry, indices, counts, values, ordinals,
        table, saved if base is None else base, saved, state,
        least=least, strength_ptr=bound,
        KIND=kind, VOTE=vote, MEAN=mean, CAPTURE=base is None,
        WIDE=tl.float64 if double else tl.float32, DTYPE=triton_dtype(dtype), **COMPOSE._asdict(),
    )  # fmt: skip


def launch_compose_grad(
    grad: Tensor,
    indices: Tensor,
    positions: Tensor,
    values: Tensor,
    ordinals: Tensor,
    coeffs: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of one tensor's values and coefficients.

    Args:
        grad: contiguous gradient of the composed weight.
        indices: (U,) flat positions of the union.
        positions, values, ordinals: (E,) place in the union, value and adapter of each entry.
        coeffs: (adapters,).

    Returns:
        (E,) in the values' dtype; (adapters,) fp32, or fp64 if anything is. The blocks' shares are
        added up in a fixed order.
    """
    double = torch.float64 in (grad.dtype, values.dtype, coeffs.dtype)
    wide = torch.float64 if double else torch.float32
    blocks = triton.cdiv(values.numel(), GATHER_REDUCE.block)
    grad_values = empty(values.numel(), values)
    parts = empty(blocks * coeffs.numel(), grad, wide)
    launch(
        _compose_grad_kernel, values.numel(), grad.device,
        grad, indices, positions, values, ordinals, coeffs, grad_values, parts,
        adapters=coeffs.numel(), WIDE=tl.float64 if double else tl.float32,
        VALUE=triton_dtype(values.dtype), **GATHER_REDUCE._asdict(),
    )  # fmt: skip
    return grad_values, parts.view(blocks, coeffs.numel()).sum(0)
