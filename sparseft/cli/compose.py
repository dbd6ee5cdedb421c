"""``sparseft compose``: several adapters into one checkpoint or one adapter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["HELP", "add_parser", "run"]

HELP = "put adapters on a base and write a stock checkpoint, or merge them into one adapter"

_DESCRIPTION = """\
Adds adapters, each times its coefficient, in fp32 with one rounding at the end. The order of
adapters does not change a bit of the result."""

_EPILOG = """\
examples:
  sparseft compose --base xlm-roberta-base --adapter sw/ nli/ --out merged/
      a complete checkpoint: base + Swahili + task, ready for from_pretrained
  sparseft compose --base path/to/model --adapter sw/ nli/ --coeff 0.8 1 --out merged/
      with coefficients, one per adapter in that order; negative ones subtract
  sparseft compose --adapter sw/ nli/ --out sw-nli.safetensors
      no base: one adapter that holds the sum

what comes out: with --base a folder with config, weights, tokenizer and
sparseft_composition.json (which adapters, which coefficients); else an adapter. A folder or file
that exists is only replaced with --overwrite; a failure leaves it as it was."""


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "compose",
        help=HELP,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--base",
        metavar="PATH",
        help="folder of the base model, or its name on the hub (what was downloaded is used as is)",
    )
    parser.add_argument(
        "--adapter", nargs="+", required=True, metavar="A", help="adapter folders or files"
    )
    parser.add_argument(
        "--coeff", nargs="+", type=float, metavar="C", help="one per adapter (default: 1 each)"
    )
    parser.add_argument(
        "--method",
        default="linear",
        metavar="NAME",
        help="how to combine (default: %(default)s); an unknown name lists those there are",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="what to write")
    parser.add_argument(
        "--architecture",
        metavar="CLASS",
        help="class of transformers for the base, e.g. AutoModelForMaskedLM (default: a sequence "
        "classifier if an adapter has such a head, else what the base names)",
    )
    parser.add_argument(
        "--missing",
        choices=("auto", "error", "skip"),
        default="auto",
        help="diffs of parameters the model lacks: auto leaves out those of an absent head "
        "(default), error refuses, skip leaves out all",
    )
    parser.add_argument(
        "--no-check-base", action="store_true", help="do not compare the base's fingerprint"
    )
    parser.add_argument("--name", help="name of a merged adapter (default: the names joined)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def run(args: argparse.Namespace) -> int:
    """Compose and say what was written."""
    from sparseft._text import human_bytes
    from sparseft.cli._paths import need_adapters
    from sparseft.composition import compose_adapters, merge_into_checkpoint
    from sparseft.errors import CompositionError
    from sparseft.io import adapter_file

    if args.coeff is not None and len(args.coeff) != len(args.adapter):
        raise CompositionError(
            f"--coeff has {len(args.coeff)} numbers for {len(args.adapter)} adapters; give one "
            "each, in that order."
        )
    target = args.out if args.base is not None else adapter_file(args.out)
    if target.exists() and not args.overwrite:
        raise CompositionError(f"{target} exists already; add --overwrite, or give another --out.")
    need_adapters(args.adapter)
    coeffs = args.coeff or [1.0] * len(args.adapter)
    if args.base is None:
        if args.architecture is not None:
            raise CompositionError(
                "--architecture needs --base: without one an adapter is written."
            )
        merged = compose_adapters(args.adapter, coeffs, name=args.name, method=args.method)
        path = merged.save(args.out, overwrite=args.overwrite)
        size = human_bytes(path.stat().st_size)
        print(
            f"{path}: {merged.nnz:,} entries in {len(merged)} tensors, {len(merged.dense)} dense, "
            f"{size}"
        )
        return 0

    from sparseft.cli._output import quiet_transformers

    quiet_transformers()
    folder = merge_into_checkpoint(
        args.base,
        args.adapter,
        coeffs,
        args.out,
        method=args.method,
        architecture=args.architecture,
        overwrite=args.overwrite,
        check_base=not args.no_check_base,
        missing=args.missing,
    )
    size = human_bytes(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()))
    parts = " + ".join(f"{c:g} * {a}" for a, c in zip(args.adapter, coeffs, strict=True))
    print(f"{folder}: {args.base} + {parts}, {size}")
    return 0
