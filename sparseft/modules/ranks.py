"""Processes that train together: how many, and whether they agree on where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sparseft.diff import SparsePattern
from sparseft.errors import AttachError

__all__ = ["check_agreement", "processes"]


def processes(group: Any = None) -> int:
    """Return the size of a process group (default: the world), 1 where there is none."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size(group)


def check_agreement(patterns: Mapping[str, SparsePattern], group: Any = None) -> None:
    """Raise AttachError, on every rank, where ranks are about to move a mask differently.

    Compares two sums over each pattern's indices: one small reduction.
    """
    if processes(group) == 1 or not patterns:
        return
    wide = [p.indices.long() for p in patterns.values()]
    sums = torch.stack([torch.stack([w.sum(), (w * w).sum()]) for w in wide])
    both = torch.stack([sums, -sums])
    torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX, group=group)
    differ = (both[0] != -both[1]).any(1).tolist()
    if any(differ):
        name = list(patterns)[differ.index(True)]
        raise AttachError(
            f"ranks disagree on the new mask of {name!r}: their diffs differ. Do they start from "
            "the same weights, and does DistributedDataParallel reduce every leaf?"
        )
