"""Find a value by the identity of a key, without keeping the value alive.

As `weakref.WeakValueDictionary` does, but of plain dicts and references alone: look-ups are then
traced by torch.compile, and an optimizer's step with its hooks is one graph. The tracer iterates
over such a dict, and a model may be freed meanwhile, so only `put` and `remove` change its size.
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
        self._gone: list[int] = []  # keys of values that died, to be dropped by the next `put`

    def get(self, key: object) -> Value | None:
        """Return the value of this very object, None if there is none."""
        reference = self._found.get(id(key))
        return None if reference is None else reference()

    def put(self, key: object, value: Value) -> None:
        """Keep ``value`` for ``key``, weakly, in place of any before."""
        self._drop_gone()
        note = functools.partial(self._note, id(key))
        self._found[id(key)] = weakref.ref(value, note)

    def remove(self, key: object) -> None:
        """Forget the value of ``key``, if there is one."""
        self._found.pop(id(key), None)

    def values(self) -> list[Value]:
        """Return all values alive, the first one put first."""
        alive = (reference() for reference in list(self._found.values()))
        return [value for value in alive if value is not None]

    def _note(self, key: int, dead: weakref.ref[Value]) -> None:
        self._gone.append(key)

    def _drop_gone(self) -> None:
        while self._gone:
            key = self._gone.pop()
            reference = self._found.get(key)
            # The address may have been taken by another key meanwhile.
            if reference is not None and reference() is None:
                del self._found[key]
