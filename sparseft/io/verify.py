"""Check what mapped tensors hold at memory speed: numpy where all is well, several tensors at once.

The questions, and the words for a fault, are `sparseft._integrity`'s; here they are asked of CPU
tensors in a way that costs little beside the digest. Of 2**20 fp32 values on one core numpy says in
0.1 ms that they are finite and torch in 2.1 ms, BLAKE2b takes 3.4 ms. numpy and hashlib let other
threads run meanwhile, and neither starts threads of its own inside ours, as torch may.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from sparseft._integrity import find_index_fault, find_value_fault

__all__ = ["WORTH_THREADS", "index_fault", "read_all", "value_fault"]

_Read = TypeVar("_Read")

_PIECE = 1 << 17  # elements; half a megabyte of fp32 stays in the second-level cache
_EXPONENT = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}  # all ones: infinite or NaN
# BLAKE2b runs at about 1.2 GB/s a core; past a few cores memory and the largest tensor decide.
_MAX_WORKERS = 4
WORTH_THREADS = 1 << 22  # bytes; below it starting threads costs as much as it saves


def index_fault(indices: Tensor, numel: int) -> str | None:
    """Answer as `find_index_fault`, of (nnz,) int32 or int64 on the CPU."""
    places = indices.numpy()
    n = len(places)
    if n == 0:
        return None
    good = places[0] >= 0 and places[-1] < numel
    for start in range(0, n - 1, _PIECE):
        if not good:
            break
        part = places[start : start + _PIECE + 1]  # one shared entry, so that edges are compared
        good = bool((part[1:] > part[:-1]).all())
    return None if good else find_index_fault(indices, numel)


def value_fault(values: Tensor) -> str | None:
    """Answer as `find_value_fault`, of a floating tensor of any shape on the CPU."""
    flat = values.detach().reshape(-1)
    exponent = _EXPONENT.get(flat.dtype)
    data = flat.numpy() if exponent is None else flat.view(torch.int16).numpy().view(np.uint16)
    for start in range(0, len(data), _PIECE):
        part = data[start : start + _PIECE]
        if exponent is None:
            good = bool(np.isfinite(part).all())
        else:
            good = bool((part & exponent).max() < exponent)
        if not good:
            return find_value_fault(values)
    return None


def read_all(read: Callable[[str], _Read], sizes: Mapping[str, int]) -> dict[str, _Read]:
    """Return ``{name: read(name)}``, read by a few threads where there is much to read.

    Args:
        read: reads and checks one tensor; called once for each name, from several threads.
        sizes: bytes of each tensor, by name. The largest are begun first, so that none of them is
            left over at the end with one thread to it.

    Raises:
        Exception: what ``read`` raised for the first name, in the order of ``sizes``, that failed.
    """
    workers = min(_MAX_WORKERS, _cores(), len(sizes))
    if workers < 2 or sum(sizes.values()) < WORTH_THREADS:
        return {name: read(name) for name in sizes}
    with ThreadPoolExecutor(workers, thread_name_prefix="sparseft-read") as pool:
        largest_first = sorted(sizes, key=lambda name: -sizes[name])
        pending = {name: pool.submit(read, name) for name in largest_first}
        try:
            return {name: pending[name].result() for name in sizes}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _cores() -> int:
    """Return the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
