"""One optimizer step over all tensors of an optimizer: values, moments and weights in one pass.

Leaves stay independent parameters: a table of int64 pointers, one row per tensor, says where their
vectors lie, and a block knows its tensor. `_rates_kernel` (one row per tensor) counts the steps and
turns hyper-parameters into factors, so that neither needs the host; then `_step_kernel` runs once
per weight dtype. W is written, never read. Each entry has one writer: no atomics, and the same bits
for any packing of the tensors.

Bytes per entry, AdamW on bf16 weights: 38 streamed and about 60 for the scattered 2-byte write at
1 % density (a 32-byte sector filled and written back each): bound by memory, so divisions and roots
are the correctly rounded ones. (Counted, not measured on a GPU.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft_kernels._configs import OPTIMIZER
from sparseft_kernels._launch import (
    empty,
    launch,
    on_device,
    quotient,
    round_to,
    spread,
    triton_dtype,
)

__all__ = ["HYPER", "QUANTUM", "launch_step"]

# What a group's row of hyper-parameters holds. a, b: AdamW's and Lion's betas, SGD's momentum and
# dampening.
HYPER = ("lr", "weight_decay", "a", "b", "eps", "nesterov")
# Entries that share one scale of 8-bit moments.
QUANTUM = 256

# Columns of the tensor table.
_VALUES = tl.constexpr(0)
_GRAD = tl.constexpr(1)
_FIRST = tl.constexpr(2)
_SECOND = tl.constexpr(3)
_FIRST_SCALE = tl.constexpr(4)
_SECOND_SCALE = tl.constexpr(5)
_WEIGHT = tl.constexpr(6)
_BASE = tl.constexpr(7)
_INDICES = tl.constexpr(8)
_STEP = tl.constexpr(9)
_NUMEL = tl.constexpr(10)
_FIRST_BLOCK = tl.constexpr(11)
_GROUP = tl.constexpr(12)
_ID = tl.constexpr(13)
_SEED = tl.constexpr(14)
_COLUMNS = tl.constexpr(15)
_POINTERS = 10

# Columns of the rates, one row per tensor.
_SKIP = tl.constexpr(0)
_SCALE = tl.constexpr(1)
_DECAY = tl.constexpr(2)
_A = tl.constexpr(3)
_B = tl.constexpr(4)
_B_REST = tl.constexpr(5)
_EPS = tl.constexpr(6)
_SIZE = tl.constexpr(7)
_ROOT = tl.constexpr(8)
_COUNT = tl.constexpr(9)
_RATES = tl.constexpr(10)

_HYPER_COLUMNS = tl.constexpr(8)  # HYPER and the logarithms of a and b
_QUANTUM = tl.constexpr(QUANTUM)


@triton.jit
def _rates_kernel(
    table_ptr, hyper_ptr, grad_scale_ptr, found_inf_ptr, rates_ptr, tensors,
    BLOCK: tl.constexpr, RULE: tl.constexpr, SCALED: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Count each tensor's step unless inf was found, and write its row of rates.

    In fp64: fp32 leaves 1 - 0.999 and 1 - 0.999**t with errors of 1e-5.
    """
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    in_bounds = t < tensors
    row = table_ptr + t * _COLUMNS
    group = tl.load(row + _GROUP, mask=in_bounds, other=0)
    hyper = hyper_ptr + group * _HYPER_COLUMNS
    lr = tl.load(hyper, mask=in_bounds, other=0.0)
    decay = tl.load(hyper + 1, mask=in_bounds, other=0.0)
    a = tl.load(hyper + 2, mask=in_bounds, other=0.0)
    b = tl.load(hyper + 3, mask=in_bounds, other=0.0)
    step_ptr = tl.load(row + _STEP, mask=in_bounds, other=0).to(tl.pointer_type(tl.float32))
    before = tl.load(step_ptr, mask=in_bounds, other=0.0)
    skip = 0.0
    if CHECKED:
        skip = tl.load(found_inf_ptr).to(tl.float32)
    step = before + tl.where(skip == 0.0, 1.0, 0.0)
    tl.store(step_ptr, step, mask=in_bounds)
    scale = 1.0
    if SCALED:
        scale = tl.load(grad_scale_ptr).to(tl.float32)
    count = step.to(tl.float64)
    out = rates_ptr + t * _RATES
    zero = count * 0.0
    tl.store(out + _SKIP, zero + skip, mask=in_bounds)
    tl.store(out + _SCALE, zero + scale, mask=in_bounds)
    tl.store(out + _COUNT, count, mask=in_bounds)
    tl.store(out + _B, b, mask=in_bounds)
    tl.store(out + _B_REST, 1.0 - b, mask=in_bounds)
    if RULE == "sgd":
        nesterov = tl.load(hyper + 5, mask=in_bounds, other=0.0)
        tl.store(out + _DECAY, decay, mask=in_bounds)
        tl.store(out + _A, a, mask=in_bounds)
        tl.store(out + _EPS, nesterov, mask=in_bounds)
        tl.store(out + _SIZE, lr, mask=in_bounds)
        # the buffer starts as the first gradient
        tl.store(out + _ROOT, tl.where(before == 0.0, 1.0, 0.0), mask=in_bounds)
    else:
        tl.store(out + _DECAY, 1.0 - lr * decay, mask=in_bounds)
        tl.store(out + _A, 1.0 - a, mask=in_bounds)
        if RULE == "adamw":
            eps = tl.load(hyper + 4, mask=in_bounds, other=0.0)
            log_a = tl.load(hyper + 6, mask=in_bounds, other=0.0)
            log_b = tl.load(hyper + 7, mask=in_bounds, other=0.0)
            count = tl.maximum(count, 1.0)  # 0 only where the step is skipped
            tl.store(out + _EPS, eps, mask=in_bounds)
            tl.store(out + _SIZE, lr / (1.0 - tl.exp(count * log_a)), mask=in_bounds)
            tl.store(out + _ROOT, tl.sqrt(1.0 - tl.exp(count * log_b)), mask=in_bounds)
        else:
            tl.store(out + _SIZE, lr, mask=in_bounds)


