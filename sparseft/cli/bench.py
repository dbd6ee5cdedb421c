"""``sparseft bench``: how fast each operation is, against what, and how far from the limit."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from sparseft.benchmarking.ceilings import Ceilings
    from sparseft.benchmarking.planning import Planned

__all__ = ["HELP", "add_parser", "run"]

HELP = "time each operation against its competitors, checked first, beside the machine's ceilings"

_EPILOG = """\
examples:
  sparseft bench --list                                     the ops, their shapes and dtypes
  sparseft bench --op sampled_grad                          default shapes for this device
  sparseft bench --op sampled_grad --shape 768x768x4096 --density 0.01 0.1 --dtype bf16
  sparseft bench --op all --size tiny                       a smoke test: figures mean nothing
  sparseft bench --op topk --out results/                   table, JSON lines, plots
  sparseft bench --op combine --json -                      only JSON lines on standard output
  sparseft bench --op spmm --compare main                   this tree against a revision

Every contender is checked against the op's reference first; one that is wrong is shown in red, is
not timed, and makes the exit code 1. All of a case run in turns, round by round, and ratios are of
one round's times: medians with quartiles. GB/s count what must be moved at least, TFLOP/s the
operations; their shares are of a copy and of a matrix product measured in the same run.

--compare REV runs the present benchmarks on both sides, each in a process of its own, in turns; the
competitors are the control: their ratio is 1 where there is no noise. `A..B` compares two
revisions. What is measured as "here" is the working tree as it is, with uncommitted changes.

