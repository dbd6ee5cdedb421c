"""Tables and progress for the commands: rich in a terminal, plain text in a pipe or a log."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

__all__ = ["Ticker", "print_table", "progress", "quiet_peft", "quiet_transformers"]

Ticker = Callable[[str, int, int], None]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table to standard output, the first column left-aligned, the others right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(header):
        table.add_column(
            name, justify="left" if i == 0 else "right", no_wrap=i > 0, overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # A pipe has no width; rich would cut the table at 80 columns. The table takes what it needs.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 1000)
    if title:  # above the table, not in it: rich would break it at the table's width
        console.print(Text(title))
    console.print(table)


@contextmanager
def progress() -> Iterator[Ticker]:
    """Give a function ``tick(what, done, of)`` that shows how far each named thing is.

    Shown on standard error and in a terminal only: logs and pipes stay clean.
    """
    if not sys.stderr.isatty():
        yield lambda what, done, of: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bars:
        known: dict[str, TaskID] = {}

        def tick(what: str, done: int, of: int) -> None:
            if what not in known:
                known[what] = bars.add_task(what, total=of)
            bars.update(known[what], completed=done)
            if done >= of:
                bars.remove_task(known.pop(what))

        yield tick


def quiet_transformers() -> None:
    """Silence transformers' loading report and bars: the commands say what is new or missing."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence what PEFT's adapters make other libraries warn of, which no user can change."""
    with warnings.catch_warnings():
        # transformers, asked by PEFT for a name that is about to go.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        # torch, of the sparse tensor that SHiRA makes anew in each forward pass.
        warnings.filterwarnings("ignore", "Sparse invariant checks", UserWarning)
        yield
