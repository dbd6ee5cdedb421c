"""The registry of selection methods, and what a method is given and gives.

A method is a function ``fn(candidates, *, options...)`` of one of three kinds:

- ``"scores"``: yields `Piece` s covering every entry of every candidate once, in order (candidates
  by name, entries ascending). `select` keeps the best by count and scope. A piece may be a whole
  tensor, or a part of one so that memory stays small.
- ``"either"``: the same, but its scores may be bool masks, which need no count.
- ``"patterns"``: returns name -> mask for all or some candidates; counts are its own business.

Options named ``base``, ``tuned`` and ``seed`` are filled in by `select`; the others are the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor, nn

from sparseft._registry import Registered, Registry
from sparseft._text import did_you_mean
from sparseft.errors import OptionError

__all__ = ["PIECE", "Candidates", "Kind", "Piece", "pieces_of", "register_selector", "selectors"]

Kind = Literal["scores", "either", "patterns"]

# Entries scored at a time: 1 Mi, so that the scratch of any method stays at a few megabytes.
PIECE = 1 << 20


class Piece(NamedTuple):
    """Scores of consecutive entries of one candidate.

    Args:
        name: the candidate.
        start: flat position of the first.
        scores: (n,) floating, larger is better, not negative, not NaN.
    """

    name: str
    start: int
    scores: Tensor


class Candidates(NamedTuple):
    """What may be chosen from.

    Args:
        model: the model, for methods that need more than its parameters.
        parameters: canonical name -> parameter, sorted by name, tied ones once.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in self.parameters.values())


def pieces_of(numel: int) -> Iterator[slice]:
    """Yield the slices of a walk over ``numel`` entries, `PIECE` at a time."""
    for start in range(0, numel, PIECE):
        yield slice(start, min(start + PIECE, numel))


REGISTRY = Registry("selection method")


def register_selector(
    name: str, *, reference: str, kind: Kind = "scores", zero: str = "have score 0"
) -> Callable[[Callable[..., Any]], Any]:
    """Register a selection method under ``name``; its keyword-only parameters are its options.

    Args:
        name: what users pass as ``method``.
        reference: address of the paper or page it comes from.
        kind: "scores", "either" or "patterns" (see the module's description).
        zero: what a score of exactly 0 says of entries, for the warning when some are kept.

    Example:
        >>> from sparseft.selection import Piece, register_selector
        >>> @register_selector("weight_size", reference="https://example.org")
        ... def select_weight_size(candidates, *, power: float = 1.0):
        ...     for name, weight in candidates.parameters.items():
        ...         yield Piece(name, 0, weight.detach().float().abs().flatten() ** power)
        >>> from sparseft.selection.registry import REGISTRY; REGISTRY.unregister("weight_size")
    """
    if kind not in get_args(Kind):
        raise OptionError(
            f"kind={kind!r} is not one of {', '.join(map(repr, get_args(Kind)))}."
            f"{did_you_mean(str(kind), get_args(Kind))}"
        )
    return REGISTRY.register(name, reference=reference, kind=kind, zero=zero)


def selectors() -> dict[str, Registered]:
    """Return the registered methods by name, with reference, options and summary."""
    return {name: REGISTRY.get(name) for name in REGISTRY.names()}
