"""Find a value by the identity of a key, without keeping the value alive.

As `weakref.WeakValueDictionary` does, but of plain dicts and references alone: look-ups are then
traced by torch.compile, and an optimizer's step with its hooks is one graph.
"""

from __future__ import annotations

import functools
import weakref
from typing import Generic, TypeVar

__all__ = ["WeakTable"]

Value = TypeVar("Value")


class WeakTable(Generic[Value]):
    """``id(key)`` -> value, forgotten with the value; a value has to hold its key alive."""

    def __init__(self) -> None:
        self._found: dict[int, weakref.ref[Value]] = {}

    def get(self, key: object) -> Value | None:
        """Return the value of this very object, None if there is none."""
        reference = self._found.get(id(key))
        return None if reference is None else reference()

    def put(self, key: object, value: Value) -> None:
        """Keep ``value`` for ``key``, weakly, in place of any before."""
        gone = functools.partial(self._drop, id(key))
        self._found[id(key)] = weakref.ref(value, gone)

    def remove(self, key: object) -> None:
        """Forget the value of ``key``, if there is one."""
        self._found.pop(id(key), None)

    def values(self) -> list[Value]:
        """Return all values alive, the first one put first."""
        alive = (reference() for reference in list(self._found.values()))
        return [value for value in alive if value is not None]

    def _drop(self, key: int, dead: weakref.ref[Value]) -> None:
        # The address may have been taken by another key meanwhile.
        if self._found.get(key) is dead:
            del self._found[key]
