"""The registry of selection methods, and what a method is given and gives.

A method is a function ``fn(candidates, *, options...)`` of one of four kinds:

- ``"scores"``: yields `Piece` s covering every entry of every candidate once, in order (candidates
  by name, entries ascending). `select` keeps the best by count and scope. A piece may be a whole
  tensor, or a part of one so that memory stays small.
- ``"either"``: the same, but its scores may be bool masks, which need no count.
- ``"patterns"``: returns name -> mask for all or some candidates; counts are its own business.
- ``"structure"``: returns, for each count of its option ``nnz`` (a list), the masks and how many of
  their entries carry no score (`sparseft.selection.scopes.Kept`).

`select` fills in options named ``base``, ``tuned`` and ``seed``; for a structure also ``nnz`` and
``scope``; for scores that depend on how many will be kept, ``nnz`` is the largest count. The others
are the user's.

A method with an option ``score`` and ``**options`` builds on the scores of another one, to which
those options go: see `options_of`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor, nn

from sparseft._registry import Registered, Registry
from sparseft._text import did_you_mean
from sparseft.errors import OptionError, UnknownNameError

__all__ = [
    "PIECE",
    "Candidates",
    "Kind",
    "Piece",
    "check_options",
    "options_of",
    "pieces_of",
    "register_selector",
    "scored_by",
    "selectors",
]

Kind = Literal["scores", "either", "patterns", "structure"]

# What `select` takes for every method; a misspelt one arrives as an option.
ARGUMENTS = (
    "nnz", "density", "density_of", "scope", "include", "exclude", "base", "tuned", "seed"
)  # fmt: skip

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
        kind: "scores", "either", "patterns" or "structure" (see the module's description).
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


def scored_by(method: str, options: Mapping[str, Any]) -> Registered | None:
    """Return the method whose scores a method builds on, None for one that builds on none.

    Args:
        method: name of a registered method.
        options: given to it; ``score`` names the other.

    Raises:
        UnknownNameError: no such methods.
        OptionError: ``score`` names a method that gives masks.
    """
    entry = REGISTRY.get(method)
    kinds = {p.kind for p in inspect.signature(entry.fn).parameters.values()}
    if "score" not in entry.options or inspect.Parameter.VAR_KEYWORD not in kinds:
        return None
    score = options.get("score", entry.options["score"])
    able = [n for n, e in selectors().items() if e.traits["kind"] in ("scores", "either")]
    if not isinstance(score, str) or score not in REGISTRY.names():
        raise UnknownNameError(
            f"score={score!r} of {method!r} is no selection method."
            f"{did_you_mean(str(score), able)} Those that give scores: {', '.join(able)}."
        )
    if score not in able:
        raise OptionError(
            f"score={score!r} of {method!r} gives masks, wanted a method that gives scores: "
            f"{', '.join(able)}."
        )
    return REGISTRY.get(score)


def options_of(method: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the options a method takes, option -> default, with those of the method it scores by.

    Args:
        method: name of a registered method.
        given: options chosen so far, of which ``score`` matters.

    Raises:
        UnknownNameError, OptionError: as in `scored_by`.

    Example:
        >>> "base" in options_of("rows"), "base" in options_of("rows", {"score": "random"})
        (True, False)
    """
    below = scored_by(method, given or {})
    return {**({} if below is None else below.options), **REGISTRY.get(method).options}


def check_options(method: str, given: Mapping[str, Any]) -> None:
    """Check that a method, and the one it scores by, know the options given and got all they need.

    Raises:
        UnknownNameError: an option neither has; the message lists those they have.
        OptionError: an option without a default is missing.
    """
    below = scored_by(method, given)
    own, known = REGISTRY.get(method).options, options_of(method, given)
    for option in given:
        if option not in known:
            scored = "" if below is None else f" with score={below.name!r}"
            have = f"it has {', '.join(known)}" if known else "it has none"
            near = did_you_mean(option, dict.fromkeys([*known, *ARGUMENTS]))
            raise UnknownNameError(
                f"selection method {method!r}{scored} has no option {option!r}; {have}.{near}"
            )
    if below is None:
        REGISTRY.check_options(method, given)
        return
    REGISTRY.check_options(method, [option for option in given if option in own])
    try:
        REGISTRY.check_options(below.name, [option for option in given if option not in own])
    except OptionError as bad:
        raise OptionError(f"{method!r} with score={below.name!r}: {bad}") from None
