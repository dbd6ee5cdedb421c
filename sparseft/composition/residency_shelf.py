"""One memory with a byte budget, and what lies there of several adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

from torch import Tensor

from sparseft.composition.residency_copies import Copies
from sparseft.diff import SparseDiff

__all__ = ["Held", "Item", "Kind", "Parcel", "Shelf", "nbytes_of", "parts_of", "rebuilt"]

Kind: TypeAlias = Literal["diff", "dense"]
Item = TypeVar("Item", SparseDiff, Tensor)


@dataclass
class Held:
    """One diff or dense tensor.

    Args:
        item: it.
        nbytes: what it takes.
        ready: to be called before every use; None: nothing to wait for.
    """

    item: SparseDiff | Tensor
    nbytes: int
    ready: Callable[[], None] | None = None

    def use(self) -> Any:
        """Return the item, to be used on the stream that is current."""
        if self.ready is not None:
            self.ready()
        return self.item


@dataclass
class Parcel:
    """The diffs, or the dense tensors, of one adapter on one shelf: room for all, filled as used.

    Args:
        room: bytes set aside.
        copies: what makes its copies.
        held: what lies there, by tensor.
    """

    room: int
    copies: Copies
    held: dict[str, Held] = field(default_factory=dict)


class Shelf:
    """One memory and its budget (None: no limit).

    The room set aside never passes the budget, and what lies there never passes its room.
    """

    def __init__(self, budget: int | None) -> None:
        self.budget = budget
        self.parcels: dict[tuple[str, Kind], Parcel] = {}

    def room_of(self, name: str) -> int:
        return sum(parcel.room for (owner, _), parcel in self.parcels.items() if owner == name)

    @property
    def room(self) -> int:
        return sum(parcel.room for parcel in self.parcels.values())

    def bytes_of(self, name: str) -> int:
        parcels = (parcel for (owner, _), parcel in self.parcels.items() if owner == name)
        return sum(held.nbytes for parcel in parcels for held in parcel.held.values())

    def owners(self) -> set[str]:
        return {owner for owner, _ in self.parcels}

    def drop(self, name: str) -> None:
        """Forget what lies there of an adapter, if anything does."""
        for key in [key for key in self.parcels if key[0] == name]:
            del self.parcels[key]


def parts_of(item: SparseDiff | Tensor) -> list[Tensor]:
    """Return the tensors that a diff or a dense tensor is made of."""
    return [item.indices, item.values] if isinstance(item, SparseDiff) else [item]


def rebuilt(item: Item, parts: Sequence[Tensor]) -> Item:
    """Return what ``item`` is, made of these copies of its parts."""
    if isinstance(item, SparseDiff):
        return SparseDiff._trusted(parts[0], parts[1], item.shape, item.mode)
    return parts[0]


def nbytes_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
