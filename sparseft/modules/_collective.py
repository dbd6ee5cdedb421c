"""The processes whose numbers count together: sums over them, and a check that they are in step."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from sparseft.errors import SparseFtError
from sparseft.modules.ranks import processes

__all__ = ["Group", "Ranks"]

# A process group; None: the default one where torch.distributed is initialised; False: this process
# alone.
Group = Any | None | Literal[False]


class Ranks:
    """All processes of a group, or this one alone.

    Args:
        group: see `Group`.
    """

    def __init__(self, group: Group) -> None:
        self._group = group or None
        self.several = group is not False and processes(self._group) > 1

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place; afterwards its bits are the same on all."""
        if self.several:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def meet(self, place: int, what: str, device: torch.device) -> None:
        """Raise on every process unless all have come to the same ``place``.

        Args:
            place: a number for where this process is.
            what: the place in words.
            device: where the group can exchange tensors.
        """
        if not self.several:
            return
        ends = torch.tensor([place, -place], device=device)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self._group)
        highest, lowest = ends.tolist()
        if highest != -lowest:
            raise SparseFtError(
                f"processes choose candidates together, but this one is at {what} while others are "
                "elsewhere: their first batches reach other tensors, or in another order. Give "
                "every process a first batch that runs through the same layers, or "
                "candidates=None, which needs no agreement before the end."
            )
