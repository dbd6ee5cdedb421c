"""Which entries have got gradient, in a trainer's own JSON state, for a run that is resumed."""

from __future__ import annotations

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
    seen = {name: entries for name, entries in found.items() if entries is not None}
    if not seen:
        return {}
    return {
        "steps": max(entries.looks for entries in seen.values()),
        "seen": {name: entries.encode() for name, entries in seen.items()},
    }


def begin_watching(attachment: Attachment, saved: Any, step: int) -> None:
    """Watch an attachment's entries from a run's beginning, or from where it was interrupted.

    Args:
        attachment: whose entries.
        saved: what a trainer's state holds of a callback (of several: a list of that) whose
            ``_saved`` attribute is from `saved_entries`.
        step: optimizer steps done; 0: a beginning, ``saved`` is not looked at. Where ``saved``
            lacks a mask's flags, its entries that have moved count as seen.
    """
    known = _last_of(attachment, saved) if step else {}
    flags = known.get("seen", {})
    for name, masked in attachment._masked.items():
        forget(masked)
        seen = watch_entries(masked)
        if not step:
            continue
        try:
            seen.restore(flags.get(name), int(known.get("steps", 0)), masked)
        except (ValueError, TypeError, zlib.error) as bad:
            logger.warning("%s: which entries had got gradient is unknown (%s)", name, bad)
            seen.restore(None, 0, masked)


def _last_of(attachment: Attachment, saved: Any) -> Mapping[str, Any]:
    """Return the last saved flags of masks with this attachment's names."""
    for one in reversed(saved if isinstance(saved, list) else [saved]):
        found = one.get("attributes", {}).get("_saved") if isinstance(one, Mapping) else None
        if isinstance(found, Mapping) and set(found.get("seen", ())) & set(attachment.names):
            return found
    return {}
