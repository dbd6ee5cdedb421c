"""Ranks of low-rank adapters such that they train as many entries as a mask does."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["equal_ranks"]


def equal_ranks(costs: Mapping[str, int], count: int) -> dict[str, int]:
    """Return a rank per module, at most one apart, whose entries add up to nearly ``count``.

    The higher rank is spread evenly over the modules in their order; a rank of 0 leaves one out.
    One module always has a rank of at least 1.

    Args:
        costs: entries of one rank of each module: its inputs plus its outputs.
        count: entries wanted, at least 1.

    Example:
        >>> equal_ranks({"a": 10, "b": 10, "c": 10, "d": 10}, 62)
        {'a': 2, 'b': 1, 'c': 2, 'd': 1}
    """
    whole = sum(costs.values())
    low, rest = divmod(count, whole)
    raised = _spread(costs, rest)
    _exchange(costs, raised, rest)
    if low == 0 and not raised:
        raised.add(min(costs, key=lambda name: costs[name]))
    return {name: low + (name in raised) for name in costs}


def _spread(costs: Mapping[str, int], wanted: int) -> set[str]:
    """Walk through the modules and take each one that brings the sum to its share so far."""
    whole, passed, taken = sum(costs.values()), 0, 0
    chosen: set[str] = set()
    for name, cost in costs.items():
        passed += cost
        if wanted * passed / whole - taken >= cost / 2:
            chosen.add(name)
            taken += cost
    return chosen


def _exchange(costs: Mapping[str, int], chosen: set[str], wanted: int) -> None:
    """Add, drop or swap modules while that brings the sum nearer."""
    while True:
        over = sum(costs[name] for name in chosen) - wanted
        # One module of each cost stands for all: only costs matter to the sum.
        inside: dict[int, str | None] = {costs[n]: n for n in costs if n in chosen}
        outside: dict[int, str | None] = {costs[n]: n for n in costs if n not in chosen}
        inside[0] = outside[0] = None
        best = min(((o, i) for o in outside for i in inside), key=lambda p: abs(over + p[0] - p[1]))
        if abs(over + best[0] - best[1]) >= abs(over):
            return
        added, dropped = outside[best[0]], inside[best[1]]
        chosen.update({added} if added else ())
        chosen.difference_update({dropped} if dropped else ())
