"""The largest density whose training step fits in a given memory, by prediction."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["GRID", "Fit", "largest_densities"]

# Two digits, from where nearly every tensor keeps its one least entry.
GRID = tuple(digits / 10**power for power in range(7, 1, -1) for digits in range(10, 100)) + (1.0,)
# Guesses along a line before halving takes over. Mostly one is right and the next one shows it.
_LINES = 4


@dataclass(frozen=True)
class Fit:
    """What fits.

    Args:
        limit: bytes.
        text: the limit as given.
        density: the largest that fits, of two digits; None: none does.
        peak: bytes predicted at that density, or at the least one where none fits.
    """

    limit: int
    text: str
    density: float | None
    peak: int


def largest_densities(
    peak_at: Callable[[float], int],
    limits: Sequence[tuple[int, str]],
    known: Mapping[float, int] | None = None,
) -> list[Fit]:
    """Return for each limit the largest density on `GRID` whose peak is no higher.

    Args:
        peak_at: (density) -> bytes; does not fall with the density.
        limits: bytes, and how to call them.
        known: peaks by density that need not be asked for again.

    Example:
        >>> [fit] = largest_densities(lambda density: round(1000 + 900 * density), [(1050, "1 kB")])
        >>> fit.density, fit.peak
        (0.056, 1050)
    """
    places = {density: place for place, density in enumerate(GRID)}
    peaks = {places[d]: peak for d, peak in (known or {}).items() if d in places}

    def peak(place: int) -> int:
        if place not in peaks:
            peaks[place] = peak_at(GRID[place])
        return peaks[place]

    return [Fit(limit, text, *_largest(peak, peaks, limit)) for limit, text in limits]


def _largest(
    peak: Callable[[int], int], peaks: Mapping[int, int], limit: int
) -> tuple[float | None, int]:
    # What is known already narrows the search, and may spare asking for the ends.
    low = max((p for p, size in peaks.items() if size <= limit), default=0)
    high = min((p for p, size in peaks.items() if size > limit), default=len(GRID) - 1)
    if peak(high) <= limit:
        return GRID[high], peak(high)
    if peak(low) > limit:
        return None, peak(low)
    rounds = 0
    while high - low > 1:
        middle = (low + high) // 2
        if rounds < _LINES:
            # Peaks bend where another moment becomes the highest. So the line is that of the two
            # nearest that fit; a chord to a high one far off would be too steep.
            below = max((p for p in peaks if p < low and peaks[p] < peak(low)), default=high)
            slope = (peak(below) - peak(low)) / (GRID[below] - GRID[low])
            density = GRID[low] + (limit - peak(low)) / slope
            middle = min(max(bisect.bisect_right(GRID, density) - 1, low + 1), high - 1)
        if peak(middle) <= limit:
            low = middle
        else:
            high = middle
        rounds += 1
    return GRID[low], peak(low)
