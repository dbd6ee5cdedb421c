"""Checks and address arithmetic shared by the ops. Nothing here computes a result of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparseft.errors import DiffError

__all__ = [
    "CHUNK",
    "LIBRARY",
    "Operator",
    "accumulation_dtype",
    "bits",
    "check_entries",
    "flat_chunks",
    "operator",
    "rows_of",
    "watched",
]

# Entries whose indices are widened to int64 at a time: torch's scatter wants int64, and 64 Ki of
# them (512 KiB) stay in a core's L2. Timing is flat from 16 Ki to 256 Ki (3.3-3.7 ms for 96 k
# random writes into 9.6 M fp32).
CHUNK = 1 << 16

# The one definition site of the "sparseft" namespace; alive as long as the process, or the ops
# would vanish.
LIBRARY = torch.library.Library("sparseft", "DEF")

_PLAIN = (Tensor, torch.nn.Parameter)
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def operator(schema: str) -> Callable[[Callable[..., Any]], Operator]:
    """Define ``sparseft::<schema>`` by the decorated function, on every device."""
    name = schema.partition("(")[0]

    def register(fn: Callable[..., Any]) -> Operator:
        LIBRARY.define(schema)
        LIBRARY.impl(name, fn, "CompositeExplicitAutograd")
        return Operator(getattr(torch.ops.sparseft, name).default, fn)

    return register


class Operator:
    """Call an op: its implementation directly where nobody watches, else through the dispatcher.

    torch's Python layers cost about 100 us a call here; an attached 12-layer encoder makes 290
    calls a step. They are needed for autograd, tracing, tensor subclasses and function transforms.
    """

    def __init__(self, overload: Any, implementation: Callable[..., Any]) -> None:
        self.overload = overload
        self.implementation = implementation

    def __call__(self, *args: Any) -> Any:
        return (self.overload if watched(*args) else self.implementation)(*args)


def watched(*args: Any) -> bool:
    """Tell whether autograd, a tracer, a tensor subclass or a function transform sees a call on
    these.

    Elsewhere an op may run its implementation directly and look at its operands' values.
    """
    if torch.compiler.is_compiling():
        return True
    record = torch.is_grad_enabled()
    for a in args:
        if isinstance(a, Tensor) and (type(a) not in _PLAIN or (record and a.requires_grad)):
            return True
    return bool(torch._C._len_torch_dispatch_stack()) or bool(
        torch._C._are_functorch_transforms_active()
    )


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return float64 if any operand is float64, else float32: what sums are kept in."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def rows_of(x: Tensor) -> Tensor:
    """View (..., N) as (T, N), also where N is 0 (``reshape(-1, 0)`` is ambiguous)."""
    return x.unsqueeze(0) if x.ndim == 1 else x.flatten(0, -2)


def bits(x: Tensor) -> Tensor:
    """View a floating tensor as integers of its width, so that a copy moves NaN payloads
    untouched.
    """
    return x.view(_INTEGER[x.element_size()])


def check_entries(op: str, weight: Tensor, indices: Tensor, **vectors: Tensor | None) -> None:
    """Raise DiffError unless ``indices`` and each named vector are (nnz,) on the weight's device.

    Order and range of ``indices`` are checked where a pattern is built, once, not at every call.
    """
    if not weight.is_floating_point():
        raise DiffError(f"{op}: weight has dtype {weight.dtype}; it should be a floating dtype")
    if indices.ndim != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise DiffError(
            f"{op}: indices are {indices.dtype} of shape {tuple(indices.shape)}; they should be "
            "int32 or int64 (nnz,)"
        )
    for name, vector in (("indices", indices), *vectors.items()):
        if vector is None:
            continue
        if vector.shape != indices.shape:
            raise DiffError(
                f"{op}: {name} has shape {tuple(vector.shape)}; it should be ({indices.numel()},) "
                "like indices"
            )
        if vector.device != weight.device:
            raise DiffError(
                f"{op}: {name} is on {vector.device} but weight is on {weight.device}; move it "
                "there first"
            )


def _reject_overlap(op: str, weight: Tensor) -> None:
    """Raise for a weight whose elements share memory: writes would collide."""
    if any(
        size > 1 and stride == 0 for size, stride in zip(weight.shape, weight.stride(), strict=True)
    ):
        raise DiffError(
            f"{op}: weight of shape {tuple(weight.shape)} has strides {weight.stride()}, so its "
            "elements share "
            "memory (an expanded tensor?); pass weight.contiguous()"
        )


def flat_chunks(
    op: str, weight: Tensor, indices: Tensor, *, write: bool
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield ``(entries, flat, address)``: ``flat[address]`` are the weight's entries
    ``indices[entries]``.

    Args:
        weight: any shape and strides. Non-contiguous weights are addressed in place through their
            strides, never copied, so that a write lands in the weight itself.
        indices: (nnz,) int32 or int64, flat row-major in the weight's shape.
        write: refuse weights whose elements overlap in memory.

    ``address`` is int64, one chunk of ``CHUNK`` entries at a time; no int64 copy of all indices
    exists.
    """
    if weight.is_contiguous():
        flat, strides = weight.view(-1), None
    else:
        if write:
            _reject_overlap(op, weight)
        extent = 1 + sum((n - 1) * s for n, s in zip(weight.shape, weight.stride(), strict=True))
        flat = weight.as_strided((extent if weight.numel() else 0,), (1,))
        strides = weight.stride()
    for start in range(0, indices.numel(), CHUNK):
        entries = slice(start, min(start + CHUNK, indices.numel()))
        address = indices[entries].long()
        if strides is not None:
            rest, address = address, torch.zeros_like(address)
            for size, stride in zip(reversed(weight.shape), reversed(strides), strict=True):
                address += (rest % size) * stride
                rest = rest // size
        yield entries, flat, address
