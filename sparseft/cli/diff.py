"""``sparseft diff``: an adapter from a base and a tuned checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["HELP", "add_parser", "run"]

HELP = "extract an adapter from a base and a tuned checkpoint"

_DESCRIPTION = """\
Compares two checkpoints of one model and keeps what changed as an adapter. Both are streamed: two
tensors are in memory at a time, beside the result."""

_EPILOG = """\
examples:
  sparseft diff xlm-roberta-base my-tuned/ --density 0.05 --out swahili/
      the 5 % of all weights that moved most, over all tensors
  sparseft diff base/ tuned/ --all --mode set --out change/
      every entry that differs in any bit; composed onto the base it gives back the weights of
      tuned/, bit for bit, if both have the same tensors in the same dtypes (else a warning says
      what is not given back):
      sparseft compose --base base/ --adapter change/ --out tuned-again/
  sparseft diff base/ tuned/ --nnz 1000000 --exclude '*.embeddings.*' --out change.safetensors
      exactly a million entries, embeddings left out

modes: add stores differences in fp32, which can be weighted and summed with other adapters' (the
default); set stores the tuned values, which replace the base's.

what comes out: an adapter (a folder, or a file that ends in .safetensors) with the base's
fingerprint in it. Tensors that only the tuned checkpoint has (a head) are kept whole."""


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "diff",
        help=HELP,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = "folder, file of safetensors, or name on the hub"
    parser.add_argument("base", metavar="BASE", help=f"the model before: {where}")
    parser.add_argument("tuned", metavar="TUNED", help="the model after, of the same kind")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="what to write")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="every entry that differs in any bit")
    which.add_argument(
        "--density", type=float, metavar="D", help="the largest differences: this fraction of all"
    )
    which.add_argument(
        "--nnz", type=int, metavar="K", help="the largest differences: exactly so many"
    )
    parser.add_argument(
        "--mode",
        choices=("add", "set"),
        default="add",
        help="store differences or the tuned values (default: %(default)s)",
    )
    parser.add_argument(
        "--new",
        choices=("dense", "error", "skip"),
        default="dense",
        help="tensors that only TUNED has: keep them whole (default), refuse, or leave them out",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="tensors that are not looked at; may be given several times",
    )
    parser.add_argument("--name", help="name of the adapter (default: that of TUNED)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def run(args: argparse.Namespace) -> int:
    """Extract, save, and say what was found."""
    from sparseft._text import human_bytes
    from sparseft.cli._output import quiet_transformers
    from sparseft.cli._paths import not_an_input
    from sparseft.composition import extract_adapter
    from sparseft.errors import CompositionError
    from sparseft.io import adapter_file

    target = adapter_file(args.out)
    if target.name != adapter_file("").name:  # which may lie in a model's folder
        not_an_input(target, [args.base, args.tuned])
    if target.exists() and not args.overwrite:
        raise CompositionError(f"{target} exists already; add --overwrite, or give another --out.")
    quiet_transformers()
    adapter = extract_adapter(
        args.base,
        args.tuned,
        nnz=args.nnz,
        density=args.density,
        mode=args.mode,
        name=args.name,
        new=args.new,
        exclude=args.exclude,
    )
    path = adapter.save(args.out, overwrite=args.overwrite)
    whole = f", {len(adapter.dense)} kept whole ({', '.join(adapter.dense)})" * bool(adapter.dense)
    size = human_bytes(path.stat().st_size)
    print(f"{path}: {adapter.nnz:,} entries in {len(adapter)} tensors{whole}, {size}")
    if not adapter.nnz and not adapter.dense:
        if args.all:
            print(
                f"The two checkpoints hold the same weights{' in all else' * bool(args.exclude)}."
            )
        else:
            print("--nnz 0 asks for no entry, so there is none in it.")
    return 0
