"""Move what an optimizer keeps per entry of a compact leaf when its mask moves.

Every tensor of the leaf's shape moves entry by entry, bit for bit; an entry that is new starts at
zero; scalars (step counts) stay. That holds for all of torch.optim's entry-wise rules and for ours.

(Tried for AdamW: a new entry's second moment from the squared gradient by which it was grown. Its
first steps are then short, it is the next to be dropped, and of 80 entries that a teacher-student
problem is about 43 were found instead of 78.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparseft.errors import AttachError
from sparseft.modules.traced import once_while_traced
from sparseft.modules.weak_table import WeakTable
from sparseft.ops._common import bits
from sparseft.ops._moments import QUANTUM, decode_moment, encode_moment_, scales_of

__all__ = [
    "Moves",
    "as_optimizers",
    "check_optimizer",
    "check_state",
    "holding",
    "note_step",
    "stepped",
    "transplant_",
]

# Those that have stepped a leaf, by id: an entry goes with its optimizer.
_stepped: WeakTable[Optimizer] = WeakTable()


@dataclass(frozen=True)
class Moves:
    """Which entries of the old order are which of the new one.

    Args:
        old: (kept,) int64 positions in the old order, ascending.
        new: (kept,) int64 positions of the same entries in the new order, ascending.
        count: entries in the new order.
    """

    old: Tensor
    new: Tensor
    count: int

    @classmethod
    def between(cls, before: Tensor, after: Tensor) -> Moves:
        """Match two vectors of ascending flat indices, of one device and dtype."""
        if not before.numel():
            none = torch.empty(0, dtype=torch.int64, device=after.device)
            return cls(none, none, after.numel())
        place = torch.searchsorted(before, after).clamp_(max=before.numel() - 1)
        new = (before[place] == after).nonzero().view(-1)
        return cls(place[new], new, after.numel())

    def apply(self, x: Tensor) -> Tensor:
        """Return (count,) entries: the kept ones of ``x``, moved bit for bit, zeros elsewhere."""
        out = x.new_zeros(self.count)
        target, source = (bits(t) if t.is_floating_point() else t for t in (out, x))
        target[self.new.to(x.device)] = source[self.old.to(x.device)]
        return out


# In a compiled step this is done while it is traced, once: the table is no input of the graph.
@once_while_traced
def note_step(optimizer: Optimizer) -> bool:
    """Remember, weakly, that an optimizer has stepped a leaf: it may have state of it."""
    if _stepped.get(optimizer) is None:
        _stepped.put(optimizer, optimizer)
        if _forget not in optimizer._optimizer_load_state_dict_post_hooks.values():
            optimizer.register_load_state_dict_post_hook(_forget)
    return True


def _forget(optimizer: Optimizer) -> None:
    """Load post-hook: the state that it has now belongs to masks that are loaded, too.

    (torch.distributed.checkpoint makes a step of lr 0 for state to load into, and loads the
    optimizer before the model, whose masks then move.)
    """
    if _stepped.get(optimizer) is optimizer:
        _stepped.remove(optimizer)


def stepped() -> list[Optimizer]:
    """Return the optimizers alive that have stepped any leaf."""
    return _stepped.values()


def check_optimizer(optimizer: Any) -> None:
    """Raise AttachError for what is no optimizer, nor a wrapper that shows groups and state."""
    if not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "state")):
        got = repr(optimizer) if isinstance(optimizer, str) else type(optimizer).__name__
        raise AttachError(
            f"wanted the optimizer that trains the leaves, got {got}. Pass the torch.optim "
            "optimizer itself, built from attachment.parameters()."
        )


def as_optimizers(given: Any) -> list[Any]:
    """Return one optimizer, several or None as a list.

    Raises:
        AttachError: something else, or an empty sequence.
    """
    if given is None:
        return []
    several = isinstance(given, Sequence) and not isinstance(given, str)
    optimizers = list(given) if several else [given]
    if not optimizers:
        raise AttachError(
            f"optimizer={given!r} names none. Pass the one that trains the leaves, or None before "
            "there is one."
        )
    for optimizer in optimizers:
        check_optimizer(optimizer)
    return optimizers


def holding(optimizers: Iterable[Any], leaf: nn.Parameter) -> list[Any]:
    """Return the optimizers with ``leaf`` in one of their groups, one for each state of it.

    A wrapper (accelerate's) and what it wraps have the same state, which must not move twice.
    """
    found: dict[int, Any] = {}
    for optimizer in optimizers:
        if any(p is leaf for group in optimizer.param_groups for p in group["params"]):
            state = optimizer.state.get(leaf)
            found.setdefault(id(optimizer if state is None else state), optimizer)
    return list(found.values())


def _eight_bit(state: Mapping[str, Any]) -> list[str]:
    """Return the moments kept as codes with scales, as `sparseft.SparseAdamW` keeps them."""
    codes = (key.removesuffix("_code") for key in state if key.endswith("_code"))
    return [name for name in codes if f"{name}_scale" in state]


def check_state(name: str, optimizer: Any, leaf: nn.Parameter) -> None:
    """Raise AttachError where a leaf's state is not entry-wise: it could not be moved.

    Args:
        name: of the masked parameter.
        optimizer: one that holds the leaf.
        leaf: the leaf, before any change.
    """
    state = optimizer.state.get(leaf, {})
    coded = {f"{n}{end}" for n in _eight_bit(state) for end in ("_code", "_scale")}
    for key, value in state.items():
        if key in coded or isinstance(value, int | float | str | None):
            continue
        if isinstance(value, Tensor):
            scalar = value.numel() == 1 and value.shape != leaf.shape
            if scalar or (value.shape == leaf.shape and value.is_floating_point()):
                continue
            got = f"{value.dtype} of shape {tuple(value.shape)}"
        else:
            got = f"a {type(value).__name__}"
        raise AttachError(
            f"{type(optimizer).__name__} keeps {key!r} of the leaf of {name!r} as {got}; only "
            f"floating tensors of the leaf's shape {tuple(leaf.shape)} and scalars can move with a "
            "mask. Use an entry-wise optimizer: torch.optim.AdamW, SGD, sparseft.SparseAdamW."
        )


def transplant_(optimizer: Any, leaf: nn.Parameter, moves: Moves) -> None:
    """Bring a leaf's state, checked before, to the new order.

    In place where the number of entries is unchanged: tensors keep their addresses.

    Numerics: bit for bit, but for 8-bit moments whose block of 256 gets entries of several old
        blocks: those take a new scale and are rounded once more, as at each step.
    """
    state = optimizer.state.get(leaf)
    if not state:
        return
    shape = leaf.shape
    eight = _eight_bit(state)
    for name in eight:
        code, scale = _move_codes(state[f"{name}_code"], state[f"{name}_scale"], moves)
        _put(state, f"{name}_code", code)
        _put(state, f"{name}_scale", scale)
    done = {f"{name}_code" for name in eight} | {f"{name}_scale" for name in eight}
    for key, value in list(state.items()):
        if key not in done and isinstance(value, Tensor) and value.shape == shape:
            _put(state, key, moves.apply(value))


def _put(state: dict[str, Any], key: str, value: Tensor) -> None:
    if state[key].shape == value.shape:
        state[key].copy_(value)
    else:
        state[key] = value


def _move_codes(codes: Tensor, scales: Tensor, moves: Moves) -> tuple[Tensor, Tensor]:
    """Return codes and scales in the new order."""
    blocks = scales_of(moves.count)
    moved = torch.zeros(moves.count, dtype=codes.dtype, device=codes.device)
    moment = moves.apply(decode_moment(codes, scales))
    new_scales = scales.new_zeros(blocks)
    encode_moment_(moment, moved, new_scales)
    # Blocks with entries of one old block keep its scale, and so their codes.
    at, origin = moves.new // QUANTUM, moves.old // QUANTUM
    low = torch.full((blocks,), scales.numel(), dtype=torch.int64, device=codes.device)
    high = torch.full_like(low, -1)
    low.scatter_reduce_(0, at, origin, "amin")
    high.scatter_reduce_(0, at, origin, "amax")
    single = low == high
    new_scales[single] = scales[low[single]]
    entries = single.repeat_interleave(QUANTUM)[: moves.count]
    return torch.where(entries, moves.apply(codes), moved), new_scales
