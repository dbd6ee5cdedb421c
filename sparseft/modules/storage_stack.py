"""Who has changed a parameter in place, in order: a last-in-first-out stack per parameter.

`attach` and `Composer.apply` push a `Holder` with the entries they overwrite, and pop it when they
put them back. Out of order is refused by name: restoring under somebody else's change would bring
back bits that never were a model (P3).
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseft.errors import StackOrderError
from sparseft.modules.weight_storage import is_sharded, write_entries

__all__ = ["Holder", "bottom_value", "holders", "parents_of", "pop", "push", "require_top"]


@dataclass(eq=False)
class Holder:
    """One change of one parameter: what it overwrote, and who to name in an error.

    It must not reference the parameter, which could never be freed then.

    Args:
        label: who, e.g. ``"attach"`` or ``"Composer(sw + nli)"``.
        indices: (nnz,) flat positions overwritten; None when the whole tensor was.
        saved: (nnz,), or the tensor's shape, the overwritten values in the parameter's dtype.
        parents: content digests of the adapters it put in, in canonical order; `attach` has none.
    """

    label: str
    indices: Tensor | None
    saved: Tensor
    parents: tuple[str, ...] = ()


class _Stacks:
    """Parameter -> its holders, forgotten with the parameter; compared by identity.

    torch's WeakTensorKeyDictionary does the same at five times the price, which a switch of two
    hundred parameters pays six hundred times. As in `sparseft.modules.weak_table`, what dies does
    not change the dict's size: torch.compile may be iterating over it.
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[weakref.ref[Any], list[Holder]]] = {}
        self._gone: list[int] = []

    def get(self, parameter: Tensor) -> list[Holder] | None:
        entry = self._found.get(id(parameter))
        if entry is None:
            return None
        alive = entry[0]()
        if alive is parameter:
            return entry[1]
        # Whoever keeps the parameter, see `push`: while that lives, so does the parameter.
        return None if alive is None or isinstance(alive, Tensor) else entry[1]

    def made(self, parameter: Tensor, keeper: object | None = None) -> list[Holder]:
        """Return the stack of a parameter, a new one if it has none."""
        stack = self.get(parameter)
        if stack is None:
            self._drop_gone()
            key, stack = id(parameter), []
            # A model that is dropped while changed leaves no values here.
            note = functools.partial(self._note, key, stack)
            self._found[key] = (weakref.ref(parameter if keeper is None else keeper, note), stack)
        return stack

    def forget(self, parameter: Tensor) -> None:
        """Drop a parameter's stack."""
        self._found.pop(id(parameter), None)

    def _note(self, key: int, stack: list[Holder], dead: weakref.ref[Any]) -> None:
        stack.clear()
        self._gone.append(key)

    def _drop_gone(self) -> None:
        while self._gone:
            key = self._gone.pop()
            # The address may have been taken by another parameter meanwhile.
            if key in self._found and self._found[key][0]() is None:
                del self._found[key]

    def __len__(self) -> int:
        return sum(reference() is not None for reference, _ in list(self._found.values()))


_stacks = _Stacks()


def holders(parameter: Tensor) -> tuple[Holder, ...]:
    """Return the holders on a parameter, the first pushed first."""
    return tuple(_stacks.get(parameter) or ())


def push(parameter: Tensor, holder: Holder, *, keeper: object | None = None) -> None:
    """Put ``holder`` on top of the stack of ``parameter``, before the parameter is changed.

    Args:
        parameter: what will be changed.
        holder: who changes it.
        keeper: an object that keeps the parameter alive as long as it lives. Of a sharded parameter
            it is watched in its place: torch casts and moves a DTensor by a swap of insides, which
            it refuses where a weak reference watches.
    """
    _stacks.made(parameter, keeper if is_sharded(parameter) else None).append(holder)


def require_top(parameter: Tensor, holder: Holder, *, name: str, action: str) -> None:
    """Check that ``holder`` changed ``parameter`` last.

    Args:
        parameter: the parameter.
        holder: who wants to write.
        name: the parameter's name, for the message.
        action: what is about to happen, e.g. ``"detach"`` or ``"revert"``.

    Raises:
        StackOrderError: somebody else changed it since, or the holder is not on the stack.
    """
    stack = _stacks.get(parameter) or []
    if stack and stack[-1] is holder:
        return
    if not any(h is holder for h in stack):
        raise StackOrderError(
            f"cannot {action} {name!r}: {holder.label} no longer holds it (it was put back "
            "already, or the parameter was replaced by another object)."
        )
    above = [h.label for h in stack[[h is holder for h in stack].index(True) + 1 :]]
    raise StackOrderError(
        f"cannot {action} {name!r}: {' and then '.join(above)} changed it after {holder.label}. "
        f"Undo {above[-1]} first: the last one on is the first one off."
    )


def pop(parameter: Tensor, holder: Holder, *, name: str = "parameter") -> None:
    """Take ``holder`` off the stack, once the parameter has its saved values back.

    Raises:
        StackOrderError: it is not on top.
    """
    stack = _stacks.get(parameter) or []
    if not stack or stack[-1] is not holder:
        require_top(parameter, holder, name=name, action="release")
    # An empty list stays, as long as the parameter does: the next change comes soon.
    stack.pop()
    if not stack and is_sharded(parameter):
        _stacks.forget(parameter)  # the next change has another keeper


def bottom_value(parameter: Tensor) -> Tensor:
    """Return the tensor as it was before every holder: the bottom base.

    The parameter itself (detached) when nobody holds it, else a copy; sharded as it is.
    """
    stack = holders(parameter)
    value = parameter.detach()
    if not stack:
        return value
    value = value.clone(memory_format=torch.contiguous_format)
    for holder in reversed(stack):
        saved = holder.saved.detach().to(device=value.device, dtype=value.dtype)
        if holder.indices is None:
            value.copy_(saved)
        else:
            write_entries(value, holder.indices.to(value.device), saved)
    return value


def parents_of(parameter: Tensor) -> tuple[str, ...]:
    """Return the digests of the adapters that lie on a parameter, the lowest first."""
    return tuple(digest for holder in holders(parameter) for digest in holder.parents)
