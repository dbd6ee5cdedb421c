"""The suite: cases that check, then time, several contenders; targets; a budget; a report.

A case builds its contenders, each with what it showed (`Check`); one that failed is listed and
never timed, and what is not built (an absent package, too little memory) says why. Ratios are
round by round against the case's baseline, or where that does other work or is of another density,
against the first that does the same; GB/s and TFLOP/s are beside ceilings of the same run.
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
from typing import TYPE_CHECKING, Any

import torch

from sparseft.benchmarking.checks import Check
from sparseft.benchmarking.limits import out_of_memory
from sparseft.benchmarking.rotation import Clock, Timing, rotate, spread

if TYPE_CHECKING:
    from sparseft.benchmarking.ceilings import Ceilings

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
        work: what it does, in a case whose contenders do not all do the same: ``"TIES"``.
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
    work: str = ""

    @property
    def status(self) -> str:
        if self.skipped or self.error:
            return "skipped" if self.skipped else "error"
        return "ok" if all(check.passed for check in self.checks) else "red"


def attempt(make: Callable[[], Contender]) -> Contender:
    """Return the contender, or one that says what it raised: the others' figures stay.

    One that ran out of memory is skipped, with what it asked for.
    """
    try:
        return make()
    except Exception as error:
        short = out_of_memory(error, _current_device())
        if short:
            return Contender(skipped=short)
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
        baseline: whose time those are divided by that do the same work at its density, if it has
            one; of the others see `_against`.
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
    """A named comparison; ``build`` allocates, checks and returns what to time.

    ``op``, ``shape`` and ``dtype`` say what it is of, where it is of an `OpBench`.
    """

    name: str
    build: Callable[[torch.device], Prepared]
    op: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""


def run_suite(
    cases: Sequence[Case],
    device: torch.device | str,
    *,
    only: str = "*",
    minutes: float = 7.0,
    rounds: int = 25,
    case_seconds: float = 15.0,
    progress: Callable[[list[Facts]], None] | None = None,
    ceilings: Ceilings | None = None,
    clock: Clock | None = None,
    warmup: int | None = None,
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
        ceilings: of this device, measured in this run; with them the shares are known.
        clock: instead of each case's own.
        warmup: untimed rounds, instead of each case's own number.

    Returns:
        A dict per case, of JSON's types alone:

        - ``name``, ``status``: "ok"; "red": a contender is wrong; "error": something raised;
          "skipped": too little memory; "not run": out of time. All but "ok" of a whole case come
          with ``reason`` (a "red" or "error" of one contender has it in its row).
        - ``op``, ``shape`` (list), ``dtype``: "" and [] where the case does not say.
        - ``facts`` of the case, ``baseline`` (a contender's name), ``targets``, ``took_seconds``.
        - ``contenders``: a dict each: ``name``, ``status`` ("ok", "red", "skipped", "error"),
          ``reason`` if not ok, ``ours``, ``density``, ``work``, ``bytes``, ``flops``, ``facts``,
          ``checks`` (``name``, ``got``, ``limit``, ``passed``), ``against`` (whose time this one's
          is divided by), and of those that were timed ``clocks``: by clock ``rounds``,
          ``seconds``, ``host_seconds`` and, where ``against`` ran, ``ratio`` (each
          ``median``, ``quartile1``, ``quartile3``, ``min``) and ``samples``; and ``speed`` by the
          first clock's median: "GB/s", "TFLOP/s", "% of copy", "% of GEMM", those known.

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
    settings = _Settings(where, rounds, case_seconds, ceilings, clock, warmup)
    end = time.monotonic() + 60 * minutes
    results: list[Facts] = []
    for case in chosen:
        if time.monotonic() >= end:
            reason = f"the budget of {minutes:g} minutes was spent"
            results.append({"name": case.name, "status": "not run", "reason": reason})
            continue
        results.append(_run(case, settings))
        gc.collect()  # attached models hold cycles
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # compiled contenders hold their tensors
        if where.type == "cuda":
            torch.cuda.empty_cache()
        if progress is not None:
            progress(results)
    return results


@dataclass(frozen=True)
class _Settings:
    device: torch.device
    rounds: int
    seconds: float
    ceilings: Ceilings | None
    clock: Clock | None
    warmup: int | None


def _run(case: Case, settings: _Settings) -> Facts:
    began = time.monotonic()
    try:
        result = _measure(case, settings)
    except Exception as error:  # one case must not cost the others their figures
        short = out_of_memory(error, settings.device)
        result = {"status": "skipped", "reason": short}
        if not short:
            result = {
                "status": "error",
                "reason": f"{type(error).__name__}: {error}",
                "traceback": traceback.format_exc(),
            }
    what = {"op": case.op, "shape": list(case.shape), "dtype": case.dtype}
    return {"name": case.name, **what, **result, "took_seconds": time.monotonic() - began}


def _measure(case: Case, settings: _Settings) -> Facts:
    built = case.build(settings.device)
    runs = {n: c.run for n, c in built.contenders.items() if c.status == "ok" and c.run is not None}
    clocks = built.clocks if settings.clock is None else (settings.clock,)
    timings = [
        rotate(
            runs,
            device=settings.device,
            clock=clock,
            rounds=settings.rounds,
            least=built.least,
            seconds=settings.seconds / len(clocks),
            warmup=built.warmup if settings.warmup is None else settings.warmup,
        )
        for clock in clocks
        if runs
    ]
    rows = []
    for name, contender in built.contenders.items():
        row = _row(name, contender, built, timings)
        if "clocks" in row and settings.ceilings is not None:
            row["speed"] = settings.ceilings.shares(
                contender.bytes, contender.flops, case.dtype, timings[0].median(name)
            )
        rows.append(row)
    judged: list[Facts] = []
    if timings:
        wanted = [target for target in built.targets if settings.device.type in target.devices]
        judged = [target.judge(timings[0], built.contenders) for target in wanted]
    statuses = {row["status"] for row in rows}
    return {
        "status": next((s for s in ("red", "error") if s in statuses), "ok"),
        "facts": built.facts,
        "baseline": built.baseline,
        "contenders": rows,
        "targets": judged,
    }


def _row(name: str, contender: Contender, case: Prepared, timings: list[Timing]) -> Facts:
    row: Facts = {
        "name": name,
        "status": contender.status,
        "ours": contender.ours,
        "density": contender.density,
        "work": contender.work,
        "against": _against(name, case),
        "bytes": contender.bytes,
        "flops": contender.flops,
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
        if row["against"] in timing.seconds:
            clock["ratio"] = spread(timing.ratios(name, row["against"]))
        row.setdefault("clocks", {})[timing.clock] = clock
    if "clocks" in row and case.derive is not None:
        row["facts"] |= case.derive(timings[0], name, contender)
    return row


def _against(name: str, case: Prepared) -> str | None:
    """Return whose time this one's is divided by: of the same work and density, if there is one.

    The baseline if it is that, else the first competitor at that density, else the first that has
    none: the ratio of 10 % to something at 1 %, or of one rule to another, says nothing.
    """
    mine, first = case.contenders[name], case.contenders.get(case.baseline)
    if first is not None and first.work == mine.work:
        if mine.density is None or first.density in (None, mine.density):
            return case.baseline
    peers = {
        n: c.density
        for n, c in case.contenders.items()
        if c.work == mine.work and c.status == "ok" and not c.ours
    }
    for wanted in (mine.density, None):
        for other, density in peers.items():
            if density == wanted:
                return other
    return None


def _current_device() -> torch.device:
    # A contender's error does not say whose memory it was.
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
