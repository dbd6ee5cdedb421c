"""Compact indices: the gaps between positions, in one byte where they fit (format version 2).

What is stored of ascending, unique positions p are the numbers of entries skipped before each,
``p[0], p[1] - p[0] - 1, p[2] - p[1] - 1, ...``, as three runs of little-endian integers, one run
after the other in one U8 tensor:

1. nnz bytes: the gap, or 255 where it is 255 or more;
2. for each 255, in order, 2 bytes: the gap less 255, or 65,535 where that is 65,535 or more;
3. for each 65,535, in order, 8 bytes: the gap less 65,790.

The three are a bijection: every byte string of the right length stands for one list of ascending,
unique positions, and every such list has one byte string. So the same adapter has the same bytes,
and no stream can spell a duplicate or a descent; what is left to check are the two counts, and the
last position against the tensor's size. At density d a random mask costs about 1 + 2 (1 - d)^255
bytes per entry: 1.15 at 1 %, against 4. Gaps are used where they are smaller, and only there (a
mask of a few entries far apart stays a list of positions).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["GapsError", "decode_gaps", "encode_gaps"]

_BYTE, _WORD = 255, 65_535  # escapes of the first two runs


class GapsError(ValueError):
    """A byte string that stands for no positions inside the tensor; says why."""


def encode_gaps(indices: Tensor) -> Tensor | None:
    """Return ``indices`` as gaps, (bytes,) uint8 on the CPU; ``None`` where that is not smaller.

    Args:
        indices: (nnz,) int32 or int64, ascending, unique, not negative; any device.
    """
    positions = indices.detach().cpu().numpy()
    gaps = np.diff(positions, prepend=positions.dtype.type(-1))
    gaps -= 1
    low = np.minimum(gaps, _BYTE).astype(np.uint8)
    beyond = gaps[gaps >= _BYTE] - _BYTE
    middle = np.minimum(beyond, _WORD).astype("<u2")
    high = (beyond[beyond >= _WORD] - _WORD).astype("<u8")
    if low.nbytes + middle.nbytes + high.nbytes >= positions.nbytes:
        return None
    runs = (low, middle.view(np.uint8), high.view(np.uint8))
    return torch.from_numpy(np.concatenate(runs))


def decode_gaps(stream: Tensor, nnz: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Return the positions that ``stream`` stands for: (nnz,), ascending, unique, below ``numel``.

    Nothing of the stream is believed; nothing larger than its own length allows is allocated.

    Args:
        stream: (bytes,) uint8, on the CPU.
        nnz: number of positions.
        numel: number of entries of the tensor that is indexed.
        dtype: int32 (``numel`` below 2**31) or int64, of the result.

    Raises:
        GapsError: too few or too many bytes, or a position at or past ``numel``.
    """
    data = stream.numpy()
    if len(data) < nnz:
        raise GapsError(f"{len(data)} bytes for {nnz} entries: the gaps are cut off")
    low = data[:nnz]
    wide = np.flatnonzero(low == _BYTE)
    start, end = nnz, nnz + 2 * len(wide)
    if len(data) < end:
        raise GapsError(f"{len(data)} bytes, but {len(wide)} of {nnz} gaps need {end}: cut off")
    middle = data[start:end].view("<u2")
    widest = np.flatnonzero(middle == _WORD)
    start, end = end, end + 8 * len(widest)
    if len(data) != end:
        raise GapsError(f"{len(data)} bytes, but {nnz} gaps need {end}")
    high = data[start:end].view("<u8")
    last = nnz - 1 + _exact_sum(low) + _exact_sum(middle) + _exact_sum(high)
    if nnz and last >= numel:
        raise GapsError(
            f"out of range: indices[{nnz - 1}] = {last}, but the tensor has {numel} entries"
        )
    # From here on every partial sum is at most `last`, so no integer below can overflow.
    steps = np.add(low, 1, dtype=np.int32 if dtype == torch.int32 else np.int64)
    if len(wide):
        more = middle.astype(steps.dtype)
        more[widest] += high.astype(steps.dtype)
        steps[wide] += more
    if nnz:
        steps[0] -= 1
    return torch.from_numpy(np.cumsum(steps, out=steps))


def _exact_sum(run: np.ndarray[Any, Any]) -> int:
    """Sum unsigned integers of any size without overflow."""
    if run.itemsize < 8:
        return int(run.sum(dtype=np.uint64))
    # In halves: 2**31 of the largest would not pass 2**64.
    return int((run & 0xFFFFFFFF).sum(dtype=np.uint64)) + (
        int((run >> 32).sum(dtype=np.uint64)) << 32
    )
