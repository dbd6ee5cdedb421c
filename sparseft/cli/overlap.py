"""``sparseft overlap``: how much adapters have in common, as tables, JSON and a heat map."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparseft.composition.overlap_groups import Groups
    from sparseft.composition.overlap_pairs import OverlapReport

__all__ = ["HELP", "add_parser", "run"]

HELP = "compare adapters pair by pair: masks, sign conflicts, directions"

_EPILOG = """\
examples:
  sparseft overlap sw/ qu/ nli/                      every pair, all tensors together
  sparseft overlap sw/ nli/ --per-layer              and layer by layer
  sparseft overlap sw/ nli/ --group '*attention*' '*embeddings*'
  sparseft overlap sw/ qu/ nli/ --png overlap.png    a heat map; with --pair sw nli of two of them
  sparseft overlap sw/ nli/ --json overlap.json      everything, tensor by tensor

x chance: entries in common, divided by what independent masks of that size would share. opposed:
entries that the two change in opposite directions, of those that both change. With more than two
adapters rows of layers, groups and tensors are means over all pairs; --pair picks one."""


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "overlap",
        help=HELP,
        description="Compares two or more adapters of one base; no model is needed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", nargs="+", metavar="FILE", help="adapter folders or files")
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--per-layer", action="store_true", help="a row per layer, too")
    rows.add_argument("--per-tensor", action="store_true", help="a row per tensor, too")
    rows.add_argument(
        "--group", nargs="+", metavar="PATTERN", help="a row per pattern of tensors' names, too"
    )
    parser.add_argument(
        "--pair", nargs=2, metavar="NAME", help="the two adapters of those rows and of the picture"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw a heat map")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument(
        "--no-check-base", action="store_true", help="compare adapters of different bases, too"
    )


def run(args: argparse.Namespace) -> int:
    """Print the tables and write the files."""
    from sparseft.cli._paths import need_adapters
    from sparseft.composition import overlap_report
    from sparseft.io.atomic import atomic_write

    need_adapters(args.adapter)
    report = overlap_report(args.adapter, check_base=not args.no_check_base)
    by: Groups | None = args.group
    if args.per_layer:
        by = "layer"
    elif args.per_tensor:
        by = "tensor"
    pair = tuple(args.pair) if args.pair else None
    # All that can be refused comes before anything is printed.
    rows = None if by is None else report.table(by, pair)
    if pair is not None:
        report.pair(*pair)
    _print_report(report, args.adapter)
    if rows is not None:
        _print_rows(report, rows, pair)
    if args.json is not None:
        text = json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n"
        with atomic_write(args.json) as file:
            file.write(text.encode())
        print(f"{args.json}: {len(report.pairs)} pairs in {len(report.tensors)} tensors")
    if args.png is not None:
        print(f"{report.heatmap(args.png, pair)}: heat map")
    return 0


def _print_report(report: OverlapReport, paths: list[str]) -> None:
    from sparseft.cli._output import print_table
    from sparseft.composition.overlap_tables import LEGEND, adapter_table

    header, rows = adapter_table(report)
    print_table([*header, "file"], [[*row, path] for row, path in zip(rows, paths, strict=True)])
    print_table(*report.table(), title=f"{LEGEND[0].upper()}{LEGEND[1:]}")


def _print_rows(
    report: OverlapReport, table: tuple[list[str], list[list[str]]], pair: tuple[str, ...] | None
) -> None:
    from sparseft.cli._output import print_table

    shown = pair or (report.names if len(report.names) == 2 else None)
    title = "Means over all pairs" if shown is None else " | ".join(shown)
    print_table(*table, title=title)
