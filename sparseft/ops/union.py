"""The union of ascending position lists, and where each list lies in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["union_of"]


def union_of(indices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """Return the ascending union of ascending position lists, and where each list lies in it.

    Args:
        indices: (nnz_i,) int32 or int64 each, ascending and unique, on one device and of one dtype.

    Returns:
        (size,) union in the same dtype, and per list (nnz_i,) int32 places in it (int64 from 2**31
        entries); None for a list that is the whole union.
    """
    first = indices[0]
    if all(i is first or torch.equal(i, first) for i in indices[1:]):
        return first, [None] * len(indices)
    if first.device.type == "cpu":
        # Two lists of 500 k: numpy sorts in 19 ms and finds places in 40 ms; torch.unique takes
        # 175 ms and torch.searchsorted 87 ms.
        merged = np.concatenate([i.numpy() for i in indices])
        merged.sort()
        keep = np.empty(merged.shape, dtype=bool)
        keep[:1] = True
        np.not_equal(merged[1:], merged[:-1], out=keep[1:])
        flat = merged[keep]
        narrow = np.int32 if len(flat) < 2**31 else np.int64
        places = [
            torch.from_numpy(np.searchsorted(flat, i.numpy()).astype(narrow)) for i in indices
        ]
        union = torch.from_numpy(flat)
    else:
        union = torch.unique(torch.cat(list(indices)), sorted=True)
        short = union.numel() < 2**31
        places = [torch.searchsorted(union, i, out_int32=short) for i in indices]
    return union, [p if p.numel() < union.numel() else None for p in places]
