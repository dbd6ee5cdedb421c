"""`run.py suite`: correctness, then every case, then memory, on one GPU and within a budget.

Three parts share the minutes: the GPU tests (in a process of their own, cut off after their share),
the cases (none starts after theirs, none takes longer than its cap), a model's memory predicted and
measured (what is left). What one part leaves over the next may use. Failed tests make the exit
status 1, the timings still run: every case has a gate of its own. DIR is written after each step
and holds at most

    suite.json    the tests' outcome, ceilings, cases, memory, with provenance
    suite.md      the same to read
    bench.jsonl   a line per contender, as `sparseft bench --json` writes them
    plots.png     speed-ups, roofline, time against density, memory, below each other
    tests.txt     what pytest printed; tests.xml: its JUnit report

Without a GPU (`--device cpu`) the same flow runs on tiny shapes, as a test.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from gpu_tests import Outcome, run_tests
from page_tables import memory_table
from pictures import drawn, memory_picture, stacked

from sparseft.benchmarking import results_folder, run_suite, suite_markdown, suite_source
from sparseft.benchmarking.ceilings import Ceilings, measure_ceilings
from sparseft.benchmarking.competitors import COMPILE
from sparseft.benchmarking.planning import plan_cases
from sparseft.benchmarking.records import dump_lines, made_by, make_records
from sparseft.benchmarking.results import write_results
from sparseft.benchmarking.suite import Case
from sparseft.io.atomic import atomic_write_text

__all__ = ["main"]

HERE = Path(__file__).resolve().parent
PARTS = ("tests", "cases", "memory")
# Of the minutes: when the tests are cut off, and when no more cases start.
_UNTIL = {"tests": 0.35, "cases": 0.8}
_DENSITIES = (0.001, 0.01, 0.1)
_WAYS = ("attached", "dense", "lora", "frozen")
# Model, dtype, batch, length: what a step's memory is predicted and measured for.
_MODELS = {
    "cuda": (("xlmr-base", "fp32", 32, 128), ("decoder:12x1024x32000", "bf16", 8, 512)),
    "cpu": (("tiny-encoder", "fp32", 2, 8),),
}
_GOOD = ("ok", "skipped", "not run")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="folder of the results; left out: results/gpu")
    parser.add_argument("--only", help="glob over names of cases; no other part then runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="left out: all of them")
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything")
    parser.add_argument("--rounds", type=int, default=25, help="timed rounds of a case, at most")
    parser.add_argument("--case-seconds", type=float, default=2.0, help="rounds end after so long")
    parser.add_argument(
        "--case-cap", type=float, default=30.0, help="a case ends after so many seconds, all told"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compiled contenders too: seconds to minutes each"
    )
    parser.add_argument(
        "--tests", nargs="+", metavar="ARG", help="for pytest; left out: -m gpu (CPU: tests/ops)"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu: the same flow on tiny shapes",
    )
    parser.add_argument("--commit", help="of the code, where it is a copy without its checkout")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--name", default="suite", help="name of the result files")
    return parser.parse_args(arguments)


@dataclass
class _Run:
    """What there is so far, and where it goes."""

    folder: Path
    name: str
    source: dict[str, str]
    tests: Outcome | None = None
    ceilings: Ceilings | None = None
    cases: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    made: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        right = all(case["status"] in _GOOD for case in self.cases)
        return right and (self.tests is None or self.tests.passed)

    def write(self) -> Path:
        document = {
            "suite": self.source,
            "tests": None if self.tests is None else self.tests.to_json(),
            "ceilings": None if self.ceilings is None else self.ceilings.to_json(),
            "cases": self.cases,
            "memory": self.memory,
        }
        path = write_results(self.folder, self.name, document, self.markdown())
        lines = dump_lines(make_records(self.cases, self.made, self.ceilings))
        atomic_write_text(self.folder / "bench.jsonl", lines)
        return path

    def markdown(self) -> str:
        parts = [suite_markdown(self.cases, self.source)]
        if self.tests is not None:
            parts.insert(0, self.tests.markdown())
        parts += [_memory_markdown(found) for found in self.memory]
        return "\n".join(parts)


def main(arguments: Sequence[str], *, results: Path = HERE / "results") -> int:
    """Run; without ``--out`` a GPU's figures go to ``results/gpu`` if all passed and are clean."""
    options = parse(arguments)
    device = torch.device(options.device)
    tiny = device.type == "cpu"
    cases = every_case(tiny=tiny)
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    parts = options.parts or (PARTS if options.only is None else ("cases",))
    folder = options.out or results / "scratch"
    folder.mkdir(parents=True, exist_ok=True)
    source = suite_source(device, tiny=tiny, commit=options.commit)
    run = _Run(folder, options.name, source, made=made_by(str(device)))
    start = time.monotonic()
    end = start + 60 * options.minutes

    def left(part: str) -> float:
        return start + 60 * options.minutes * _UNTIL[part] - time.monotonic()

    if "tests" in parts:
        default = ["tests/ops"] if tiny else ["-m", "gpu"]
        run.tests = run_tests(
            options.tests or default, folder, seconds=max(1.0, left("tests")), need_gpu=not tiny
        )
        print(run.tests.markdown(), flush=True)
        run.write()
    if "cases" in parts:
        until = left("cases") if "memory" in parts else end - time.monotonic()
        with compiling(options.compile):
            _cases(run, cases, device, options, until / 60)
    if "memory" in parts:
        _memory(run, device, end)
    _draw(run)
    path = run.write()
    if options.out is None and not tiny:
        kept = results_folder(results, passed=run.passed)
        if kept == results:
            run.folder = kept / "gpu"
            path = _move(run, folder)
    print(f"\n{run.markdown()}\nwritten to {path}")
    return 0 if run.passed else 1


