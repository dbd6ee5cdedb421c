"""Which parameters globs speak of, the same for `select` and for whole runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sparseft.errors import UnknownNameError
from sparseft.modules import ParameterIndex

__all__ = ["match_names", "names_between"]

logger = logging.getLogger(__name__)


def match_names(index: ParameterIndex, patterns: str | Sequence[str], what: str) -> list[str]:
    """Return the canonical names that globs match, under any name a tied parameter has.

    Args:
        index: the model's parameters.
        patterns: globs, or one.
        what: the argument they came in, for the message, e.g. ``"exclude"`` or ``"task.exclude"``.

    Raises:
        UnknownNameError: a pattern that matches nothing; the message has the nearest names.
    """
    try:
        return index.match(patterns)
    except UnknownNameError as bad:
        raise UnknownNameError(f"{what}: {bad}") from None


def names_between(
    index: ParameterIndex, include: str | Sequence[str] | None, exclude: str | Sequence[str]
) -> list[str]:
    """Return the canonical names that ``include`` matches (None: all) and ``exclude`` does not.

    A tied parameter has several names and one weight: a glob that matches any of them speaks of it.
    So ``exclude="lm_head.*"`` leaves out an embedding that the head is tied to; a log line says so.

    Raises:
        UnknownNameError: a pattern that matches nothing.
    """
    chosen = index.names if include is None else match_names(index, include, "include")
    out = set(match_names(index, exclude, "exclude"))
    for name in chosen:
        if name in out and index.aliases(name):
            tied = ", ".join(map(repr, index.aliases(name)))
            logger.info("exclude leaves out %r, which is tied to %s", name, tied)
    return [name for name in chosen if name not in out]
