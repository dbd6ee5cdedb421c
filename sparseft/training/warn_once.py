"""Warnings that name tensors, each once for an attachment, whoever watches it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from typing import Any

from sparseft._text import first_of
from sparseft.attachment import Attachment

__all__ = ["named", "warn_once"]

_given: weakref.WeakKeyDictionary[Attachment, set[str]] = weakref.WeakKeyDictionary()


def warn_once(
    logger: logging.Logger, attachment: Attachment, about: str, text: str, *args: Any
) -> None:
    """Log a warning unless this attachment has had one about the same."""
    given = _given.setdefault(attachment, set())
    if about not in given:
        given.add(about)
        logger.warning(text, *args)


def named(rows: Iterable[tuple[str, int, int]]) -> str:
    """Return ``"a (3 of 10), b (1 of 4) and 7 more"`` of (name, count, of) triples, most first."""
    ranked = sorted(rows, key=lambda row: (-row[1], row[0]))
    return first_of([f"{name} ({count:,} of {of:,})" for name, count, of in ranked])
