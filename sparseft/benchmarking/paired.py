"""Timing of two things against each other on a machine that others use too.

Both run in turns in one process, A B, B A, A B, ...: what slows the machine for a while slows both,
and the ratio of one round's two times is worth more than the ratio of two separate runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sparseft.benchmarking.rotation import spread

__all__ = ["Comparison", "alternate"]


_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Seconds per round of a baseline and of the thing compared with it."""

    baseline: tuple[float, ...]
    ours: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """ours / baseline, round by round."""
        return tuple(o / b for o, b in zip(self.ours, self.baseline, strict=True))

    def summary(self) -> dict[str, Any]:
        """Return medians and quartiles of both times and of their ratio, and all samples."""

        return {
            "rounds": len(self.ours),
            "baseline_seconds": spread(self.baseline),
            "ours_seconds": spread(self.ours),
            "ratio": spread(self.ratios),
            "samples": asdict(self),
        }


def _timed(run: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def alternate(
    baseline: Callable[[], Any],
    ours: Callable[[], Any],
    *,
    rounds: int,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    clock: str = "wall",
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Run both in turns and return their wall-clock times.

    Args:
        baseline: one unit of the competitor's work.
        ours: one unit of ours.
        rounds: timed rounds, at least 2; each runs both once, in the order that the round before
            did not.
        warmup: untimed rounds first.
        device: waited for before a clock is read.
        clock: ``"wall"``, or ``"cpu"`` for the processor time of this process: on a machine busy
            with other work it is steadier, and it means something only with one thread and no GPU.
        progress: called after each timed round with its number.

    Raises:
        ValueError: fewer than two rounds, or a clock that cannot measure this.
    """
    if rounds < 2:
        raise ValueError(f"rounds={rounds}; a spread needs at least 2")
    where = torch.device(device)
    if clock not in _CLOCKS:
        raise ValueError(f"clock={clock!r}; it should be one of {', '.join(_CLOCKS)}")
    if clock == "cpu" and (where.type != "cpu" or torch.get_num_threads() != 1):
        raise ValueError(
            f"clock='cpu' adds up the time of all threads: it needs one thread on a CPU, and this "
            f"is {torch.get_num_threads()} on {where}"
        )
    for _ in range(warmup):
        baseline()
        ours()
    times: dict[str, list[float]] = {"baseline": [], "ours": []}
    pair = [("baseline", baseline), ("ours", ours)]
    for number in range(rounds):
        for name, run in pair if number % 2 == 0 else reversed(pair):
            times[name].append(_timed(run, where, _CLOCKS[clock]))
        if progress is not None:
            progress(number + 1)
    return Comparison(baseline=tuple(times["baseline"]), ours=tuple(times["ours"]))
