"""Notice that somebody changed a memory-mapped file in place, before its pages are read.

A file that is deleted, or replaced by renaming, is no concern here: the mapping keeps what it had.
A file cut short in place is: touching a page past its new end kills the process (SIGBUS). A file
rewritten in place may show other bytes than those that were checked.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

from sparseft.errors import AdapterFormatError

__all__ = ["MappedGuard"]


class MappedGuard:
    """Watches one mapped file through a descriptor of its own: a file put in its place, by
    renaming, is another file.

    What cannot be noticed: a cut between `check` and the read that follows, and a write whose time
    the file system does not tell from that of the last look (its clock may tick every few
    milliseconds).

    Args:
        descriptor: of the open file; duplicated, so the caller may close it.
        path: for messages.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        self._path = path
        self._descriptor = os.dup(descriptor)
        weakref.finalize(self, os.close, self._descriptor)
        found = os.fstat(self._descriptor)
        self._size = found.st_size
        self._written = found.st_mtime_ns
        self._checked: list[dict[str, Any]] = []
        self.rewritten = False

    def forgets(self, checked: dict[str, Any]) -> None:
        """Empty ``checked`` (views that were checked, by name) whenever a write is noticed."""
        self._checked.append(checked)

    def check(self) -> None:
        """Ask whether the file is still as it was; about a microsecond, reads nothing of it.

        After a write in place what was checked before is forgotten, so that it is checked again.

        Raises:
            AdapterFormatError: the file is shorter than it was when it was opened.
        """
        found = os.fstat(self._descriptor)
        if found.st_size < self._size:
            raise AdapterFormatError(
                f"{self._path}: the file was cut short in place after it was opened, from "
                f"{self._size:,} bytes to {found.st_size:,}; the rest cannot be read any more. "
                "Write it again and load the adapter again. (A file that is replaced by renaming, "
                "as Adapter.save does, stays whole for those who have it loaded.)"
            )
        if found.st_mtime_ns != self._written:
            self._written = found.st_mtime_ns
            self.rewritten = True
            for checked in self._checked:
                checked.clear()

    def blame(self) -> str:
        """Return the sentence that ends a message about bytes that are not what they should be."""
        if self.rewritten:
            return "The file was rewritten in place after it was opened: load the adapter again."
        return "The file is damaged or hostile."
