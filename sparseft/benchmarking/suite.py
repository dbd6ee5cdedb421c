"""The suite: cases that check, then time, several contenders; targets; a budget; a report.

A case builds its contenders, each with what it showed (`Check`); one that failed is listed and
never timed, and what is not built (an absent package, too little memory) says why. Ratios are
against the case's baseline, round by round.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from sparseft.benchmarking.checks import Check
from sparseft.benchmarking.rotation import Clock, Timing, rotate, spread

__all__ = ["Case", "Contender", "Prepared", "Target", "at_most", "attempt", "faster", "run_suite"]

Facts = dict[str, Any]


@dataclass
class Contender:
    """One side of a comparison.

    Args:
        run: one unit of work, callable any number of times.
        checks: what it showed before; any that failed keeps it from being timed.
        facts: numbers and names for the report: entries, backend, peak memory.
        skipped: why it cannot take part; empty: it does.
        error: what it raised while it was built; empty: nothing.
        ours: whether it is this package's; the others are what one would use without it.
        density: the share of entries that it works on; None: it does not depend on one.
        bytes: what memory must move at least, for GB/s and its share of a measured copy.
        flops: operations, for TFLOP/s and its share of a measured product.
    """

    run: Callable[[], Any] | None = None
    checks: list[Check] = field(default_factory=list)
    facts: Facts = field(default_factory=dict)
    skipped: str = ""
    error: str = ""
    ours: bool = False
    density: float | None = None
    bytes: float | None = None
    flops: float | None = None

    @property
    def status(self) -> str:
        if self.skipped or self.error:
            return "skipped" if self.skipped else "error"
        return "ok" if all(check.passed for check in self.checks) else "red"


def attempt(make: Callable[[], Contender]) -> Contender:
    """Return the contender, or one that says what it raised: the others' figures stay."""
    try:
        return make()
    except Exception as error:
        return Contender(error="".join(traceback.format_exception(error)).rstrip())


@dataclass(frozen=True)
class Target:
    """What a case should reach on the hardware the targets are for.

    Args:
        what: in words, with the number.
        measure: the measured number; None where the contenders it needs did not run.
        limit: the number to reach.
        at_least: or else at most.
        devices: types of devices that it is for.
    """

    what: str
    measure: Callable[[Timing, Mapping[str, Contender]], float | None]
    limit: float
    at_least: bool
    devices: tuple[str, ...] = ("cuda",)

    def judge(self, timing: Timing, contenders: Mapping[str, Contender]) -> Facts:
        measured = self.measure(timing, contenders)
        met = None
        if measured is not None:
            met = measured >= self.limit if self.at_least else measured <= self.limit
        sign = "at_least" if self.at_least else "at_most"
        return {"what": self.what, sign: self.limit, "measured": measured, "met": met}


def at_most(
    ratio: float, contender: str, against: str, *, devices: tuple[str, ...] = ("cuda",)
) -> Target:
    """Time of ``contender`` over time of ``against``, at most."""

    def measure(timing: Timing, _: Mapping[str, Contender]) -> float | None:
        if {contender, against} <= set(timing.seconds):
            return timing.ratio(contender, against)
        return None

    return Target(f"{contender}: time at most {ratio:g}x {against}", measure, ratio, False, devices)


def faster(
    times: float, contender: str, against: str, *, devices: tuple[str, ...] = ("cuda",)
) -> Target:
    """Speed of ``contender`` over speed of ``against``, at least."""

    def measure(timing: Timing, _: Mapping[str, Contender]) -> float | None:
        if {contender, against} <= set(timing.seconds):
            return statistics.median(timing.ratios(against, contender))
        return None

    what = f"{contender}: at least {times:g}x the speed of {against}"
    return Target(what, measure, times, True, devices)


@dataclass
class Prepared:
    """A case, built.

    Args:
        contenders: by name, in the order of the report.
        baseline: whose time the others' are divided by.
        clocks: the first is the one of ratios and targets; others are timed besides.
        targets: judged on the devices that they are for.
        derive: more facts of a contender, from the times.
        facts: of the case.
        warmup: untimed rounds.
        least: rounds to time however long they take.
    """

    contenders: dict[str, Contender]
    baseline: str
    clocks: tuple[Clock, ...] = ("device",)
    targets: tuple[Target, ...] = ()
    derive: Callable[[Timing, str, Contender], Facts] | None = None
    facts: Facts = field(default_factory=dict)
    warmup: int = 3
    least: int = 5


