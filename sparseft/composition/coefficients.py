"""What users write for "these adapters, with these coefficients", turned into one checked form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Real

import torch
from torch import Tensor

from sparseft._text import did_you_mean
from sparseft.errors import CompositionError, UnknownNameError

__all__ = ["Coeffs", "Which", "as_choices", "as_coeffs", "check_coeff"]

# One name, several names (coefficient 1), or name -> coefficient.
Which = str | Sequence[str] | Mapping[str, float]
Coeffs = float | Sequence[float] | Mapping[str, float] | None

_LARGEST = torch.finfo(torch.float32).max


def check_coeff(name: str, value: object) -> float:
    """Return a coefficient as a float.

    Raises:
        CompositionError: not a real number, NaN, infinite, or beyond float32.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise CompositionError(
            f"coefficient of {name!r} is {value!r} ({type(value).__name__}), wanted a number."
        )
    number = float(value)
    if not math.isfinite(number) or abs(number) > _LARGEST:
        raise CompositionError(
            f"coefficient of {name!r} is {number}, wanted a finite number (0 leaves the adapter "
            "out)."
        )
    return number


def as_coeffs(which: Which, coeffs: Coeffs, known: Iterable[str]) -> dict[str, float]:
    """Return name -> coefficient, in the order given.

    Args:
        which: a name, names, or a mapping from name to coefficient.
        coeffs: None (1 each), one number for all, one per name in order, or name -> number.
        known: the names there are.

    Raises:
        UnknownNameError: a name that is not known; the message has the nearest.
        CompositionError: a wrong number of coefficients, a name twice, a coefficient that is not a
            finite number, or coefficients given twice.
    """
    if isinstance(which, str):
        names = [which]
    elif isinstance(which, Iterable):
        names = list(which)
    else:
        raise CompositionError(
            f"adapters are named by {which!r} ({type(which).__name__}); wanted a name, several, or "
            "a mapping of name to coefficient."
        )
    if isinstance(which, Set) and isinstance(coeffs, Sequence):
        raise CompositionError(
            f"{len(names)} adapters were named by a set, which has no order, and coefficients in "
            "order; name them in a list, or give name -> coefficient."
        )
    known = list(known)
    for name in names:
        if name not in known:
            have = f" There are: {', '.join(known)}." if known else " None has been added."
            raise UnknownNameError(
                f"no adapter is called {name!r}.{did_you_mean(str(name), known)}{have}"
            )
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise CompositionError(
            f"adapter {twice[0]!r} is named {names.count(twice[0])} times; name it once and give "
            "it the sum of the coefficients."
        )
    if isinstance(which, Mapping):
        if coeffs is not None:
            raise CompositionError(
                "coefficients were given twice: in the mapping of names and in coeffs; give one."
            )
        return {n: check_coeff(n, c) for n, c in which.items()}
    if coeffs is None:
        return dict.fromkeys(names, 1.0)
    if isinstance(coeffs, Mapping):
        if set(coeffs) != set(names):
            raise CompositionError(
                f"coeffs names {sorted(coeffs)} but the adapters are {sorted(names)}; name each "
                "adapter once."
            )
        return {n: check_coeff(n, coeffs[n]) for n in names}
    if isinstance(coeffs, Real) or (isinstance(coeffs, Tensor) and coeffs.ndim == 0):
        return {n: check_coeff(n, coeffs) for n in names}
    if isinstance(coeffs, str) or not isinstance(coeffs, Iterable):
        raise CompositionError(
            f"coeffs is {coeffs!r} ({type(coeffs).__name__}); wanted a number, one per adapter, or "
            "name -> number."
        )
    given = list(coeffs)
    if len(given) != len(names):
        raise CompositionError(
            f"{len(given)} coefficients were given for {len(names)} adapters ({', '.join(names)}); "
            "give one per adapter, in that order."
        )
    return {n: check_coeff(n, c) for n, c in zip(names, given, strict=True)}


def as_choices(coeffs: Mapping[str, float | Sequence[float]]) -> dict[str, list[float]]:
    """Return name -> the coefficients that `Composer.grid` tries.

    Raises:
        CompositionError: no mapping, no coefficient for a name, or one that is not a finite number.
    """
    if not isinstance(coeffs, Mapping) or not coeffs:
        raise CompositionError(
            f"grid wants name -> coefficient or coefficients, got {coeffs!r}; for example "
            "{'sw': [0.5, 1.0], 'nli': 1}."
        )
    found = {}
    for name, given in coeffs.items():
        several = isinstance(given, Iterable) and not (isinstance(given, Tensor) and not given.ndim)
        values = list(given) if several and not isinstance(given, str) else [given]  # type: ignore[arg-type]
        if not values:
            raise CompositionError(f"grid got no coefficient for {name!r}; wanted at least one.")
        found[name] = [check_coeff(name, value) for value in values]
    return found
