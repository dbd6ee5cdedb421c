"""What the demo prints: a progress bar, scores, gains, adapters, a few lines about memory."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from sparseft._text import human_bytes
from sparseft.data.languages import builtin_languages
from sparseft.demo.scoring import SETTINGS
from sparseft.evaluation.markdown import cell_text

if TYPE_CHECKING:
    from sparseft.demo.study import DemoResult

__all__ = ["Display", "peak_rss"]


def peak_rss() -> int | None:
    """Return the largest peak resident memory of this process and its children, None if unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes on Linux


class Display:
    """The demo's output; with ``quiet`` every call does nothing."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(quiet=quiet)
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def intro(self, record: dict[str, Any], languages: Sequence[str], *, agree: bool) -> None:
        """Say what is about to be done, with what."""
        known = builtin_languages()
        shown = ", ".join(known.name(code) for code in languages)
        millions = record["parameters"] / 1e6
        self.console.print(
            f"[bold]Is it a territory, a language or a currency?[/bold] Labels: English names "
            f"only.\nEncoder: {millions:.1f}M parameters, pre-trained on "
            f"{len(record['data']['pretraining_locales'])} languages; it has never seen {shown}.\n"
            "Scored on names of entities that nothing was trained on, in any language."
        )
        if not agree:
            self.console.print(
                "[yellow]The installed Babel has other CLDR names than the encoder was pre-trained "
                f"with (Babel {record['versions']['babel']}): scores will differ a little.[/yellow]"
            )

    @contextmanager
    def progress(self, steps: int) -> Iterator[None]:
        """Show a bar over all optimizer steps of the run."""
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as self._bar:
            self._task = self._bar.add_task("", total=steps)
            yield
        self._bar = None

    def begin(self, what: str) -> None:
        """Name what is being done now."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=what)

    def step(self, phase: str, step: int) -> None:
        """Count one optimizer step."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)

    def advance(self, steps: int) -> None:
        """Count steps that a worker has done."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, steps)

    def interrupted(self, output_dir: Path) -> None:
        """Say that nothing is lost."""
        self.console.print(f"Interrupted. The same command goes on from {output_dir}.")

    def outcome(self, result: DemoResult) -> None:
        """Print the table, the adapters, the memory, and where the files are."""
        densities = {r.density for r in result.results.rows if r.density is not None}
        for density in sorted(densities):
            self.console.print(self._scores(result, density))
            self.console.print(self._gains(result, density))
        self.console.print(self._adapters(result))
        for what, state in sorted(result.state.items()):
            self.console.print(
                f"{what}: gradients {human_bytes(state.gradients)}, optimizer "
                f"{human_bytes(state.optimizer)}, diff {human_bytes(state.diff)}"
            )
        peak = human_bytes(result.peak_rss) if result.peak_rss is not None else "unknown here"
        self.console.print(
            f"Peak memory of a process: {peak}. Time: {result.seconds:.0f} s. "
            f"Files: {', '.join(str(path) for path in result.files)}",
            highlight=False,
        )

    def _scores(self, result: DemoResult, density: float) -> Table:
        results = result.results
        known = builtin_languages()
        summaries = [s for s in results.summary("macro_f1") if s.density in (density, None)]
        split = results.rows[0].split
        table = Table(title=f"macro-F1 x 100, names of {split} keys, diffs at density {density:g}")
        table.add_column("language", no_wrap=True)
        for summary in summaries:
            # a line a word, so that five settings fit in 80 columns
            header = re.sub(r"(?<!\+) ", "\n", summary.setting)
            table.add_column(header, justify="right")
        for code in results.languages():
            name = known.name(code) + (" (source)" if code == results.source_language else "")
            table.add_row(name, *(cell_text(s.languages.get(code)) for s in summaries))
        table.add_section()
        table.add_row("mean of targets", *(cell_text(s.mean) for s in summaries))
        return table

    def _gains(self, result: DemoResult, density: float) -> str:
        (task, composed), (denoised_task, denoised) = SETTINGS["plain"], SETTINGS["denoised"]
        lines = ["Paired differences, ± standard error over languages:"]
        for better, than in (
            (composed, task),
            (denoised, denoised_task),
            (denoised_task, task),
            (denoised, composed),
        ):
            gain = result.results.gain(better, than, "macro_f1", density=density)
            error = "" if gain.standard_error is None else f" ± {100 * gain.standard_error:.1f}"
            each = ", ".join(f"{code} {100 * v:+.1f}" for code, v in gain.languages.items())
            lines.append(f"{better} over {than}: {100 * gain.mean:+.1f}{error}\n    {each}")
        return "\n".join(lines)

    def _adapters(self, result: DemoResult) -> Table:
        table = Table(title="adapters on disk")
        for column in ("adapter", "density", "entries", "as plain", "file"):
            table.add_column(column, justify="left" if column == "adapter" else "right")
        first = min((a.seed for a in result.adapters), default=0)
        for a in result.adapters:
            if a.seed == first:  # the other seeds' weigh the same
                shared = "" if a.shared is None else f"{100 * a.shared:.0f} %"
                size = human_bytes(a.file_bytes)
                table.add_row(a.name, f"{a.density:g}", f"{a.nnz:,}", shared, size)
        return table
