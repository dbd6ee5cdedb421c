"""Bytes that one of several ranks exchanges in a training step, by kind of collective.

Payload: what is reduced or gathered, in bytes. An all-reduce's is the tensor summed up, a
broadcast's the tensor sent; an all-gather's is the whole tensor that comes out, a reduce-scatter's
the whole one that goes in, as NCCL and nccl-tests count them.

On the wire: what a ring of N ranks makes each of them send (Patarasuk and Yuan, "Bandwidth optimal
all-reduce algorithms for clusters of workstations", J. Parallel Distrib. Comput. 69, 2009; the
factors of nccl-tests' doc/PERFORMANCE.md):

=================== ==================
all-reduce          2 (N - 1) / N
all-gather          (N - 1) / N
reduce-scatter      (N - 1) / N
broadcast           1
=================== ==================

Other algorithms (trees, multicast in switches) send other amounts; gloo, on a CPU, makes an
all-reduce of each reduce-scatter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["COLLECTIVES", "Communication", "Counter"]

COLLECTIVES = ("all_reduced", "all_gathered", "reduce_scattered", "broadcast")
# Operations of torch.distributed by name: what they are, and the place of the argument that counts.
_OPERATIONS = {
    "allreduce_": ("all_reduced", 0),
    "allreduce_coalesced_": ("all_reduced", 0),
    "broadcast_": ("broadcast", 0),
    "_allgather_base_": ("all_gathered", 0),
    "allgather_": ("all_gathered", 0),
    "allgather_into_tensor_coalesced_": ("all_gathered", 0),
    "_reduce_scatter_base_": ("reduce_scattered", 1),
    "reduce_scatter_": ("reduce_scattered", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scattered", 1),
}


@dataclass(frozen=True, kw_only=True)
class Communication:
    """Payload of a step's collectives in bytes, by kind (the module's text defines them).

    Example:
        >>> Communication(all_reduced=1000, all_gathered=400).on_the_wire(4)
        1800
    """

    all_reduced: int = 0
    all_gathered: int = 0
    reduce_scattered: int = 0
    broadcast: int = 0

    @property
    def payload(self) -> int:
        """All four together."""
        return sum(asdict(self).values())

    def on_the_wire(self, ranks: int) -> int:
        """Return the bytes that each of so many ranks in a ring sends."""
        passes = 2 * self.all_reduced + self.all_gathered + self.reduce_scattered
        return round(passes * (ranks - 1) / ranks) + (self.broadcast if ranks > 1 else 0)

    def to_json(self, ranks: int) -> dict[str, int]:
        """Return the four, and what they come to on the wire."""
        return {**asdict(self), "on_the_wire": self.on_the_wire(ranks)}

    @classmethod
    def from_json(cls, data: Mapping[str, int]) -> Communication:
        """Return what `to_json` wrote."""
        return cls(**{name: data[name] for name in COLLECTIVES})


class Counter:
    """Adds up the collectives among the operations that it is shown.

    Attributes:
        found: bytes by kind.
    """

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    def see(self, func: Any, args: tuple[Any, ...]) -> None:
        """Count ``func`` if it is a collective; with the arguments that it was called with."""
        if func.namespace != "c10d":
            return
        kind, place = _OPERATIONS.get(func.name().split("::")[1].split(".")[0], ("", 0))
        if kind:
            tensors = (t for t in tree_leaves(args[place]) if isinstance(t, Tensor))
            size = sum(t.numel() * t.element_size() for t in tensors)
            self.found[kind] = self.found.get(kind, 0) + size

    def total(self) -> Communication:
        """Return what was seen so far."""
        return Communication(**self.found)
