"""Questions asked of a tensor's contents, in pieces: in order? finite? the same bits? which digest?

A leaf without policy: callers turn the answers into their own errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "bits_equal",
    "chunk_of",
    "find_index_fault",
    "find_value_fault",
    "hash_tensor",
    "raw_pieces",
]

# Checks and hashes walk tensors in pieces of this many elements: scratch stays at a few megabytes,
# and a piece stays in cache between the operations on it (finiteness of 31M fp32 values: 0.22 s in
# pieces of 2**20, 0.63 s over the whole tensor at once, on one core).
_CPU_CHUNK = 1 << 20
_GPU_CHUNK = 1 << 25  # each piece costs one synchronisation there

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def chunk_of(tensor: Tensor) -> int:
    """Return how many elements of ``tensor`` one piece of a walk over it takes."""
    return _CPU_CHUNK if tensor.device.type == "cpu" else _GPU_CHUNK


def find_index_fault(indices: Tensor, numel: int) -> str | None:
    """Say what keeps ``indices`` from ascending without repeats inside ``[0, numel)``, or ``None``.

    Args:
        indices: (nnz,) int32 or int64, on any device.
        numel: number of entries of the tensor that is indexed.
    """
    n = indices.numel()
    if n == 0:
        return None
    step = chunk_of(indices)
    for start in range(0, n - 1, step):
        part = indices[
            start : start + step + 1
        ]  # one shared entry, so that piece edges are compared too
        rising = part[1:] > part[:-1]
        if not bool(rising.all()):
            at = start + int(rising.to(torch.uint8).argmin())
            a, b = int(indices[at]), int(indices[at + 1])
            what = "a duplicate" if a == b else "not ascending"
            return f"{what}: indices[{at}] = {a}, indices[{at + 1}] = {b}"
    # Ascending throughout, so the two ends bound everything between.
    first, last = int(indices[0]), int(indices[-1])
    if first < 0:
        return f"out of range: indices[0] = {first} is negative"
    if last >= numel:
        return f"out of range: indices[{n - 1}] = {last}, but the tensor has {numel} entries"
    return None


def find_value_fault(values: Tensor) -> str | None:
    """Say where ``values`` is NaN or infinite; ``None`` when every entry is finite.

    Args:
        values: any shape, floating.
    """
    flat = values.detach().reshape(-1)
    step = chunk_of(flat)
    for start in range(0, flat.numel(), step):
        finite = torch.isfinite(flat[start : start + step])
        if not bool(finite.all()):
            at = start + int(finite.to(torch.uint8).argmin())
            return f"not finite: entry {at} is {float(flat[at])}"
    return None


def raw_pieces(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of ``tensor`` (any device) in row-major order, piece by piece."""
    flat = tensor.detach().reshape(-1)
    step = chunk_of(flat)
    for start in range(0, flat.numel(), step):
        piece = flat[start : start + step].cpu().contiguous()
        yield piece.view(torch.uint8).numpy().data


def hash_tensor(digest: Any, tensor: Tensor) -> None:
    """Feed the raw bytes of ``tensor`` to a hashlib object."""
    for piece in raw_pieces(tensor):
        digest.update(piece)


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Compare two tensors bit for bit: -0.0 differs from 0.0, and a NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_floating_point():
        bits = _BITS[a.element_size()]
        a, b = a.detach().contiguous().view(bits), b.detach().contiguous().view(bits)
    return torch.equal(a, b.to(a.device))