@dataclass(frozen=True)
class Case:
    """A named comparison; ``build`` allocates, checks and returns what to time."""

    name: str
    build: Callable[[torch.device], Prepared]


def run_suite(
    cases: Sequence[Case],
    device: torch.device | str,
    *,
    only: str = "*",
    minutes: float = 7.0,
    rounds: int = 25,
    case_seconds: float = 15.0,
    progress: Callable[[list[Facts]], None] | None = None,
) -> list[Facts]:
    """Run the cases in order and return one result each.

    Args:
        cases: the most important first.
        device: where.
        only: glob over names; cases that it leaves out are not mentioned.
        minutes: start no case after so long; the rest is listed as not run.
        rounds: timed rounds of a case, at most.
        case_seconds: a case's rounds end after so long, and after its least number.
        progress: called with the results so far after each case that ran.

    Raises:
        ValueError: the glob matches nothing.
    """
    chosen = [case for case in cases if fnmatchcase(case.name, only)]
    if not chosen:
        names = ", ".join(case.name for case in cases)
        raise ValueError(f"no case is called {only!r}; there are: {names}")
    where = torch.device(device)
    if where.type == "cuda" and where.index is not None:
        torch.cuda.set_device(where)
    end = time.monotonic() + 60 * minutes
    results: list[Facts] = []
    for case in chosen:
        if time.monotonic() >= end:
            reason = f"the budget of {minutes:g} minutes was spent"
            results.append({"name": case.name, "status": "not run", "reason": reason})
            continue
        results.append(_run(case, where, rounds, case_seconds))
        gc.collect()  # attached models hold cycles
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # compiled contenders hold their tensors
        if where.type == "cuda":
            torch.cuda.empty_cache()
        if progress is not None:
            progress(results)
    return results


def _run(case: Case, device: torch.device, rounds: int, seconds: float) -> Facts:
    began = time.monotonic()
    try:
        result = _measure(case.build(device), device, rounds, seconds)
    except Exception as error:  # one case must not cost the others their figures
        result = {
            "status": "error",
            "reason": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(),
        }
    return {"name": case.name, **result, "took_seconds": time.monotonic() - began}


def _measure(case: Prepared, device: torch.device, rounds: int, seconds: float) -> Facts:
    runs = {n: c.run for n, c in case.contenders.items() if c.status == "ok" and c.run is not None}
    share = seconds / len(case.clocks)
    timings = [
        rotate(
            runs,
            device=device,
            clock=clock,
            rounds=rounds,
            least=case.least,
            seconds=share,
            warmup=case.warmup,
        )
        for clock in case.clocks
        if runs
    ]
    rows = [_row(name, contender, case, timings) for name, contender in case.contenders.items()]
    judged: list[Facts] = []
    if timings:
        wanted = [target for target in case.targets if device.type in target.devices]
        judged = [target.judge(timings[0], case.contenders) for target in wanted]
    statuses = {row["status"] for row in rows}
    return {
        "status": next((s for s in ("red", "error") if s in statuses), "ok"),
        "facts": case.facts,
        "baseline": case.baseline,
        "contenders": rows,
        "targets": judged,
    }


def _row(name: str, contender: Contender, case: Prepared, timings: list[Timing]) -> Facts:
    row: Facts = {
        "name": name,
        "status": contender.status,
        "checks": [{**vars(check), "passed": check.passed} for check in contender.checks],
        "facts": dict(contender.facts),
    }
    if contender.skipped or contender.error:
        row["reason"] = contender.skipped or contender.error
    elif contender.status == "red":
        failed = [str(check) for check in contender.checks if not check.passed]
        row["reason"] = "; ".join(failed)
    for timing in timings:
        if name not in timing.seconds:
            continue
        clock = {
            "rounds": len(timing.seconds[name]),
            "seconds": spread(timing.seconds[name]),
            "host_seconds": spread(timing.host[name]),
            "samples": timing.seconds[name],
        }
        if case.baseline in timing.seconds:
            clock["ratio"] = spread(timing.ratios(name, case.baseline))
        row.setdefault("clocks", {})[timing.clock] = clock
    if "clocks" in row and case.derive is not None:
        row["facts"] |= case.derive(timings[0], name, contender)
    return row