@triton.jit
def _pointer(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    ptr = tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def _load(ptr, offs, numel, MASKED: tl.constexpr):
    # A whole block loads without a mask: one that depends on data would undo the 128-bit loads.
    if MASKED:
        return tl.load(ptr + offs, mask=offs < numel, other=0)
    else:
        return tl.load(ptr + offs)


@triton.jit
def _store(ptr, offs, x, numel, MASKED: tl.constexpr):
    if MASKED:
        tl.store(ptr + offs, x, mask=offs < numel)
    else:
        tl.store(ptr + offs, x)


@triton.jit
def _root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _scale_mask(start, numel, BLOCK: tl.constexpr):
    at = start // _QUANTUM + tl.arange(0, BLOCK // _QUANTUM)  # [BLOCK // QUANTUM]
    return at, at * _QUANTUM < numel


@triton.jit
def _decode(codes, scale_ptr, start, numel, BLOCK: tl.constexpr, SIGNED: tl.constexpr):
    """The 8-bit moments of one block, fp32; see `sparseft.ops._moments` for the map."""
    at, in_bounds = _scale_mask(start, numel, BLOCK)
    scale = tl.load(scale_ptr + at, mask=in_bounds, other=0.0)
    c = tl.reshape(codes, (BLOCK // _QUANTUM, _QUANTUM)).to(tl.float32)
    if SIGNED:
        x = (c * tl.abs(c)) * tl.div_rn(scale, 16129.0)[:, None]
    else:
        c = c * c
        x = (c * c) * tl.div_rn(scale, 4228250625.0)[:, None]
    return tl.reshape(x, (BLOCK,))


@triton.jit
def _encode(x, scale_ptr, start, numel, BLOCK: tl.constexpr, SIGNED: tl.constexpr):
    """Store the scales of one block of moments and return its codes."""
    at, in_bounds = _scale_mask(start, numel, BLOCK)
    x = tl.reshape(x.to(tl.float32), (BLOCK // _QUANTUM, _QUANTUM))
    scale = tl.max(tl.abs(x), axis=1)
    tl.store(scale_ptr + at, scale, mask=in_bounds)
    divisor = tl.where(scale == 0.0, 1.0, scale)[:, None]
    root = tl.sqrt_rn(tl.div_rn(tl.abs(x), tl.broadcast_to(divisor, x.shape)))
    if SIGNED:
        c = tl.floor(root * 127.0 + 0.5).to(tl.int32)
        codes = tl.where(x < 0.0, -c, c).to(tl.int8)
    else:
        c = tl.floor(tl.sqrt_rn(root) * 255.0 + 0.5).to(tl.int32)
        # never down to zero: the step would be divided by eps
        codes = tl.where((x > 0.0) & (c == 0), 1, c).to(tl.uint8)
    return tl.reshape(codes, (BLOCK,))


@triton.jit
def _round_stochastically(x, dst, row, step, DTYPE: tl.constexpr):
    """Round fp32 to one of its two neighbours in DTYPE, the nearer the likelier.

    Philox, keyed by seed, tensor, flat index and step: packing does not matter.
    """
    low = dst.to(tl.uint32)
    high = (dst >> 32).to(tl.uint32)
    tensor = low * 0 + tl.load(row + _ID).to(tl.uint32)
    count = low * 0 + step.to(tl.int64).to(tl.uint32)
    word, _, _, _ = tl.philox(tl.load(row + _SEED), low, high, tensor, count, n_rounds=7)
    word = word.to(tl.int32, bitcast=True)
    bits = x.to(tl.int32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    if DTYPE == tl.bfloat16:
        bits = tl.where(finite, (bits + (word & 0xFFFF)) & -65536, bits)
        # its upper half as it is: the interpreter converts subnormals wrongly (Triton 3.6, 3.9)
        return (bits >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        bits = tl.where(finite, (bits + (word & 0x1FFF)) & -8192, bits)
        # below fp16's normal range in units of 2**-38, 14 bits of which are dropped
        size = tl.abs(x)
        small = tl.where(size < 6.103515625e-05, size, 0.0) * 274877906944.0
        units = ((small.to(tl.int32) + (word & 0x3FFF)) >> 14).to(tl.float32)
        units = units * 5.9604644775390625e-08
        units = tl.where(x < 0.0, -units, units)
        y = tl.where(size < 6.103515625e-05, units, bits.to(tl.float32, bitcast=True))
        return round_to(y, DTYPE)


@triton.jit
def _advance(
    row, rates, start, numel,
    BLOCK: tl.constexpr, RULE: tl.constexpr, MOMENTUM: tl.constexpr, VALUE: tl.constexpr,
    EIGHT_BITS: tl.constexpr, WEIGHT: tl.constexpr, INDEX: tl.constexpr, WIDE: tl.constexpr,
    STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Entries start .. start + BLOCK of one tensor."""
    offs = start + tl.arange(0, BLOCK)  # [BLOCK], int64
    values_ptr = _pointer(row, _VALUES, VALUE, ALIGNED)
    value = _load(values_ptr, offs, numel, MASKED).to(WIDE)
    grad_ptr = _pointer(row, _GRAD, VALUE, ALIGNED)
    grad = _load(grad_ptr, offs, numel, MASKED).to(WIDE) * tl.load(rates + _SCALE).to(WIDE)
    decay = tl.load(rates + _DECAY).to(WIDE)
    size = tl.load(rates + _SIZE).to(WIDE)

    if MOMENTUM:
        a = tl.load(rates + _A).to(WIDE)
        if EIGHT_BITS:
            first_ptr = _pointer(row, _FIRST, tl.int8, ALIGNED)
            scale_ptr = _pointer(row, _FIRST_SCALE, tl.float32, False)
            codes = _load(first_ptr, offs, numel, MASKED)
            first = _decode(codes, scale_ptr, start, numel, BLOCK, True).to(WIDE)
        else:
            first_ptr = _pointer(row, _FIRST, VALUE, ALIGNED)
            first = _load(first_ptr, offs, numel, MASKED).to(WIDE)

    if RULE == "adamw":
        b = tl.load(rates + _B).to(WIDE)
        rest = tl.load(rates + _B_REST).to(WIDE)
        if EIGHT_BITS:
            second_ptr = _pointer(row, _SECOND, tl.uint8, ALIGNED)
            second_scale_ptr = _pointer(row, _SECOND_SCALE, tl.float32, False)
            codes = _load(second_ptr, offs, numel, MASKED)
            second = _decode(codes, second_scale_ptr, start, numel, BLOCK, False).to(WIDE)
        else:
            second_ptr = _pointer(row, _SECOND, VALUE, ALIGNED)
            second = _load(second_ptr, offs, numel, MASKED).to(WIDE)
        value = value * decay
        first = first + a * (grad - first)
        second = second * b + rest * grad * grad
        root = tl.load(rates + _ROOT).to(WIDE)
        below = quotient(_root(second), tl.broadcast_to(root, second.shape))
        below = below + tl.load(rates + _EPS).to(WIDE)
        value = value - quotient(size * first, below)
        if EIGHT_BITS:
            codes = _encode(second, second_scale_ptr, start, numel, BLOCK, False)
            _store(second_ptr, offs, codes, numel, MASKED)
        else:
            _store(second_ptr, offs, round_to(second, VALUE), numel, MASKED)
    elif RULE == "lion":
        value = value * decay
        u = first + a * (grad - first)
        sign = tl.where(u > 0.0, 1.0, 0.0) - tl.where(u < 0.0, 1.0, 0.0)
        value = value - size * tl.where(u != u, u, sign.to(WIDE))  # NaN stays NaN, as in torch
        first = first + tl.load(rates + _B_REST).to(WIDE) * (grad - first)
    else:
        grad = tl.where(decay == 0.0, grad, grad + decay * value)  # 0 * inf is no decay
        if MOMENTUM:
            fresh = tl.load(rates + _ROOT) != 0.0
            going = first * a + grad * tl.load(rates + _B_REST).to(WIDE)
            first = tl.where(fresh, grad, going)
            nesterov = tl.load(rates + _EPS) != 0.0
            grad = tl.where(nesterov, grad + a * first, first)
        value = value - size * grad

    if MOMENTUM:
        if EIGHT_BITS:
            codes = _encode(first, scale_ptr, start, numel, BLOCK, True)
            _store(first_ptr, offs, codes, numel, MASKED)
        else:
            _store(first_ptr, offs, round_to(first, VALUE), numel, MASKED)
    _store(values_ptr, offs, round_to(value, VALUE), numel, MASKED)

    if WEIGHT is not None:
        dst = _load(_pointer(row, _INDICES, INDEX, ALIGNED), offs, numel, MASKED).to(tl.int64)
        base = _load(_pointer(row, _BASE, WEIGHT, ALIGNED), offs, numel, MASKED).to(WIDE)
        total = base + value
        if STOCHASTIC:
            written = _round_stochastically(total, dst, row, tl.load(rates + _COUNT), WEIGHT)
        else:
            written = round_to(total, WEIGHT)
        weight_ptr = _pointer(row, _WEIGHT, WEIGHT, False)
        if MASKED:
            tl.store(weight_ptr + dst, written, mask=offs < numel)
        else:
            tl.store(weight_ptr + dst, written)


@triton.jit
def _step_kernel(
    table_ptr, block_tensor_ptr, rates_ptr, entries,
    BLOCK: tl.constexpr, RULE: tl.constexpr, MOMENTUM: tl.constexpr, VALUE: tl.constexpr,
    EIGHT_BITS: tl.constexpr, WEIGHT: tl.constexpr, INDEX: tl.constexpr, WIDE: tl.constexpr,
    STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One block of one tensor; `entries` is the grid's, every tensor padded to whole blocks."""
    pid = tl.program_id(0).to(tl.int64)
    t = tl.load(block_tensor_ptr + pid).to(tl.int64)
    row = table_ptr + t * _COLUMNS
    rates = rates_ptr + t * _RATES
    if tl.load(rates + _SKIP) == 0.0:
        numel = tl.load(row + _NUMEL)
        start = (pid - tl.load(row + _FIRST_BLOCK)) * BLOCK
        if start + BLOCK <= numel:
            _advance(
                row, rates, start, numel, BLOCK, RULE, MOMENTUM, VALUE, EIGHT_BITS, WEIGHT,
                INDEX, WIDE, STOCHASTIC, ALIGNED, False,
            )  # fmt: skip
        else:
            _advance(
                row, rates, start, numel, BLOCK, RULE, MOMENTUM, VALUE, EIGHT_BITS, WEIGHT,
                INDEX, WIDE, STOCHASTIC, ALIGNED, True,
            )  # fmt: skip


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def _hyper_table(
    hyper: Sequence[Sequence[float]], lr: Sequence[Tensor | None], device: torch.device
) -> Tensor:
    """Return (groups, 8) fp64 on the device; learning rates that lie there are copied there."""
    rows = tuple(tuple(row) for row in hyper)
    table = on_device(
        ("hyper", rows),
        lambda: torch.tensor([[*r, _log(r[2]), _log(r[3])] for r in rows], dtype=torch.float64),
        device,
    )
    if any(rate is not None for rate in lr):
        table = table.clone()
        for row, rate in zip(table, lr, strict=True):
            if rate is not None:
                row[0].copy_(rate)
    return table


def launch_step(
    rule: str,
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    first_scales: Sequence[Tensor],
    second_scales: Sequence[Tensor],
    weights: Sequence[Tensor],
    bases: Sequence[Tensor],
    indices: Sequence[Tensor],
    steps: Sequence[Tensor],
    groups: Sequence[int],
    ids: Sequence[int],
    hyper: Sequence[Sequence[float]],
    lr: Sequence[Tensor | None],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    seed: int | None,
) -> None:
    """Take one step on every tensor, in place; all on one device and contiguous.

    Args:
        rule: ``"adamw"``, ``"sgd"`` or ``"lion"``.
        values, grads: any shape, of one dtype each.
        firsts: first moments in the values' dtype, int8 where ``first_scales`` are given; empty
            for SGD without momentum.
        seconds: AdamW's second moments, or uint8 with ``second_scales``.
        first_scales, second_scales: (ceil(numel / 256),) fp32, or empty.
        weights, bases, indices: what to write; empty for ordinary parameters.
        steps: 0-d fp32, steps taken; counted here.
        groups: row of ``hyper`` of each tensor.
        ids: number of each tensor in the random stream.
        hyper: rows as `HYPER` names them.
        lr: per group, a 0-d tensor on the device that replaces the row's learning rate, or None.
        grad_scale, found_inf: device scalars: a factor of the gradients, and nonzero for no step.
        seed: round fp16 and bf16 weights stochastically with this seed; None to nearest.
    """
    if not values:
        return
    device, count = values[0].device, len(values)
    columns = (
        values, grads, firsts, seconds, first_scales, second_scales, weights, bases, indices, steps
    )  # fmt: skip
    pointers = list(
        zip(*([t.data_ptr() for t in c] if c else [0] * count for c in columns), strict=True)
    )

    # One launch per kind: what the compiler has to know about a tensor.
    kinds: dict[tuple[Any, ...], list[int]] = {}
    first_block, blocks = [0] * count, [0] * count
    used: dict[tuple[Any, ...], int] = {}
    for t in range(count):
        vectors = (*pointers[t][:4], *pointers[t][7:9])
        kind = (
            values[t].dtype,
            weights[t].dtype if weights else None,
            indices[t].dtype if indices else None,
            not any(p % 16 for p in vectors),
        )
        kinds.setdefault(kind, []).append(t)
        first_block[t] = used.get(kind, 0)
        blocks[t] = triton.cdiv(values[t].numel(), OPTIMIZER.block)
        used[kind] = first_block[t] + blocks[t]

    rows = tuple(
        (*pointers[t], values[t].numel(), first_block[t], groups[t], ids[t], seed or 0)
        for t in range(count)
    )
    table = on_device(("table", rows), lambda: torch.tensor(rows, dtype=torch.int64), device)
    hyper_table = _hyper_table(hyper, lr, device)
    rates = empty(count * _RATES.value, hyper_table)
    launch(
        _rates_kernel, count, device,
        table, hyper_table, grad_scale if grad_scale is not None else rates,
        found_inf if found_inf is not None else rates, rates,
        RULE=rule, SCALED=grad_scale is not None, CHECKED=found_inf is not None,
        block=128, num_warps=4,
    )  # fmt: skip

    for kind, members in kinds.items():
        value_dtype, weight_dtype, index_dtype, aligned = kind
        counts = tuple((t, blocks[t]) for t in members)
        block_tensor = spread(counts, device)
        launch(
            _step_kernel, used[kind] * OPTIMIZER.block, device, table, block_tensor, rates,
            RULE=rule,
            MOMENTUM=bool(firsts),
            VALUE=triton_dtype(value_dtype),
            EIGHT_BITS=bool(first_scales),
            WEIGHT=None if weight_dtype is None else triton_dtype(weight_dtype),
            INDEX=tl.int64 if index_dtype == torch.int64 else tl.int32,
            WIDE=tl.float64 if torch.float64 in (value_dtype, weight_dtype) else tl.float32,
            STOCHASTIC=seed is not None and weight_dtype in (torch.float16, torch.bfloat16),
            ALIGNED=aligned,
            **OPTIMIZER._asdict(),
        )  # fmt: skip
