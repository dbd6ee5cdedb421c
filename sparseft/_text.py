"""Wording shared by error messages and tables."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

__all__ = ["did_you_mean", "first_of", "human_bytes", "nearest", "parse_bytes"]

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}
_UNITS |= {f"{p}IB": 1024 ** (i + 1) for i, p in enumerate("KMGT")}


def nearest(name: str, choices: Iterable[str], n: int = 3) -> list[str]:
    """Return up to ``n`` of ``choices`` closest in spelling to ``name``, best first."""
    return difflib.get_close_matches(name, list(choices), n=n, cutoff=0.5)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return ``" Did you mean 'a' or 'b'?"``, or ``""`` when nothing is close."""
    found = nearest(name, choices)
    return f" Did you mean {' or '.join(repr(c) for c in found)}?" if found else ""


def first_of(names: Sequence[str], shown: int = 5) -> str:
    """Return ``"a, b, c, d, e and 2 more"``."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def human_bytes(n: float) -> str:
    """Return ``n`` bytes in binary units, e.g. ``"12.3 MiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def parse_bytes(given: int | str) -> int:
    """Return a number of bytes given as one, or as text: ``"2GiB"``, ``"1.5 GB"``, ``"4096"``.

    ``KiB`` is 1024, ``kB`` is 1000; upper and lower case mean the same.

    Raises:
        ValueError: negative, not a whole number of bytes, or not understood; says what it got.
    """
    if isinstance(given, int) and not isinstance(given, bool) and given >= 0:
        return given
    if isinstance(given, str):
        found = re.fullmatch(r"\s*(\d+|\d*\.\d+)\s*([A-Za-z]*)\s*", given)
        unit = _UNITS.get(found[2].upper()) if found else None
        if found and unit is not None:
            return round(float(found[1]) * unit) if "." in found[1] else int(found[1]) * unit
    raise ValueError(
        f"{given!r} is no number of bytes; wanted an int of 0 or more, or text such as '2GiB', "
        "'500 MB' or '4096'."
    )
