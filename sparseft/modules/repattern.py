"""Move the mask of a weight in training: some entries are dropped, others are grown.

What holds afterwards, as after `attach`: ``weight[indices] == rn(base + leaf)``, everything outside
of the mask has the base's bits. Dropped entries get their base back, kept ones keep weight, base,
diff, gradient and optimizer state bit for bit, grown ones start at diff 0 with zero state. Leaves
and optimizer state are in flat ascending order again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparseft._text import did_you_mean
from sparseft.diff import MaskLike, SparsePattern, as_pattern
from sparseft.errors import AttachError, MaskError, UnknownNameError
from sparseft.modules._collective import Group
from sparseft.modules.leaves import MaskedParameter
from sparseft.modules.names import ParameterIndex
from sparseft.modules.ranks import processes
from sparseft.modules.transplant import (
    Moves,
    as_optimizers,
    check_state,
    holding,
    stepped,
    transplant_,
)
from sparseft.modules.weight_storage import read_entries, write_entries
from sparseft.ops._common import bits

__all__ = ["repattern_", "resolve_changes"]


def resolve_changes(
    index: ParameterIndex, masked: Mapping[str, MaskedParameter], masks: Mapping[str, MaskLike]
) -> list[tuple[MaskedParameter, SparsePattern]]:
    """Match new masks, under any names of their parameters, with what is masked, in its order.

    (Of sharded weights entries are read in that order, by all processes together.)

    Raises:
        UnknownNameError: a parameter that does not exist or is not masked.
        MaskError: a mask of another shape or type.
    """
    changes = []
    for given, mask in masks.items():
        name = index.resolve(given)
        if name not in masked:
            raise UnknownNameError(f"{given!r} has no mask to move.{did_you_mean(name, masked)}")
        shape = masked[name].pattern.shape
        changes.append((masked[name], as_pattern(mask, name=given, shape=shape)))
    places = {name: place for place, name in enumerate(masked)}
    return sorted(changes, key=lambda change: places[change[0].name])


@torch.no_grad()
def repattern_(
    changes: Iterable[tuple[MaskedParameter, SparsePattern]], optimizer: Any, group: Group = None
) -> int:
    """Give masked parameters other patterns; all is checked before anything changes.

    Args:
        changes: pairs of a masked parameter and where it is trained from now on, of its shape.
        optimizer: the one, or all, that hold the leaves; None, if no optimizer has seen them. Any
            other that has stepped a leaf and is alive has its state moved, too.
        group: who trains together.

    Returns:
        How many entries are new.

    Raises:
        MaskError: a pattern without an entry.
        AttachError: no optimizer, or one that does not hold a leaf, or whose state is not
            entry-wise; a count that changes while several processes train together.
        StackOrderError: something was applied on top of a weight since.

    Numerics: the leaf stays the same object. Its memory, too, where the count is unchanged (as the
        buckets of DistributedDataParallel require); otherwise ``leaf.data`` is another tensor,
        which the groups of any optimizer hold already.
    """
    optimizers = as_optimizers(optimizer)
    todo = []
    for masked, pattern in changes:
        _check_pattern(masked, pattern, 1 if group is False else processes(group))
        masked.require_top("move the mask of")
        masked.follow_weight_()
        pattern = pattern.to(masked.weight.device)
        if pattern.equals(masked.pattern):
            continue
        holders = holding(optimizers, masked.leaf)
        if optimizers and not holders and masked.leaf.requires_grad:
            raise AttachError(
                f"the leaf of {masked.name!r} is in no group of the optimizer given "
                f"({', '.join(type(o).__name__ for o in optimizers)}): its state would no longer "
                "fit. Give the one that trains it, or optimizer=None if none has been built."
            )
        holders = holding([*optimizers, *stepped()], masked.leaf)
        for optimizer in holders:
            check_state(masked.name, optimizer, masked.leaf)
        todo.append((masked, pattern, holders))
    return sum(_move_(masked, pattern, holders) for masked, pattern, holders in todo)


def _check_pattern(masked: MaskedParameter, pattern: SparsePattern, ranks: int) -> None:
    name, now = masked.name, masked.pattern
    if not pattern.nnz:
        raise MaskError(
            f"{name!r}: the new pattern keeps no entry. Leave at least one, or detach and attach "
            "without this weight."
        )
    # Leaves of a sharded weight go through LeafReduction, which looks at their sizes each time.
    if pattern.nnz != now.nnz and masked.shards is None and ranks > 1:
        raise AttachError(
            f"{name!r}: {now.nnz} entries cannot become {pattern.nnz} while {ranks} "
            "processes train together: DistributedDataParallel has buckets for the leaf's size. "
            "Keep the count of each tensor (scope='tensor')."
        )


def _move_(masked: MaskedParameter, pattern: SparsePattern, optimizers: list[Any]) -> int:
    moves = Moves.between(masked.indices, pattern.indices)
    grown = _others(moves.new, pattern.nnz)
    if masked.separate:
        masked.pattern = pattern
    else:
        _move_base_(masked, pattern, moves, grown)
    for optimizer in optimizers:
        transplant_(optimizer, masked.leaf, moves)
    _move_leaf_(masked.leaf, moves)
    return int(grown.numel())


def _move_base_(
    masked: MaskedParameter, pattern: SparsePattern, moves: Moves, grown: Tensor
) -> None:
    weight, backend, indices = masked.weight, masked.backend, masked.indices
    dropped = _others(moves.old, indices.numel())

    # Outside of the old mask the weight is the base.
    base = moves.apply(masked.base)
    fresh = read_entries(weight, pattern.indices[grown], backend=backend)
    bits(base)[grown] = bits(fresh)
    if masked.shards is not None:
        masked.shards.settle()
    write_entries(weight, indices[dropped], masked.base[dropped], backend=backend)
    masked.pattern = pattern
    masked.holder.indices, masked.holder.saved = pattern.indices, base


def _others(positions: Tensor, count: int) -> Tensor:
    """Return the positions below ``count`` that are not among the given ones, ascending."""
    rest = torch.ones(count, dtype=torch.bool, device=positions.device)
    rest[positions] = False
    return rest.nonzero().view(-1)


def _move_leaf_(leaf: nn.Parameter, moves: Moves) -> None:
    values = moves.apply(leaf.detach())
    grad = None if leaf.grad is None else moves.apply(leaf.grad)
    if values.shape == leaf.shape:
        leaf.detach().copy_(values)
        if leaf.grad is not None and grad is not None:
            leaf.grad.copy_(grad)
        return
    leaf.grad = None
    # A graph that is still alive (the last loss) keeps the node that accumulates into this leaf,
    # which expects gradients of the old size. torch makes a new one after a change of dtype only.
    leaf.data = values[:0].to(torch.float16)
    leaf.data = values
    leaf.grad = grad
