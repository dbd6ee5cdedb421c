"""``sparseft compose``: several adapters into one checkpoint or one adapter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["HELP", "add_parser", "run"]

HELP = "put adapters on a base and write a stock checkpoint, or merge them into one adapter"

_DESCRIPTION = """\
Combines adapters, each times its coefficient, in fp32 with one rounding at the end. The order of
adapters does not change a bit of the result. A base is streamed: one of its tensors is in memory at
a time."""

_EPILOG = """\
examples:
  sparseft compose --base xlm-roberta-base --adapter sw/ nli/ --out merged/
      a complete checkpoint: base + Swahili + task, ready for from_pretrained
  sparseft compose --base path/to/model --adapter sw/ nli/ --coeff 0.8 1 --out merged/
      with coefficients, one per adapter in that order; negative ones subtract
  sparseft compose --base path/to/model --adapter sw/ nli/ --method ties --option density=0.2 \\
      --out merged/
      by another method, with an option of it; --help-methods lists methods and their options
  sparseft compose --adapter sw/ nli/ --out sw-nli.safetensors
      no base: one adapter that holds the sum

what comes out: with --base a folder with everything the base's folder has (the same shards, config,
tokenizer), the weights composed, and beside them README.md (a model card) and
sparseft_composition.json, which say which adapters, coefficients and method; else an adapter. A
folder or file that exists is only replaced with --overwrite, and a folder only if it is a model's;
a failure leaves it as it was.

The inverse, an adapter from a base and a tuned checkpoint, is `sparseft diff`."""


class _HelpMethods(argparse.Action):
    """Print the registered methods: imported when asked for, as plain help needs no torch."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        from sparseft.cli._options import list_options
        from sparseft.composition import methods

        for name, entry in methods().items():
            print(f"{name}\n    {entry.summary}\n    options: {list_options(entry) or 'none'}")
            print(f"    {entry.reference}")
        parser.exit()


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
        help="how to combine (default: %(default)s); --help-methods lists those there are",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the method, e.g. density=0.2; may be given several times",
    )
    parser.add_argument(
        "--help-methods", action=_HelpMethods, nargs=0, help="list methods and options, and stop"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="what to write")
    parser.add_argument(
        "--architecture",
        metavar="CLASS",
        help="with --base: its class of transformers, e.g. AutoModelForMaskedLM (default: a "
        "sequence classifier if an adapter has such a head, else what the base names)",
    )
    parser.add_argument(
        "--missing",
        choices=("auto", "error", "skip"),
        help="with --base: diffs of parameters the model lacks: auto leaves out those of an absent "
        "head (default), error refuses, skip leaves out all",
    )
    parser.add_argument(
        "--no-check-base",
        action="store_true",
        help="do not check that the adapters are of this base, or of one base",
    )
    parser.add_argument(
        "--name", help="without --base: name of the merged adapter (default: the names joined)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the model or adapter there"
    )


def run(args: argparse.Namespace) -> int:
    """Compose and say what was written."""
    from sparseft._text import human_bytes
    from sparseft.cli._options import parse_options
    from sparseft.cli._paths import need_adapters, not_an_input
    from sparseft.composition import compose_adapters, merge_into_checkpoint
    from sparseft.composition.registry import REGISTRY
    from sparseft.errors import CompositionError
    from sparseft.io import adapter_file

    if args.coeff is not None and len(args.coeff) != len(args.adapter):
        raise CompositionError(
            f"--coeff has {len(args.coeff)} numbers for {len(args.adapter)} adapters; give one "
            "each, in that order."
        )
    if args.base is None:
        for option in ("architecture", "missing"):
            if getattr(args, option) is not None:
                raise CompositionError(
                    f"--{option} needs --base: without one an adapter is written."
                )
    elif args.name is not None:
        raise CompositionError(
            "--name is for a merged adapter; with --base a checkpoint is written, which has none."
        )
    entry = REGISTRY.get(args.method)
    options = parse_options(args.option, entry)
    REGISTRY.check_options(args.method, options)
    target = args.out if args.base is not None else adapter_file(args.out)
    if target.exists() and not args.overwrite:
        raise CompositionError(f"{target} exists already; add --overwrite, or give another --out.")
    need_adapters(args.adapter)
    coeffs = args.coeff or [1.0] * len(args.adapter)
    if args.base is None:
        not_an_input(target, args.adapter)
        merged = compose_adapters(
            args.adapter,
            coeffs,
            name=args.name,
            method=args.method,
            check_base=not args.no_check_base,
            **options,
        )
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
        missing=args.missing or "auto",
        **options,
    )
    size = human_bytes(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()))
    parts = " + ".join(f"{c:g} * {a}" for a, c in zip(args.adapter, coeffs, strict=True))
    how = "" if args.method == "linear" else f" ({' '.join([args.method, *args.option])})"
    print(f"{folder}: {args.base} + {parts}{how}, {size}")
    return 0
