"""``sparseft demo``: the embedded study."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["HELP", "add_parser", "run"]

HELP = "the embedded study: learn, compose and score adapters in 4 minutes, no network"

_DESCRIPTION = """\
Trains sparse adapters on names of places, languages and currencies (Unicode CLDR, installed with
Babel) with a tiny encoder that ships with sparseft, and scores them in languages that the encoder
has never seen: the task adapter alone and task + language adapters, with plain and with denoised
masks (LT-SFT, DeFT-X) from the same dense phases, and full fine-tuning."""

_EPILOG = """\
examples:
  sparseft demo                      four languages, one seed: about 4 minutes on two CPU cores
  sparseft demo --full               ten languages, three seeds, several densities
  sparseft demo --out my-demo        write there

what comes out, in the output folder:
  results.json, results.md, results.png    the scores and the plot
  adapters/                                every adapter; see them with `sparseft inspect`
Interrupted? The same command goes on where it stopped."""


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help=HELP,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--full", action="store_true", help="ten languages, three seeds, several densities"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("sparseft-demo"),
        metavar="DIR",
        help="output folder (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the study; it prints its own table."""
    from sparseft.cli._output import quiet_transformers
    from sparseft.cli._recipe import starting_over_by_hand
    from sparseft.demo.study import run_demo

    quiet_transformers()
    with starting_over_by_hand():
        run_demo(full=args.full, output_dir=args.out, seed=args.seed)
    return 0
