"""What several adapters' values at one entry become: the rules, and their plain-torch definition.

A rule sees weighted values ``w_i = rn(coeff_i * value_i)`` in fp32 (fp64 if any values are) in the
canonical order of the adapters. Its result is added to the base by the caller, who rounds once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sparseft._text import did_you_mean
from sparseft.errors import OptionError
from sparseft.ops._common import accumulation_dtype

__all__ = ["KINDS", "MEANS", "VOTES", "Kind", "Mean", "Rule", "Term", "Vote", "combine"]

Kind = Literal["sum", "elect", "largest", "consensus"]
Vote = Literal["sum", "count"]
Mean = Literal["count", "weights", "none"]
KINDS: tuple[str, ...] = get_args(Kind)
VOTES: tuple[str, ...] = get_args(Vote)
MEANS: tuple[str, ...] = get_args(Mean)


class Term(NamedTuple):
    """What one adapter brings to one tensor, or to several tensors laid end to end.

    Args:
        coeff: its coefficient, not 0.
        values: (nnz,) floating, its diff values.
        positions: (nnz,) int32 or int64, where they lie in the union of all adapters' entries,
            ascending and unique; None when they are the whole union.
    """

    coeff: float
    values: Tensor
    positions: Tensor | None


@dataclass(frozen=True)
class Rule:
    """How weighted values that meet at one entry become one number.

    ``"sum"``
        ``sum_i w_i``.
    ``"elect"``
        The sign of ``sum_i w_i`` (``vote="sum"``) or of ``sum_i sign(w_i)`` (``"count"``) is
        elected; the ``w_i`` of that sign are added up, and divided by their number
        (``mean="count"``), by the sum of their ``|coeff_i|`` (``"weights"``) or by nothing
        (``"none"``). A zero elects no sign and leaves the base as it is.
    ``"largest"``
        The ``w_i`` of largest magnitude; of equals the first in canonical order.
    ``"consensus"``
        ``t = sum_i w_i`` where at least ``least`` adapters agree that it is theirs, ``|w_i| >=
        strength * |t - w_i|``; elsewhere nothing.

    Args:
        kind: the rule.
        vote, mean: of ``"elect"``.
        least, strength: of ``"consensus"``.

    Raises:
        OptionError: a choice that there is not, or a number out of range.
    """

    kind: Kind = "sum"
    vote: Vote = "sum"
    mean: Mean = "count"
    least: int = 2
    strength: float = 1.0

    def __post_init__(self) -> None:
        for what, got, choices in (
            ("kind", self.kind, KINDS),
            ("vote", self.vote, VOTES),
            ("mean", self.mean, MEANS),
        ):
            if got not in choices:
                raise OptionError(
                    f"{what} is {got!r}, wanted one of {', '.join(map(repr, choices))}."
                    f"{did_you_mean(str(got), choices)}"
                )
        if self.least < 1:
            raise OptionError(f"least is {self.least}, wanted a number of adapters, 1 or more.")
        if not 0 <= self.strength < float("inf"):
            raise OptionError(f"strength is {self.strength}, wanted a finite number >= 0.")

    def among(self, adapters: int) -> Rule:
        """Return the rule for so many adapters: no more can be asked to agree than there are."""
        least = max(1, min(self.least, adapters))
        return self if least == self.least else replace(self, least=least)


def combine(terms: Sequence[Term], size: int, rule: Rule) -> Tensor:
    """Combine the adapters' values on the union of their entries.

    Args:
        terms: in canonical order, at least one.
        size: entries of the union.
        rule: how.

    Returns:
        (size,) float32, or float64 if any values are. Entries to which nothing is added hold -0.0,
        which leaves every base value as it is, zeros of either sign included.

    Numerics: coefficients are rounded to the accumulation dtype; products, sums and quotients are
    rounded one by one (no fused multiply-add), in the order of ``terms``.
    """
    wide = accumulation_dtype(*(t.values.dtype for t in terms))
    device = terms[0].values.device
    weighted = [_weighted(t, wide) for t in terms]
    if rule.kind == "largest":
        return _largest(terms, weighted, size, wide)
    total = torch.full((size,), -0.0, dtype=wide, device=device)
    for term, own in zip(terms, weighted, strict=True):
        _add(total, term.positions, own)
    if rule.kind == "sum":
        return total
    if rule.kind == "consensus":
        agreeing = torch.zeros(size, dtype=torch.int32, device=device)
        for term, own in zip(terms, weighted, strict=True):
            rest = (_at(total, term.positions) - own).abs()
            _add(agreeing, term.positions, (own.abs() >= rest * rule.strength).int())
        return total.masked_fill_(agreeing < rule.least, -0.0)
    ballot = total
    if rule.vote == "count":
        ballot = torch.zeros(size, dtype=torch.int32, device=device)
        for term, own in zip(terms, weighted, strict=True):
            _add(ballot, term.positions, own.sign().int())
    elected = ballot.sign().to(wide)
    chosen = torch.full((size,), -0.0, dtype=wide, device=device)
    divisor = torch.zeros(size, dtype=wide, device=device)
    for term, own in zip(terms, weighted, strict=True):
        agrees = (own != 0) & (own.sign() == _at(elected, term.positions))
        _add(chosen, term.positions, torch.where(agrees, own, -0.0))
        if rule.mean != "none":
            share = 1.0 if rule.mean == "count" else abs(term.coeff)
            _add(divisor, term.positions, agrees.to(wide) * share)
    return chosen if rule.mean == "none" else chosen.div_(divisor.masked_fill_(divisor == 0, 1.0))


def _weighted(term: Term, wide: torch.dtype) -> Tensor:
    values = term.values.detach().to(wide)
    return values if term.coeff == 1 else values * term.coeff


def _at(union: Tensor, positions: Tensor | None) -> Tensor:
    return union if positions is None else union.index_select(0, positions)


def _add(union: Tensor, positions: Tensor | None, own: Tensor) -> None:
    if positions is None:
        union += own
    else:  # unique within a term, so this is one addition per entry
        union.index_add_(0, positions, own)


def _largest(
    terms: Sequence[Term], weighted: Sequence[Tensor], size: int, wide: torch.dtype
) -> Tensor:
    device = terms[0].values.device
    best = torch.full((size,), -0.0, dtype=wide, device=device)
    magnitude = torch.full((size,), -1.0, dtype=wide, device=device)
    for term, own in zip(terms, weighted, strict=True):
        larger = own.abs() > _at(magnitude, term.positions)
        if term.positions is None:
            best, magnitude = (
                torch.where(larger, own, best),
                torch.where(larger, own.abs(), magnitude),
            )
        else:
            at, own = term.positions[larger], own[larger]
            best.index_copy_(0, at.long(), own)
            magnitude.index_copy_(0, at.long(), own.abs())
    return best
