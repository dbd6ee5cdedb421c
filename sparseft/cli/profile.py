"""``sparseft profile``: what a training step takes at each density, predicted and measured."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparseft.profiling.profiles import Profile

__all__ = ["HELP", "add_parser", "run"]

HELP = "memory and time of a training step by density, predicted and measured"

_EPILOG = """\
examples:
  sparseft profile --model xlmr-base --density 0.001 0.01 0.1 1.0
  sparseft profile --model my-model/ --task classification --batch 16 --length 256
  sparseft profile --model 7b --dtype bf16 --base 4bit --checkpointing --batch 1 --length 2048 \\
      --device cuda --predict-only --fits 24GiB 80GiB     seconds a row, no memory, no GPU
  sparseft profile --model 13b --dtype bf16 --world-size 8 --device cuda --predict-only
  sparseft profile --model encoder:2x64x500 --world-size 2 --sharding ddp
                                             two processes of this machine
  sparseft profile --model encoder:12x384x25000 --out profile/       JSON and a PNG of bars

--model is a folder with a config.json, a name on the hub, a size (xlmr-base, xlmr-large, mbert,
bert-base, roberta-base, mt5-base, gpt2, 7b, 13b, 30b), or encoder: decoder: seq2seq: with
LAYERSxHIDDENxVOCAB. Without weights in the folder they are drawn: figures do not depend on them.

predicted: the same step on tensors without memory, whose storages are followed. measured: the step
itself, in a process of its own for each way; on a CPU the allocator as torch.profiler records it,
on a GPU the statistics of torch's caching allocator. Neither counts the interpreter, code or the
CUDA context. What is predicted to need more than is free is not measured, and says so.

--world-size N: figures are of one rank, whose batch is --batch, with the bytes that it exchanges
in a step. Measured in N processes: up to 8 over gloo on a CPU, over NCCL where each has a GPU. They
are not timed.

ways: attached (masks of each density), dense (full fine-tuning), lora (PEFT's, as many trained
numbers as the masks), frozen (forward and backward, nothing trained); also gradient_mask, shira.

what comes out with --out DIR:
  DIR/profile.json   every figure in bytes and seconds (with quartiles), commit, hardware, versions
  DIR/profile.png    stacked bars, predicted beside measured"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "profile",
        help=HELP,
        description="Says what training a model takes, before a GPU is rented for it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    step = parser.add_argument_group("the step")
    step.add_argument("--model", required=True, metavar="MODEL", help="folder, name or size")
    step.add_argument(
        "--density",
        nargs="+",
        type=float,
        metavar="D",
        help="shares in (0, 1] of the matrices' entries; default: 0.001 0.01 0.05 0.1 1.0",
    )
    step.add_argument(
        "--ways",
        default="attached,dense,lora,frozen",
        metavar="A,B",
        help="default: %(default)s",
    )
    step.add_argument(
        "--task", default="auto", help="mlm, classification, causal, seq2seq or auto (default)"
    )
    step.add_argument("--batch", type=int, default=8, metavar="N", help="default: %(default)s")
    step.add_argument("--length", type=int, default=128, metavar="N", help="default: %(default)s")
    step.add_argument("--dtype", default="fp32", help="fp32 (default), bf16 or fp16")
    step.add_argument("--base", default="", help="4bit or 8bit: a quantised base, predicted only")
    step.add_argument(
        "--optimizer",
        default="adamw",
        help="adamw (default), adamw_torch, adamw_8bit, sparse_adamw or sgd",
    )
    step.add_argument(
        "--checkpointing", action="store_true", help="activation checkpointing of every layer"
    )
    step.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    where = parser.add_argument_group("where")
    where.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    where.add_argument("--threads", type=int, metavar="N", help="of torch; default: torch's own")
    where.add_argument(
        "--world-size", type=int, default=1, metavar="N", help="ranks that share the step"
    )
    where.add_argument(
        "--sharding",
        default="fsdp",
        metavar="HOW",
        help="fsdp (default): weights cut over the ranks; ddp: everything on each",
    )
    where.add_argument("--predict-only", action="store_true", help="measure nothing")
    where.add_argument(
        "--large", action="store_true", help="measure 7b, 13b and 30b, too, where memory suffices"
    )
    where.add_argument(
        "--steps", type=int, default=5, metavar="N", help="timed steps; default: %(default)s"
    )
    where.add_argument(
        "--fits", nargs="+", default=[], metavar="SIZE", help="the largest density in 24GiB, 80GiB"
    )
    out = parser.add_argument_group("output")
    out.add_argument("--out", type=Path, metavar="DIR", help="write JSON and a PNG there")
    out.add_argument("--json", metavar="FILE", help="write JSON; -: print it instead of the table")
    out.add_argument(
        "--plot",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a PNG in --out (default: yes)",
    )


def run(args: argparse.Namespace) -> int:
    """Profile, print and write."""
    from sparseft.cli._output import progress, quiet_peft, quiet_transformers
    from sparseft.errors import OptionError
    from sparseft.profiling.profiles import DEFAULT_DENSITIES, profile
    from sparseft.profiling.report import profile_json
    from sparseft.profiling.workload import Workload

    for name in ("threads", "steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise OptionError(f"--{name} {value}; wanted at least 1.")
    workload = Workload(
        model=args.model,
        task=args.task,
        batch=args.batch,
        length=args.length,
        dtype=args.dtype,
        base=args.base,
        optimizer=args.optimizer,
        checkpointing=args.checkpointing,
        seed=args.seed,
    )
    quiet_transformers()
    with progress() as tick, quiet_peft():
        found = profile(
            workload,
            args.density or DEFAULT_DENSITIES,
            ways=[way for way in args.ways.replace(" ", "").split(",") if way],
            device=args.device,
            world_size=args.world_size,
            sharding=args.sharding,
            predict_only=args.predict_only,
            large=args.large,
            fits=args.fits,
            steps=args.steps,
            threads=args.threads,
            progress=tick,
        )
    document = json.dumps(profile_json(found), indent=1, allow_nan=False) + "\n"
    if args.json == "-":
        sys.stdout.write(document)
    else:
        _print(found)
    _write(args, found, document)
    return 0


def _print(found: Profile) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sparseft.profiling.report import (
        exchange_table,
        fit_line,
        lines_above,
        notes_below,
        profile_table,
    )

    tables = []
    for header, rows in (profile_table(found), exchange_table(found)):
        # The box puts one space between columns: twelve of them in 100 characters.
        table = Table(box=box.SIMPLE_HEAD, padding=0)
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        tables += [table] if rows else []
    # A pipe has no width; rich would cut the table at 80 columns.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100)
    for line in lines_above(found):
        console.print(Text(line))
    for table in tables:
        console.print(table)
    for line in [*notes_below(found), *map(fit_line, found.fits)]:
        console.print(Text(line))


def _write(args: argparse.Namespace, found: Profile, document: str) -> None:
    from sparseft.io.atomic import atomic_write_text
    from sparseft.profiling.plot import plot_profile

    files = [] if args.json in (None, "-") else [Path(args.json)]
    if args.out is not None:
        files.append(args.out / "profile.json")
    for file in files:
        atomic_write_text(file, document)
    if args.out is not None and args.plot:
        files.append(args.out / "profile.png")
        plot_profile(found, files[-1])
    if files:
        print(f"written: {', '.join(map(str, files))}", file=sys.stderr)
