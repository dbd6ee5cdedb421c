"""``sparseft bench --compare``: prints what two revisions took, and the control's ratio."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from sparseft.benchmarking.planning import Planned
    from sparseft.benchmarking.trees import Tree

__all__ = ["compare"]


def compare(
    args: argparse.Namespace, planned: Sequence[Planned], device: torch.device, *, quick: bool
) -> int:
    """Measure, print, write; 1 if anything was wrong on the newer side."""
    from sparseft.benchmarking.cases import file_of
    from sparseft.benchmarking.records import append_records, dump_lines, made_by
    from sparseft.benchmarking.revisions import compare_revisions
    from sparseft.benchmarking.suite_report import suite_source
    from sparseft.cli.bench import console_of, verdict
    from sparseft.io.atomic import atomic_write_text

    console = console_of(args)
    made = made_by(str(device))
    lines: list[str] = []

    def started(before: Tree, after: Tree) -> None:
        for key, value in (suite_source(device, tiny=quick) | {"seed": "0"}).items():
            if key != "commit":  # there are two
                console.print(f"{key}: {value}", highlight=False, markup=False)
        note = "ratios are after / before: below 1 is faster now"
        console.print(f"before: {before}\nafter: {after}\n{note}", highlight=False, markup=False)

    def progress(result: Mapping[str, Any]) -> None:
        _show(console, result)
        text = dump_lines(_records(result, made))
        lines.append(text)
        if args.json == "-":
            sys.stdout.write(text)
            sys.stdout.flush()
        elif args.json is not None:
            append_records(args.json, _records(result, made))
        if args.out is not None:
            atomic_write_text(args.out / "compare.jsonl", "".join(lines))

    results = compare_revisions(
        args.compare,
        planned,
        device,
        files=file_of,
        rounds=args.rounds or (2 if quick else 25),
        seconds=args.seconds or (1.0 if quick else 15.0),
        clock=args.clock,
        warmup=1 if quick else 3,
        started=started,
        progress=progress,
    )
    if args.out is not None:
        console.print(f"{args.out}: compare.jsonl", markup=False)
    return verdict(console, results)


def _show(console: Console, result: Mapping[str, Any]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from sparseft.benchmarking.suite_report import show_spread, show_times

    title = result["name"]
    if result["status"] != "ok":
        title += f": {result['status']}: {result.get('reason', '')}".rstrip(": ")
    bad = result["status"] in ("red", "error")
    console.print(Text(title, style="bold red" if bad else "bold"))
    if "contenders" not in result:
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("contender", overflow="fold")
    for heading in ("before (quartiles)", "after (quartiles)", "after / before (quartiles)"):
        table.add_column(heading, justify="right")
    for row in result["contenders"]:
        name = f"{row['name']} (control)" if row["control"] else row["name"]
        cells = [name, "", "", f"{row['status']}: {row['reason']}"]
        if row["status"] == "ok":
            spreads = [show_times(row[f"{side}_seconds"]) for side in _SIDES]
            cells = [name, *spreads, show_spread(row["ratio"], lambda x: f"{x:.3f}")]
        style = "bold red" if row["status"] in ("red", "error") else ""
        table.add_row(*(Text(cell) for cell in cells), style=style)
    console.print(table)


_SIDES = ("before", "after")
_ROW = ("name", "ours", "control", "density", "status", "reason")
_TIMED = ("rounds", "before_seconds", "after_seconds", "ratio", "samples")
_CASE = ("op", "shape", "dtype", "before", "after", "clock")


def _records(result: Mapping[str, Any], made: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a record per contender; a case that was not timed is one by itself."""
    shared = {"case": result["name"], "provenance": dict(made)}
    shared |= {key: result.get(key) for key in _CASE}
    records = []
    for row in result.get("contenders") or [{**result, "name": None}]:
        record = {key: row.get(key) for key in (*_ROW, *_TIMED)}
        record["contender"] = record.pop("name")
        records.append(record | shared)
    return records