what comes out with --out DIR:
  DIR/bench.jsonl    a line per contender, with commit, hardware, versions, threads, seed, time
  DIR/bench.md       the tables
  DIR/density.png, roofline.png, speedups.png    those that the cases allow"""

_CLOCKS = ("wall", "cpu", "device")


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "bench",
        help=HELP,
        description="Measures operations. On a GPU at sizes of real models; no model is needed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what")
    what.add_argument("--op", nargs="+", metavar="NAME", help="ops, or all; see --list")
    what.add_argument("--shape", nargs="+", default=[], metavar="AxBxC", help="instead of defaults")
    what.add_argument("--density", nargs="+", type=float, default=[], metavar="D", help="in (0, 1]")
    what.add_argument("--dtype", nargs="+", default=[], metavar="TYPE", help="fp32, bf16, fp16")
    what.add_argument("--size", help="of default shapes: cuda, cpu or tiny; default: the device's")
    what.add_argument("--list", action="store_true", help="print what there is")
    how = parser.add_argument_group("how")
    how.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    how.add_argument("--threads", type=int, metavar="N", help="of torch; default: torch's own")
    how.add_argument("--clock", choices=_CLOCKS, help="default: each case's own")
    how.add_argument("--rounds", type=int, metavar="N", help="at most; default: 25, tiny 2")
    how.add_argument("--seconds", type=float, metavar="S", help="of a case's rounds; default: 15")
    how.add_argument("--compare", metavar="REV", help="measure against a revision (A..B: two)")
    out = parser.add_argument_group("output")
    out.add_argument("--out", type=Path, metavar="DIR", help="write tables, JSON lines and plots")
    out.add_argument("--json", metavar="FILE", help="add JSON lines to a file; -: print only those")
    out.add_argument(
        "--plot", action=argparse.BooleanOptionalAction, help="PNGs in --out (default: yes)"
    )


def run(args: argparse.Namespace) -> int:
    """Plan, measure, print and write; 1 if anything was wrong."""
    import torch

    from sparseft.benchmarking.cases import OPS
    from sparseft.benchmarking.planning import EVERY, choose_ops, plan_cases
    from sparseft.cli._output import quiet_peft
    from sparseft.errors import OptionError
    from sparseft.training.setups import device_named

    if args.list:
        return _list(choose_ops(args.op or [EVERY], OPS))
    if not args.op:
        raise OptionError(f"--op is missing: {', '.join(OPS)}, or {EVERY}; --list explains them.")
    ops = choose_ops(args.op, OPS)
    device = device_named(args.device, "--device")
    _check_numbers(args, device)
    size = args.size or device.type
    planned = plan_cases(
        ops,
        size,
        shapes=args.shape,
        densities=args.density,
        dtypes=args.dtype,
        every=EVERY in args.op,
    )
    before = torch.get_num_threads()
    try:
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        with _without_compiling(size == "tiny"), quiet_peft():
            if args.compare is not None:
                from sparseft.cli._bench_compare import compare

                return compare(args, planned, device, quick=size == "tiny")
            return _measure(args, planned, device, quick=size == "tiny")
    finally:
        torch.set_num_threads(before)
        gc.unfreeze()  # or the interpreter's end would report what it cannot free


def _check_numbers(args: argparse.Namespace, device: torch.device) -> None:
    """Refuse numbers and pairs of options that make no sense together."""
    import torch

    from sparseft.benchmarking.records import append_records
    from sparseft.errors import OptionError

    if args.rounds is not None and args.rounds < 2:
        raise OptionError(f"--rounds {args.rounds}: a spread needs 2 or more.")
    if args.seconds is not None and not args.seconds > 0:
        raise OptionError(f"--seconds {args.seconds:g}: wanted more than 0.")
    if args.threads is not None and args.threads < 1:
        raise OptionError(f"--threads {args.threads}: wanted 1 or more.")
    threads = args.threads or torch.get_num_threads()
    if args.clock == "cpu" and (device.type != "cpu" or threads != 1):
        raise OptionError(
            f"--clock cpu adds up the time of all threads: it needs one thread on a CPU, and this "
            f"is {threads} on {device}; add --threads 1 --device cpu, or take --clock wall."
        )
    if args.plot and args.out is None:
        raise OptionError("--plot draws into a folder: add --out DIR.")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise OptionError(f"--out {args.out} is a file; wanted a folder.")
    # That they can be written is known before hours of measuring.
    if args.out is not None:
        _try_out(args.out)
    if args.json not in (None, "-"):
        if Path(args.json).is_dir():
            raise OptionError(f"--json {args.json} is a folder; wanted a file, or - to print.")
        try:
            append_records(args.json, [])
        except OSError as error:
            raise OptionError(f"--json {args.json}: {error.strerror or error}.") from None


def _try_out(folder: Path) -> None:
    from sparseft.errors import OptionError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OptionError(f"--out {folder}: {error.strerror or error}.") from None


@contextlib.contextmanager
def _without_compiling(quick: bool) -> Iterator[None]:
    """Leave compiled contenders out of a smoke test, unless the environment says otherwise."""
    from sparseft.benchmarking.competitors import COMPILE

    if not quick or COMPILE in os.environ:
        yield
        return
    os.environ[COMPILE] = "0"
    try:
        yield
    finally:
        del os.environ[COMPILE]


def _list(ops: Sequence[Any]) -> int:
    from sparseft.cli._output import print_table

    rows = []
    for op in ops:
        shapes = {
            size: "\n".join("x".join(map(str, shape)) for shape in shapes)
            for size, shapes in op.shapes.items()
        }
        densities = "\n".join(f"{d:g}" for d in op.densities) or "-"
        rows.append([op.name, op.dims, "\n".join(op.dtypes), densities, *_sizes(shapes)])
    print_table(["op", "a shape is", "dtypes", "densities", "cuda", "cpu", "tiny"], rows)
    for op in ops:
        print(f"{op.name}: {op.summary}")
    return 0


def _sizes(shapes: Mapping[str, str]) -> list[str]:
    return [shapes.get(size, "-") for size in ("cuda", "cpu", "tiny")]


def _measure(
    args: argparse.Namespace, planned: Sequence[Planned], device: torch.device, *, quick: bool
) -> int:
    from sparseft.benchmarking.ceilings import measure_ceilings
    from sparseft.benchmarking.records import append_records, dump_lines, made_by, make_records
    from sparseft.benchmarking.suite import run_suite
    from sparseft.benchmarking.suite_report import suite_source

    console = console_of(args)
    source = suite_source(device, tiny=quick)
    dtypes = list(dict.fromkeys(plan.dtype for plan in planned if not plan.skipped)) or ["fp32"]
    ceilings = measure_ceilings(device, dtypes, quick=quick, clock=args.clock)
    source |= {"seed": "0", "ceilings": str(ceilings)}
    for key, value in source.items():
        console.print(f"{key}: {value}", highlight=False, markup=False)
    made = made_by(str(device))
    results: list[dict[str, Any]] = []
    for plan in planned:
        if plan.skipped:
            done = plan.result
        else:
            # The harness and its cases collect often. Half of a smoke test would go into walking
            # what is loaded (transformers) again and again; what survives here stays anyway.
            gc.collect()
            gc.freeze()
            [done] = run_suite(
                [plan.case],
                device,
                minutes=float("inf"),
                rounds=args.rounds or (2 if quick else 25),
                case_seconds=args.seconds or (1.0 if quick else 15.0),
                ceilings=ceilings,
                clock=args.clock,
                warmup=1 if quick else None,
            )
        results.append(done)
        _show(console, done)
        records = make_records([done], made, ceilings)
        if args.json == "-":
            sys.stdout.write(dump_lines(records))
            sys.stdout.flush()
        elif args.json is not None:
            append_records(args.json, records)
        if args.out is not None:  # after each case: a run that is cut off leaves what it has
            _write(args.out, results, source, made, ceilings)
    if args.out is not None:
        paths = _draw(args, make_records(results, made, ceilings))
        names = ", ".join(path.name for path in paths)
        console.print(f"{args.out}: bench.jsonl, bench.md{', ' if names else ''}{names}")
    return verdict(console, results)


def console_of(args: argparse.Namespace) -> Console:
    """Return where tables go: standard output, unless that is for JSON lines alone."""
    from rich.console import Console

    stream = sys.stderr if args.json == "-" else sys.stdout
    # A pipe has no width; rich would cut tables at 80 columns.
    return Console(file=stream, width=None if stream.isatty() else 1000)


def verdict(console: Console, results: Sequence[Mapping[str, Any]]) -> int:
    """Say what went wrong or was left out; return the exit code."""
    from rich.text import Text

    bad = [result for result in results if result["status"] in ("red", "error")]
    counts = Counter(result["status"] for result in results if result not in bad)
    text = ", ".join(
        [f"{len(results)} cases", f"{counts.pop('ok', 0)} ok"]
        + [f"{count} {status}" for status, count in counts.items()]
    )
    if bad:
        text += f"; WRONG: {', '.join(result['name'] for result in bad)}"
    console.print(Text(text, style="bold red" if bad else ""))
    return 1 if bad else 0


def _show(console: Console, result: Mapping[str, Any]) -> None:
    from rich.text import Text

    from sparseft.benchmarking.terminal import case_table, case_title

    bad = result["status"] in ("red", "error")
    console.print(Text(case_title(result), style="bold red" if bad else "bold"))
    for key, value in result.get("facts", {}).items():
        if isinstance(value, str):  # what is counted, and how; numbers are in the report
            console.print(Text(f"{key}: {value}", style="dim"))
    if "contenders" in result:
        console.print(case_table(result))


def _write(
    folder: Path,
    results: Sequence[Mapping[str, Any]],
    source: Mapping[str, str],
    made: Mapping[str, Any],
    ceilings: Ceilings,
) -> None:
    from sparseft.benchmarking.records import dump_lines, make_records
    from sparseft.benchmarking.suite_report import suite_markdown
    from sparseft.io.atomic import atomic_write_text

    lines = dump_lines(make_records(results, made, ceilings))
    atomic_write_text(folder / "bench.jsonl", lines)
    atomic_write_text(folder / "bench.md", suite_markdown(results, source))


def _draw(args: argparse.Namespace, records: Sequence[Mapping[str, Any]]) -> list[Path]:
    from sparseft.benchmarking.plots import plot_density, plot_roofline, plot_speedups

    if args.plot is False:
        return []
    made = {
        "density.png": plot_density,
        "roofline.png": plot_roofline,
        "speedups.png": plot_speedups,
    }
    paths = [draw(records, args.out / name) for name, draw in made.items()]
    return [path for path in paths if path is not None]
