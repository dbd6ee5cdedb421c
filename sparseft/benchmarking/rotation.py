"""Timing of several things against each other, on a CPU or a GPU.

All run once a round, in an order that changes from round to round, so that a ratio of one round's
times compares neighbours. On CUDA and ROCm the device's events are read; before each run a buffer
larger than the L2 is written, so that no contender finds its operands there.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

__all__ = ["Clock", "Stopwatch", "Timing", "rotate", "spread"]

Clock = Literal["device", "wall", "cpu"]

# Written before each run: several times the largest L2 there is (126 MB).
_FLUSH_BYTES = 512 << 20
# While the device is kept busy for so long, the host gets ahead of it: a launch then costs nothing,
# as in a training step. At most this, for what waits for the device itself.
_LONGEST_LEAD = 20e-3
# GPU clocks lie below it, so that a lead is rather too long.
_CYCLES_PER_SECOND = 2.0e9


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Return median, quartiles and minimum of at least two numbers."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": middle, "quartile1": low, "quartile3": high, "min": min(samples)}


@dataclass
class Timing:
    """Seconds per round of each contender.

    Attributes:
        seconds: by contender, on the clock asked for.
        host: by contender: until the call returned, the device's work aside. Above ``seconds``, a
            loop that does nothing else is bound by launches.
    """

    clock: Clock
    seconds: dict[str, list[float]] = field(default_factory=dict)
    host: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratios(self, name: str, against: str) -> list[float]:
        """Time of ``name`` over time of ``against``, round by round."""
        pairs = zip(self.seconds[name], self.seconds[against], strict=True)
        return [mine / theirs for mine, theirs in pairs]

    def ratio(self, name: str, against: str) -> float:
        """Return the median of the rounds' ratios."""
        return statistics.median(self.ratios(name, against))


class Stopwatch:
    """Times single runs on one device."""

    def __init__(self, device: torch.device, clock: Clock) -> None:
        self.device, self.clock = device, clock
        self.cuda = device.type == "cuda"
        self.events = self.cuda and clock == "device"
        self.read = time.process_time if clock == "cpu" else time.perf_counter
        self.flush: torch.Tensor | None = None
        if self.cuda:
            self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def host_seconds(self, run: Callable[[], Any]) -> float:
        """Return what the host spends on a call that finds the device idle."""
        self.wait()
        start = time.perf_counter()
        run()
        spent = time.perf_counter() - start
        self.wait()
        return spent

    def time(self, run: Callable[[], Any], lead: float) -> tuple[float, float]:
        """Return (seconds on the clock, seconds until the call returned)."""
        self.wait()
        if self.flush is not None:
            self.flush.zero_()
        if not self.events:
            self.wait()
            start = self.read()
            run()
            returned = self.read() - start
            self.wait()
            return self.read() - start, returned
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(lead * _CYCLES_PER_SECOND))
        begin.record()
        start = time.perf_counter()
        run()
        returned = time.perf_counter() - start
        end.record()
        self.wait()
        return begin.elapsed_time(end) * 1e-3, returned


def rotate(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    device: torch.device | str = "cpu",
    clock: Clock = "device",
    rounds: int = 25,
    least: int = 5,
    seconds: float | None = None,
    warmup: int = 3,
) -> Timing:
    """Run all contenders once a round and return their times.

    Args:
        contenders: name -> one unit of work.
        device: whose clock is read, and waited for.
        clock: ``"device"``: events around the work, launches hidden behind earlier work;
            ``"wall"``: from an idle device until it is idle again, launches included. On a CPU both
            are the wall clock. ``"cpu"``: the processor time of this process, for machines busy
            with other work; one thread and no GPU.
        rounds: timed rounds, at least 2.
        least: rounds to do whatever ``seconds`` says, at least 2.
        seconds: start no round after so long; None: do all rounds.
        warmup: untimed rounds first.

    Raises:
        ValueError: fewer than two rounds, no such clock, or ``"cpu"`` where it would measure
            something else.
    """
    if min(rounds, least) < 2:
        raise ValueError(f"{rounds=}, {least=}; a spread needs at least 2")
    if clock not in get_args(Clock):
        raise ValueError(f"{clock=}; it should be one of {', '.join(get_args(Clock))}")
    if clock == "cpu" and (torch.device(device).type != "cpu" or torch.get_num_threads() != 1):
        raise ValueError(
            f"clock='cpu' adds up the time of all threads: it needs one thread on a CPU, and this "
            f"is {torch.get_num_threads()} on {device}"
        )
    watch = Stopwatch(torch.device(device), clock)
    names = list(contenders)
    leads = dict.fromkeys(names, 0.0)
    timing = Timing(clock, {name: [] for name in names}, {name: [] for name in names})
    began = time.perf_counter()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would fall on one contender
    try:
        for _ in range(warmup):
            for name in names:
                leads[name] = min(2 * watch.host_seconds(contenders[name]), _LONGEST_LEAD)
        for number in range(rounds):
            late = seconds is not None and time.perf_counter() - began > seconds
            if late and number >= least:
                break
            for name in _order(names, number):
                spent, host = watch.time(contenders[name], leads[name])
                timing.seconds[name].append(spent)
                timing.host[name].append(host)
    finally:
        if collecting:
            gc.enable()
    return timing


def _order(names: list[str], number: int) -> list[str]:
    """Everyone in turn goes first; every other time round, backwards."""
    start = number % len(names)
    order = names[start:] + names[:start]
    return order[::-1] if number // len(names) % 2 else order
