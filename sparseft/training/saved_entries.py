"""Which entries have got gradient, in a trainer's own JSON state, for a run that is resumed."""

from __future__ import annotations

import binascii
import logging
import zlib
from collections.abc import Mapping
from typing import Any

from sparseft.attachment import Attachment
from sparseft.modules.seen_entries import forget, seen_entries, watch_entries

__all__ = ["begin_watching", "saved_entries"]

logger = logging.getLogger(__name__)


def saved_entries(attachment: Attachment) -> dict[str, Any]:
    """Return the flags of all masks, for JSON; empty where nobody has looked."""
    found = {name: seen_entries(masked) for name, masked in attachment._masked.items()}
    return {
        name: {"looks": seen.looks, "flags": seen.encode()}
        for name, seen in found.items()
        if seen is not None
    }


def begin_watching(attachment: Attachment, saved: Any, step: int) -> None:
    """Watch an attachment's entries from a run's beginning, or from where it was interrupted.

    Args:
        attachment: whose entries.
        saved: what a trainer's state holds of a callback (of several: a list of that) whose
            ``_saved`` attribute is from `saved_entries`; None at a beginning.
        step: optimizer steps done. Where there are some and ``saved`` lacks a mask's flags, its
            entries that have moved count as seen.
    """
    known = _last_of(attachment, saved)
    for name, masked in attachment._masked.items():
        forget(masked)
        seen = watch_entries(masked)
        if not step:
            continue
        entry = known.get(name)
        flags, looks = (entry["flags"], entry["looks"]) if isinstance(entry, Mapping) else (None, 0)
        try:
            seen.restore(flags, looks, masked)
        except (ValueError, TypeError, KeyError, zlib.error, binascii.Error) as bad:
            logger.warning("%s: which entries had got gradient is unknown (%s)", name, bad)
            seen.restore(None, 0, masked)


def _last_of(attachment: Attachment, saved: Any) -> Mapping[str, Any]:
    """Return the last saved flags of masks with this attachment's names."""
    for one in reversed(saved if isinstance(saved, list) else [saved]):
        found = one.get("attributes", {}).get("_saved") if isinstance(one, Mapping) else None
        if isinstance(found, Mapping) and set(found) & set(attachment.names):
            return found
    return {}
