"""How several ranks share a training step: DDP, or FSDP2 layer by layer. `batch` is per rank.

``"ddp"``: every rank holds everything and all-reduces the gradients of what trains: of attached
masks the leaves (4 bytes an entry) and heads trained in full. DDP copies gradients into buckets of
its own (``gradient_as_bucket_view=False``, its default): a second copy that stays. It broadcasts
the model's buffers at each forward pass.

``"fsdp"``: ``fully_shard`` on each layer of the model's lists of layers, then on the model, as its
documentation has it, with its defaults: a layer's weights are freed after its forward pass and
gathered again for the backward pass (``reshard_after_forward``); those of the root, embeddings and
output layer, stay. Weights are cut by rows, and so are the gradients and the optimizer's state of
weights that train themselves (dense, gradient mask, LoRA's adapters, heads), which are
reduce-scattered. Leaves of attached masks are made after that and are not cut: leaf, index, base
value, gradient and optimizer state are on every rank; their gradients are all-reduced.

Nothing about FSDP is reckoned: a prediction runs its code, on tensors without memory and processes
that are not there (`fake_ranks`), so that what it gathers, holds and queues is what it does. DDP's
reducer is compiled and takes no such tensors: what it adds is reckoned (`ddp_buckets`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from sparseft._text import did_you_mean
from sparseft.errors import OptionError
from sparseft.profiling.communication import Communication
from sparseft.profiling.sides import Built

__all__ = [
    "SHARDINGS",
    "assumed_of",
    "check_ranks",
    "ddp_buckets",
    "ddp_communication",
    "fake_ranks",
    "layers_of",
    "sharder",
]

SHARDINGS = ("fsdp", "ddp")


def check_ranks(world_size: int, sharding: str) -> None:
    """Raise unless there is at least one rank and a known way to share.

    Raises:
        OptionError: which of the two, and what was wanted.
    """
    if not isinstance(world_size, int) or isinstance(world_size, bool) or world_size < 1:
        raise OptionError(f"{world_size=}; wanted at least one rank.")
    if sharding not in SHARDINGS:
        shown = ", ".join(map(repr, SHARDINGS))
        hint = did_you_mean(str(sharding), SHARDINGS)
        raise OptionError(f"sharding {sharding!r} is not one of {shown}.{hint}")


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of the outermost lists of layers."""
    for child in model.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            yield from child
        else:
            yield from layers_of(child)


def sharder(mesh: Any) -> Callable[[nn.Module], None]:
    """Return what cuts a model's weights over a mesh: each layer, then the rest."""

    def shard(model: nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard

        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    return shard


@contextlib.contextmanager
def fake_ranks(world_size: int) -> Iterator[Any]:
    """Be rank 0 of so many that are not there; gives their mesh. Collectives do nothing.

    Raises:
        OptionError: this process belongs to a real group.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise OptionError(
            "sharding='fsdp' is predicted by running FSDP in a group of ranks that are not there, "
            "and torch.distributed is initialised in this process: predict before "
            "init_process_group, or in a process of its own (sparseft profile)."
        )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield init_device_mesh("cpu", (world_size,))
    finally:
        dist.destroy_process_group()


def ddp_communication(built: Built) -> Communication:
    """Return what DDP exchanges in a step: gradients, and buffers before it."""
    reduced = ddp_buckets(built)
    if not reduced:
        return Communication()
    # Of quantised layers, what is no buffer in bitsandbytes but a state beside the weight.
    sent = [b for n, b in built.model.named_buffers() if not n.endswith((".scales", ".table"))]
    return Communication(all_reduced=reduced, broadcast=_bytes(sent))


def ddp_buckets(built: Built) -> int:
    """Return the bytes of DDP's buckets: a copy of the gradients of all that trains."""
    return _bytes([p for p in built.model.parameters() if p.requires_grad])


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


_COUNTED = {
    "attached": (
        "leaves and heads all-reduced",
        "frozen weights cut by rows; leaves, indices, bases, their gradients and optimizer state "
        "on every rank, all-reduced",
    ),
    "frozen": ("nothing trains: nothing to reduce, and no DDP", "weights cut by rows"),
    "lora": (
        "adapters all-reduced",
        "weights and adapters cut by rows, with the adapters' gradients and optimizer state",
    ),
}
_FULL = ("whole gradients all-reduced", "weights, gradients and optimizer state cut by rows")


def assumed_of(way: Any, world_size: int, sharding: str, base: str = "") -> tuple[str, ...]:
    """Return what a prediction for several ranks rests on, in words: what is cut, what is not."""
    if world_size == 1:
        return ()
    ddp, fsdp = _COUNTED.get(way.kind, _FULL)
    if sharding == "ddp":
        if way.kind == "frozen":
            return (f"{world_size} ranks, DDP: {ddp}",)
        return (
            f"{world_size} ranks, DDP: everything on every rank; {ddp}, with a second copy of the "
            "gradients in DDP's buckets",
        )
    quantised = "; codes cut, scales on every rank" if base else ""
    return (
        f"{world_size} ranks, FSDP2 by layer: {fsdp}{quantised}; layers gathered for each pass, "
        "the root's weights for both",
    )
