"""The Markdown form of results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparseft.data.languages import builtin_languages

if TYPE_CHECKING:
    from sparseft.evaluation.report import Cell, Gain, Results

__all__ = ["MAX_COLUMNS", "cell_text", "escape", "gain_text", "results_markdown", "summary_table"]

MAX_COLUMNS = 6  # languages across; a cell takes 14 characters


def cell_text(cell: Cell | None) -> str:
    """Return a score times 100 with its deviation: ``71.3 ± 0.8``, ``71.3``, or ``-`` for none."""
    if cell is None:
        return "-"
    return f"{100 * cell.mean:.1f}" + ("" if cell.sd is None else f" ± {100 * cell.sd:.1f}")


def gain_text(gain: Gain) -> str:
    """Return a gain times 100 with its standard error over languages."""
    error = gain.standard_error
    tail = "" if error is None else f", standard error {100 * error:.1f}"
    by = ", ".join(f"{code} {100 * value:+.1f}" for code, value in gain.languages.items())
    return f"{100 * gain.mean:+.1f}{tail}; {by}"


def summary_table(results: Results, metric: str | None = None) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of the summary of one metric, scores times 100.

    A row is a setting; with many languages it is a language, so that the table stays readable.
    """
    summaries = results.summary(metric)
    languages = results.languages()
    header = ["setting", *languages, "mean", "worst", "gap", "seeds"]
    rows = []
    for s in summaries:
        counts = sorted({cell.seeds for cell in s.languages.values()})
        rows.append(
            [
                s.label,
                *(cell_text(s.languages.get(code)) for code in languages),
                cell_text(s.mean),
                f"{s.worst} {100 * s.languages[s.worst].mean:.1f}" if s.worst else "-",
                "-" if s.gap is None else f"{100 * s.gap:.1f}",
                str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}",
            ]
        )
    if len(languages) <= MAX_COLUMNS:
        return header, rows
    turned = [list(line) for line in zip(header, *rows, strict=True)]
    return ["language", *turned[0][1:]], turned[1:]


def escape(text: str) -> str:
    """Return text as a cell of a table shows it."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def results_markdown(results: Results, metrics: Sequence[str]) -> str:
    """Return a heading, one table a metric, the legend and the provenance."""
    out = [f"# {results.title}", ""]
    for metric in metrics:
        header, rows = summary_table(results, metric)
        out += [f"{metric} x 100; mean ± standard deviation over seeds.", ""]
        out.append("| " + " | ".join(map(escape, header)) + " |")
        out.append("|---|" + "---:|" * (len(header) - 1))
        out += ["| " + " | ".join(map(escape, row)) + " |" for row in rows]
        out.append("")
        for density, gain in results.composed_gains(metric):
            at = "" if density is None else f" at density {density:.4g}"
            of = f"languages: {len(gain.languages)}, pairs: {gain.pairs}"
            out += [f"{gain.setting} over {gain.baseline}{at}: {gain_text(gain)} ({of}).", ""]
    names = builtin_languages()
    listed = ", ".join(f"{c} {names.name(c)}" for c in results.languages())
    out.append(f"Languages: {listed}.")
    if results.source_language:
        out.append(
            f"Source language: {results.source_language}; `mean` and `worst` leave it out, `gap` "
            "is "
            "its score minus `mean`."
        )
    made = results.provenance
    if made:
        git = made.get("git") or {}
        commit = f", commit {git['sha'][:12]}{' (modified)' if git['dirty'] else ''}" if git else ""
        versions = ", ".join(f"{k} {v}" for k, v in (made.get("versions") or {}).items())
        out += ["", f"Made by sparseft {made.get('sparseft', '?')}{commit}; {versions}."]
    return "\n".join(out) + "\n"
