"""What one of several ranks holds of a training step that N ranks run on N batches.

As FSDP2 shards a model layer by layer. Each rank keeps 1/N of the frozen weights. A layer's are
gathered when it runs, the next layer's while it runs; the root's own, embeddings and output layer,
stay gathered from the forward pass to the end of the backward pass (`fully_shard`'s default for the
root). Compact leaves are left out of sharding (each rank scatters into its own shard): leaves,
indices, gradients and optimizer state are on every rank. So are LoRA's.

Where the weights themselves train (dense, gradient mask), their gradients and optimizer state are
sharded with them, and a layer's whole gradient exists until it is reduced.

Activations are those of one rank's batch: a workload's ``batch`` is per rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from sparseft.profiling.memory import MemoryUse
from sparseft.profiling.sides import Built

__all__ = ["Shards", "shard"]

_FULL = ("dense", "gradient_mask")


@dataclass(frozen=True)
class Shards:
    """How a model falls into pieces.

    Attributes:
        ranks: N.
        weights: bytes that are sharded.
        gathered: bytes of whole weights on a rank at once: the root's own and two layers.
        reducing: bytes of whole gradients at once, where weights train.
        trains_weights: whether gradients and optimizer state are sharded too.
    """

    ranks: int
    weights: int = 0
    gathered: int = 0
    reducing: int = 0
    trains_weights: bool = False

    @classmethod
    def of(cls, built: Built, ranks: int) -> Shards:
        """Return how ``ranks`` ranks share what was built."""
        if ranks == 1:
            return cls(1)
        full = built.way.kind in _FULL
        kept = [p for p in built.model.parameters() if p.requires_grad] if not full else []
        seen = {_key(p) for p in kept}
        layers = [_take(layer, seen) for layer in _layers(built.model)]
        root = _take(built.model, seen)
        two = sum(sorted(layers)[-2:])
        return cls(
            ranks,
            weights=sum(layers) + root,
            gathered=root + two,
            reducing=max([root, *layers]) if full else 0,
            trains_weights=full,
        )

    @property
    def assumed(self) -> tuple[str, ...]:
        """What this rests on, in words."""
        if self.ranks == 1:
            return ()
        if self.trains_weights:
            what = "weights, gradients and optimizer state sharded"
        else:
            what = "frozen weights sharded; what trains, with its optimizer state, on each"
        return (
            f"{self.ranks} ranks: {what}; two layers and the root's own weights gathered at once",
        )


def shard(use: MemoryUse, shards: Shards) -> MemoryUse:
    """Return one rank's part of what one device alone would use."""
    if shards.ranks == 1:
        return use
    n = shards.ranks
    weights = use.weights - shards.weights + -(-shards.weights // n)
    temporary = use.temporary + shards.gathered + (shards.reducing if use.gradients else 0)
    diff, gradients, optimizer = use.diff, use.gradients, use.optimizer
    if shards.trains_weights:
        diff, gradients, optimizer = (-(-x // n) for x in (diff, gradients, optimizer))
    return MemoryUse(
        weights=weights,
        diff=diff,
        gradients=gradients,
        optimizer=optimizer,
        activations=use.activations,
        temporary=temporary,
    )


def _layers(model: nn.Module) -> Iterable[nn.Module]:
    """Yield the layers of the outermost lists of layers."""
    for child in model.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            yield from child
        else:
            yield from _layers(child)


def _take(module: nn.Module, seen: set[int]) -> int:
    """Return the bytes of a module's weights that were not seen before, packed ones included."""
    found = 0
    packed = (b for b in module.buffers() if b.dtype.itemsize == 1)
    for tensor in (*module.parameters(), *packed):
        if _key(tensor) not in seen:
            seen.add(_key(tensor))
            found += tensor.untyped_storage().nbytes()
    return found


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
