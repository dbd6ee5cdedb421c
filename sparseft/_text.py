"""Wording shared by error messages and tables."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean", "human_bytes", "nearest"]


def nearest(name: str, choices: Iterable[str], n: int = 3) -> list[str]:
    """Return up to ``n`` of ``choices`` closest in spelling to ``name``, best first."""
    return difflib.get_close_matches(name, list(choices), n=n, cutoff=0.5)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return ``" Did you mean 'a' or 'b'?"``, or ``""`` when nothing is close."""
    found = nearest(name, choices)
    return f" Did you mean {' or '.join(repr(c) for c in found)}?" if found else ""


def human_bytes(n: float) -> str:
    """Return ``n`` bytes in binary units, e.g. ``"12.3 MiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"
