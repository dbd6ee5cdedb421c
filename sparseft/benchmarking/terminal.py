"""A case as a table in the terminal: rich's, in colours; in a pipe, plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparseft.benchmarking.suite_report import show_spread, show_times

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["case_table", "case_title", "checks_text", "share_text"]

_HEADINGS = (
    "contender",
    "median (quartiles)",
    "x baseline (quartiles)",
    "baseline",
    "GB/s (% of copy)",
    "TFLOP/s (% of GEMM)",
    "peak MB",
    "checks",
)
_ALWAYS = (0, 1, 2, 7)
_LEFT = (0, 3, 7)
_WIDTHS = {0: 20, 3: 12, 7: 12}  # at least, however narrow the terminal
_STYLES = {"red": "bold red", "error": "bold red", "skipped": "dim", "ok": ""}


def case_title(result: Mapping[str, Any]) -> str:
    """Return the case's name with its status, if that is not "ok", and why."""
    title = result["name"]
    if result["status"] != "ok":
        title += f": {result['status'].upper()}"
    if "contenders" not in result:
        title += f": {result['reason']}"
    return title


def case_table(result: Mapping[str, Any]) -> Table:
    """Return a table with a row per contender; wrong ones are red and have no times.

    Args:
        result: of `run_suite`, with contenders.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    case_rows = result["contenders"]
    table = Table(box=box.SIMPLE_HEAD)
    rows = [_cells(row, result.get("baseline")) for row in case_rows]
    # Columns that no row fills are left out: terminals are narrow.
    kept = [n for n in range(len(_HEADINGS)) if n in _ALWAYS or any(cells[n] for cells in rows)]
    for number in kept:
        table.add_column(
            _HEADINGS[number],
            justify="left" if number in _LEFT else "right",
            overflow="fold",
            min_width=_WIDTHS.get(number),
        )
    for row, cells in zip(case_rows, rows, strict=True):
        style = _STYLES[row["status"]]
        if not style and row.get("ours"):
            style = "bold"
        table.add_row(*(Text(cells[number]) for number in kept), style=style)
    return table


def _cells(row: Mapping[str, Any], baseline: str | None) -> list[str]:
    against = row.get("against")
    # What is a baseline itself shows 1.000.
    known = against in (None, baseline, row["name"]) or "clocks" not in row
    other = "" if known else str(against)
    peak = row.get("facts", {}).get("peak MB")
    memory = "" if peak is None else f"{peak:,.4g}"
    return [row["name"], *_times(row), other, *_shares(row), memory, checks_text(row)]


def _times(row: Mapping[str, Any]) -> tuple[str, str]:
    for clock in row.get("clocks", {}).values():  # the first: that of the ratios
        ratio = clock.get("ratio")
        return (
            show_times(clock["seconds"]),
            "" if ratio is None else show_spread(ratio, lambda x: f"{x:.3f}"),
        )
    return "", ""


def _shares(row: Mapping[str, Any]) -> tuple[str, str]:
    speed = row.get("speed", {})
    return (
        share_text(speed, "GB/s", "% of copy"),
        share_text(speed, "TFLOP/s", "% of GEMM"),
    )


def share_text(speed: Mapping[str, float], unit: str, share: str) -> str:
    """Return ``23.4 (56%)``; empty where the number is not known."""
    if unit not in speed:
        return ""
    text = f"{speed[unit]:.3g}"
    return f"{text} ({speed[share]:.3g}%)" if share in speed else text


def checks_text(row: Mapping[str, Any]) -> str:
    """Return how many checks passed; of a row that was not timed, why."""
    if row["status"] != "ok":
        lines = str(row.get("reason", "")).splitlines() or [""]
        return f"{row['status'].upper()}: {lines[-1]}"  # of a traceback what it was
    count = len(row["checks"])
    return f"{count} passed" if count else "none"