def every_case(*, tiny: bool) -> list[Case]:
    """Return the suite's cases in order of importance, then the operations' that it has not."""
    from sparseft.benchmarking.cases import OPS, suite_cases  # every case file is loaded

    planned = [plan.case for plan in plan_cases(list(OPS.values()), "tiny" if tiny else "cuda")]
    # Of two that are the same, the one that says which operation it is of.
    named = {case.name: case for case in planned}
    first = [named.pop(case.name, case) for case in suite_cases(tiny=tiny)]
    return first + list(named.values())


class CutOff(BaseException):
    """Raised in the middle of what took too long; no `except Exception` on the way holds it."""


@contextmanager
def cut_off(seconds: float) -> Iterator[None]:
    """Raise `CutOff` after so long, as soon as Python runs again: a call into C ends first."""

    def stop(number: int, frame: Any) -> None:
        raise CutOff

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def compiling(wanted: bool) -> Iterator[None]:
    before = os.environ.get(COMPILE)
    if not wanted:
        os.environ[COMPILE] = "0"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(COMPILE, None)
        else:
            os.environ[COMPILE] = before


def _cases(
    run: _Run,
    cases: Sequence[Case],
    device: torch.device,
    options: argparse.Namespace,
    minutes: float,
) -> None:
    began = time.monotonic()
    tiny = device.type == "cpu"
    chosen = [case for case in cases if fnmatchcase(case.name, options.only or "*")]
    if not chosen:
        names = ", ".join(case.name for case in cases)
        raise SystemExit(f"error: no case is called {options.only!r}; there are: {names}")
    dtypes = sorted({case.dtype for case in chosen if case.dtype}) or ["fp32"]
    run.ceilings = measure_ceilings(device, dtypes, quick=tiny)
    run.source["ceilings"] = str(run.ceilings)
    if not options.compile:
        run.source["compiled contenders"] = "left out (--compile runs them)"

    until = began + 60 * minutes
    for case in chosen:
        left = until - time.monotonic()
        if left <= 0:
            done = _not_run(case, f"the budget of {options.minutes:g} minutes was spent")
        else:
            done = _case(case, device, options, run.ceilings)
            print(f"{done['status']:7} {done['took_seconds']:6.1f} s  {done['name']}", flush=True)
        run.cases.append(done)
        if left > 0:
            run.write()  # a run that is cut off leaves what it has


def _case(
    case: Case, device: torch.device, options: argparse.Namespace, ceilings: Ceilings
) -> dict[str, Any]:
    began = time.monotonic()
    try:
        with cut_off(options.case_cap):
            [done] = run_suite(
                [case],
                device,
                minutes=float("inf"),
                rounds=options.rounds,
                case_seconds=options.case_seconds,
                ceilings=ceilings,
            )
    except CutOff:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        done = _not_run(case, f"cut off after {options.case_cap:g} s (--case-cap)")
        done["took_seconds"] = time.monotonic() - began
    return done


def _not_run(case: Case, reason: str) -> dict[str, Any]:
    what = {"op": case.op, "shape": list(case.shape), "dtype": case.dtype}
    return {"name": case.name, **what, "status": "not run", "reason": reason}


def _memory(run: _Run, device: torch.device, end: float) -> None:
    """Predict and measure steps, one way at a time; what there was no time for says so."""
    from sparseft.profiling.profiles import profile
    from sparseft.profiling.report import profile_json
    from sparseft.profiling.workload import Workload

    for model, dtype, batch, length in _MODELS[device.type]:
        work = Workload(model=model, dtype=dtype, batch=batch, length=length)
        if time.monotonic() >= end:
            reason = "the minutes were spent"
            run.memory.append({"workload": vars(work), "rows": [], "reason": reason})
            continue
        try:
            with cut_off(max(1.0, end - time.monotonic())):
                found = profile(
                    work, _DENSITIES, ways=_WAYS, device=device.type, steps=5, isolated=False
                )
        except CutOff:
            reason = "cut off: the minutes were spent"
            run.memory.append({"workload": vars(work), "rows": [], "reason": reason})
            continue
        except Exception as error:  # the cases keep their figures
            reason = f"{type(error).__name__}: {error}"
            run.memory.append({"workload": vars(work), "rows": [], "reason": reason})
            print(f"memory of {model}: {reason}", flush=True)
            continue
        run.memory.append(profile_json(found))
        print(_memory_markdown(run.memory[-1]), flush=True)
        run.write()


def _memory_markdown(found: Mapping[str, Any]) -> str:
    work = found["workload"]
    what = f"{work['model']}, {work['dtype']}, {work['batch']} x {work['length']} tokens"
    return f"## Memory: {what}\n{found.get('reason') or memory_table(found)}\n"


def _draw(run: _Run) -> None:
    """Put the pictures below each other into one file."""
    from sparseft.benchmarking.plots import plot_density, plot_roofline, plot_speedups

    records = make_records(run.cases, run.made, run.ceilings)
    pictures = [
        drawn(lambda path, draw=draw: draw(records, path))
        for draw in (plot_speedups, plot_roofline, plot_density)
    ]
    pictures += [memory_picture(found) for found in run.memory if found["rows"]]
    stacked(pictures, run.folder / "plots.png")


def _move(run: _Run, before: Path) -> Path:
    run.folder.mkdir(parents=True, exist_ok=True)
    for name in ("plots.png", "tests.txt", "tests.xml"):
        if (before / name).is_file():
            (before / name).replace(run.folder / name)
    return run.write()
