"""Whose turn it is to change a model: one thread's, and in it one asyncio task's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sparseft.errors import CompositionError

__all__ = ["Turns"]


class Turns:
    """A re-entrant lock that knows tasks, and may be given back by another thread.

    Web servers enter a generator in one thread and leave it in another, which `threading.RLock`
    cannot do; and two tasks of one thread are one owner to it.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._owner: tuple[int, asyncio.Task[Any] | None] | None = None
        self._depth = 0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wait for the turn and keep it for the length of a ``with`` block; blocks nest.

        Raises:
            CompositionError: another task of this thread has it. Waiting would stop both.
        """
        me = threading.get_ident(), _task()
        with self._free:
            while self._owner is not None and not self._is_inside(me):
                if self._owner[0] == me[0]:
                    raise CompositionError(
                        "another asyncio task of this thread is inside composed(...) or grid(...) "
                        "and waits there for something; what it put on the model must stay. Leave "
                        "the block before awaiting, or give each task its own adapters with "
                        "composer.separate()."
                    )
                self._free.wait()
            if self._owner is None:
                self._owner = me
            self._depth += 1
        try:
            yield
        finally:
            with self._free:
                self._depth -= 1
                if not self._depth:
                    self._owner = None
                    self._free.notify()

    def _is_inside(self, me: tuple[int, asyncio.Task[Any] | None]) -> bool:
        """Whether the owner asks, or code that it runs (an event loop inside a block)."""
        if self._owner is None or self._owner[0] != me[0]:
            return False
        return self._owner[1] is None or self._owner[1] is me[1]

    def __getstate__(self) -> dict[str, Any]:  # a copy is nobody's
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Turns.__init__(self)


def _task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop runs here
        return None
