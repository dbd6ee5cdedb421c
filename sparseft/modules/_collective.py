"""The processes whose numbers count together: sums over them, and a check that they are in step."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sparseft.errors import SparseFtError
from sparseft.modules.ranks import processes

__all__ = ["Group", "KeptGroup", "Ranks", "exchange_device", "patience"]

logger = logging.getLogger(__name__)

# A process group; None: the default one where torch.distributed is initialised; False: this process
# alone.
Group = Any | None | Literal[False]
_Told = TypeVar("_Told")

PATIENCE = 30.0  # seconds


def exchange_device(group: Any = None, near: torch.device | None = None) -> torch.device:
    """Return where tensors have to be for a process group to exchange them.

    Args:
        group: the process group; None: the default one.
        near: where they are; kept, where a backend of the group works there. None: the CPU.

    Returns:
        ``near``; else the CPU (gloo); else this process' current device of the kind that the
        group's backend works on (nccl: its GPU).
    """
    near = near or torch.device("cpu")
    kinds = [part.split(":")[0] for part in dist.get_backend_config(group).split(",")]
    if near.type in kinds:
        return near
    if "cpu" in kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())


@contextlib.contextmanager
def patience(what: str) -> Iterator[None]:
    """Say in the log what this process waits for, if it does so for longer than `PATIENCE`."""

    def say() -> None:
        logger.warning(
            "rank %d has waited for %.0f s for the other ranks (%s). Has every rank called it? A "
            "rank that failed says so in its own log. One that attaches alone, say on rank 0 for "
            "an evaluation, passes attach(..., group=False).", dist.get_rank(), PATIENCE, what,
        )  # fmt: skip

    timer = threading.Timer(PATIENCE, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class KeptGroup:
    """A `Group` kept by what is copied with its model: deep copies share it.

    A pickle, which cannot hold a process group, has the default one in its place.
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptGroup:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptGroup, (False if self.group is False else None,)


class Ranks:
    """All processes of a group, or this one alone.

    Args:
        group: see `Group`.
    """

    def __init__(self, group: Group) -> None:
        self._group = group or None
        self.several = group is not False and processes(self._group) > 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes files: the first of the group, or alone."""
        return not self.several or dist.get_rank(self._group) == 0

    def wait(self, what: str) -> None:
        """Return when every process has come here."""
        if self.several:
            with patience(what):
                self.sum_(torch.zeros(1))

    @contextlib.contextmanager
    def lead_first(self, what: str) -> Iterator[None]:
        """Let the others in when the one that writes is through, to find what it has written."""
        if not self.leads:
            self.wait(what)
        yield
        if self.leads:
            self.wait(what)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place; afterwards its bits are the same on all."""
        if self.several:
            shared = tensor.to(exchange_device(self._group, tensor.device))
            dist.all_reduce(shared, group=self._group)
            if shared is not tensor:
                tensor.copy_(shared)
        return tensor

    def all_equal(self, words: Tensor, what: str) -> bool:
        """Whether every process has the same integers; one all-reduce of twice their size.

        Args:
            words: (n,) int64 on the CPU, the same n everywhere.
            what: what is compared, for who waits.
        """
        if not self.several:
            return True
        # The largest of x and of ~x, which is the complement of the smallest x.
        ends = torch.stack([words, ~words]).to(exchange_device(self._group))
        with patience(what):
            dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self._group)
            highest, lowest = ends.cpu()
        return torch.equal(highest, ~lowest)

    def gather(self, told: _Told) -> dict[int, _Told]:
        """Return what every process of the group told, by its rank in the world."""
        if not self.several:
            return {dist.get_rank() if processes() > 1 else 0: told}
        every: list[Any] = [None] * processes(self._group)
        dist.all_gather_object(every, told, group=self._group)
        ranks = dist.get_process_group_ranks(self._group)
        return dict(zip(ranks, every, strict=True))

    def meet(self, place: int, what: str, device: torch.device) -> None:
        """Raise on every process unless all have come to the same ``place``.

        Args:
            place: a number for where this process is.
            what: the place in words.
            device: of the model.
        """
        if not self.several:
            return
        ends = torch.tensor([place, -place], device=exchange_device(self._group, device))
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self._group)
        highest, lowest = ends.tolist()
        if highest != -lowest:
            raise SparseFtError(
                f"processes choose candidates together, but this one is at {what} while others are "
                "elsewhere: their first batches reach other tensors, or in another order. Give "
                "every process a first batch that runs through the same layers, or "
                "candidates=None, which needs no agreement before the end."
            )
