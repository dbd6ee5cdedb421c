"""How many entries to keep, and how a total is divided over tensors and rows, exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, SupportsInt, TypeGuard

from sparseft.errors import MaskError

__all__ = ["all_nnz", "apportion", "is_integer", "is_several", "rows_of", "spread", "total_nnz"]


def is_integer(given: object) -> TypeGuard[SupportsInt]:
    """Whether it is a whole number of any kind, numpy's too, and no bool."""
    return isinstance(given, Integral) and not isinstance(given, bool)


def is_several(asked: object) -> bool:
    """Whether nnz or density is a list of numbers, not one."""
    return isinstance(asked, Sequence) and not isinstance(asked, str)


def all_nnz(nnz: object, density: object, **candidates: Any) -> list[int]:
    """Return the numbers of entries to keep, for nnz or density that may be one or a list.

    Raises:
        MaskError: as in `total_nnz`, of any of them; or an empty list.
    """
    if nnz is not None and density is not None:
        raise MaskError("give nnz=... or density=..., one of the two; got both.")
    for what, asked in (("nnz", nnz), ("density", density)):
        if is_several(asked) and not asked:
            raise MaskError(f"{what} is an empty list, wanted one number or more.")
    every: Sequence[object] = nnz if is_several(nnz) else [nnz]  # type: ignore[assignment]
    fractions: Sequence[object] = density if is_several(density) else [density]  # type: ignore[assignment]
    return [total_nnz(n, d, **candidates) for n in every for d in fractions]


def total_nnz(nnz: object, density: object, *, candidates: int, of: int, of_what: str) -> int:
    """Return the number of entries to keep.

    Args:
        nnz, density: exactly one of them; density is in (0, 1].
        candidates: entries there are to choose from.
        of: entries that density is a fraction of; the product is rounded half to even.
        of_what: what those are, for messages.

    Raises:
        MaskError: both or neither, out of range, or more than there are candidates.
    """
    if (nnz is None) == (density is None):
        got = "neither" if nnz is None else "both"
        raise MaskError(f"give nnz=... or density=..., one of the two; got {got}.")
    if nnz is not None:
        if not is_integer(nnz) or int(nnz) < 0:
            raise MaskError(f"nnz is {nnz!r}, wanted an integer >= 0.")
        count, asked = int(nnz), f"nnz={int(nnz):,}"
    else:
        if (
            isinstance(density, bool)
            or not isinstance(density, Real)
            or not 0 < float(density) <= 1
        ):
            raise MaskError(
                f"density is {density!r}, wanted a fraction in (0, 1], e.g. 0.05 for 5 %."
            )
        count = round(float(density) * of)
        asked = f"density={density} of {of:,} {of_what} = {count:,}"
        if count == 0 and of:
            raise MaskError(f"{asked}: less than one entry. Give nnz=0 if that is meant.")
    if count > candidates:
        raise MaskError(
            f"{asked} entries were asked for but there are {candidates:,} candidate entries. "
            "Lower it, or widen include/exclude."
        )
    return count


def apportion(total: int, sizes: Sequence[int]) -> list[int]:
    """Divide ``total`` in proportion to ``sizes``, exactly (largest remainders).

    Each share is ``total * size / sum(sizes)`` rounded down; the units left go to the largest
    remainders, the first on ties. Integer arithmetic; no share exceeds its size if the total does
    not exceed their sum.
    """
    whole = sum(sizes)
    if whole == 0:
        return [0] * len(sizes)
    parts = [divmod(total * size, whole) for size in sizes]
    shares = [quotient for quotient, _ in parts]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-parts[i][1], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def spread(total: int, rows: int) -> tuple[int, int]:
    """Divide ``total`` evenly over rows: (entries of every row, first rows that get one more)."""
    return divmod(total, rows) if rows else (0, 0)


def rows_of(shape: Sequence[int]) -> int:
    """Return the number of rows of a tensor: dim 0; a 0-d or 1-d tensor is one row."""
    size = math.prod(int(s) for s in shape)
    return int(shape[0]) if len(shape) > 1 and size else min(1, size)
