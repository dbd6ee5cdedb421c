"""What every launcher needs: the one allocator, grid, device guard, interpreter switch."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseft_kernels._configs import Target

__all__ = [
    "INTERPRETING",
    "as_bits",
    "by_kernels",
    "device_guard",
    "empty",
    "launch",
    "on_device",
    "quotient",
    "round_to",
    "spread",
    "target_of",
    "triton_dtype",
]

# `@triton.jit` reads the variable when it decorates, so a process either interprets or compiles.
INTERPRETING = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_TRITON = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def empty(size: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate an uninitialised vector on the device of ``like``, in its dtype unless told.

    The only allocation a launcher makes, so that tests can poison it.
    """
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device)


def as_bits(x: Tensor) -> Tensor:
    """View a tensor as signed integers of its width: copies then cannot touch a NaN's payload."""
    return x.view(_INTEGER[x.element_size()])


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's name for a floating dtype."""
    return _TRITON[dtype]


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make ``device`` current while a kernel is launched; nothing on a CPU (the interpreter)."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def target_of(device: torch.device) -> Target:
    """Return what tile tables need to know of a device; asked of the driver once.

    The interpreter gets the tables of an H200, so that tests run the code that GPUs run.
    """
    if device.type != "cuda":
        return Target("cuda", (9, 0), 132)
    found = torch.cuda.get_device_properties(device)
    kind = "hip" if torch.version.hip else "cuda"
    return Target(kind, (found.major, found.minor), found.multi_processor_count)


def launch(
    kernel: Any,
    entries: int,
    device: torch.device,
    *args: Any,
    block: int,
    num_warps: int,
    **meta: Any,
) -> None:
    """Run an entry-wise kernel with one program per ``block`` entries; nothing for none.

    FP fusion is off, so that bits do not depend on Triton's default (3.10 flips it).
    """
    if entries == 0:
        return
    with device_guard(device):
        kernel[(triton.cdiv(entries, block),)](
            *args, entries, BLOCK=block, num_warps=num_warps, enable_fp_fusion=False, **meta
        )


# Tables on the device, by what they hold. Keyed by stream as well: an upload is ordered before
# its launch on one stream only.
_uploads: OrderedDict[Hashable, Tensor] = OrderedDict()
_KEPT_UPLOADS = 256  # kilobytes each
_uploads_lock = threading.Lock()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on_device(key: Hashable, build: Callable[[], Tensor], device: torch.device) -> Tensor:
    """Return ``build()`` on the device, uploaded once per key and stream, without a sync.

    While a CUDA graph is captured it is written there by kernels, at every replay.
    """
    if _capturing(device):
        return by_kernels(build(), device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, key)
    with _uploads_lock:
        found = _uploads.get(key)
        if found is not None:
            _uploads.move_to_end(key)
            return found
    host = build()
    table = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
    with _uploads_lock:
        _uploads[key] = table
        while len(_uploads) > _KEPT_UPLOADS:
            _uploads.popitem(last=False)
    return table


def by_kernels(host: Tensor, device: torch.device) -> Tensor:
    """Return a small host tensor on the device without copying from host memory.

    A graph under capture may copy from page-locked memory alone, which cannot be allocated under
    every capture (and torch refuses the rest, as nothing keeps it alive). Here the numbers are
    arguments of kernels, about a hundred each.
    """
    table = torch.zeros(host.shape, dtype=host.dtype, device=device)
    if host.numel():
        torch._foreach_add_(list(table.view(-1).unbind()), host.view(-1).tolist())
    return table


def spread(counts: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Return int32 on the device: each number ``counts[i][1]`` times in a row, in order.

    As long as a launch has blocks, so in a capture it is made on the device.
    """
    if not _capturing(device):
        return on_device(("spread", tuple(counts)), lambda: _spread(counts), device)
    numbers, times = torch.tensor(counts, dtype=torch.int64).unbind(1)
    ends = by_kernels(times.cumsum(0), device)
    block = torch.arange(int(times.sum()), device=device)
    return by_kernels(numbers, device)[torch.searchsorted(ends, block, right=True)].int()


def _spread(counts: Sequence[tuple[int, int]]) -> Tensor:
    numbers, times = torch.tensor(counts, dtype=torch.int64).unbind(1)
    return numbers.repeat_interleave(times).int()


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """Round fp32 (or fp64) to DTYPE, to nearest even.

    The interpreter truncates fp32 to bf16 (Triton 3.6 and 3.9), so there the carry is added on the
    bits.
    """
    if INTERPRETING and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        bits = tl.where(finite, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        return (bits & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(DTYPE)


@triton.jit
def quotient(x, y):
    """x / y rounded to nearest; Triton's fp32 division is otherwise an approximation on GPUs."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)
