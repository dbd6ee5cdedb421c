"""The overlap report as tables of text and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparseft.composition.overlap_groups import Groups

if TYPE_CHECKING:
    from sparseft.composition.overlap_pairs import OverlapReport, PairOverlap

__all__ = ["adapter_table", "group_table", "markdown", "mean_table", "pair_table"]

_COLUMNS = ["common", "union", "Jaccard", "x chance", "opposed", "of common", "cosine"]

LEGEND = (
    "common: entries of both masks; Jaccard: common / union; x chance: common, divided by what "
    "independent masks would share; opposed: common entries changed in opposite directions, and "
    "their share; cosine: of the angle between the changes."
)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _cells(pair: PairOverlap) -> list[str]:
    return [
        f"{pair.common:,}",
        f"{pair.union:,}",
        f"{pair.jaccard:.4f}",
        _number(pair.times_chance, ".2f"),
        f"{pair.opposed:,}",
        _share(pair.conflict),
        _number(pair.cosine, "+.4f"),
    ]


def adapter_table(report: OverlapReport) -> tuple[list[str], list[list[str]]]:
    """Return a row for each adapter: entries and norm."""
    rows = [[n, f"{report.nnz[n]:,}", f"{report.norms[n]:.4g}"] for n in report.names]
    return ["adapter", "entries", "norm"], rows


def pair_table(report: OverlapReport) -> tuple[list[str], list[list[str]]]:
    """Return a row for each pair."""
    return ["pair", *_COLUMNS], [
        [f"{a} | {b}", *_cells(report.pair(a, b))] for a, b in report.pairs
    ]


def group_table(
    report: OverlapReport, by: Groups, pair: tuple[str, str]
) -> tuple[list[str], list[list[str]]]:
    """Return a row for each group of tensors: one pair's."""
    rows = [[group, *_cells(found)] for group, found in report.by(by, *pair).items()]
    return [_title(by), *_COLUMNS], rows


def mean_table(report: OverlapReport, by: Groups) -> tuple[list[str], list[list[str]]]:
    """Return a row for each group of tensors: means over all pairs, and the closest pair."""
    columns = {pair: report.by(by, *pair) for pair in report.pairs}
    rows = []
    for group in next(iter(columns.values())):
        found = {pair: column[group] for pair, column in columns.items()}
        closest = max(found, key=lambda pair: found[pair].jaccard)
        rows.append(
            [
                group,
                _number(_mean([p.jaccard for p in found.values()]), ".4f"),
                _number(_mean([p.times_chance for p in found.values()]), ".2f"),
                _share(_mean([p.conflict for p in found.values()])),
                _number(_mean([p.cosine for p in found.values()]), "+.4f"),
                f"{' | '.join(closest)} {found[closest].jaccard:.4f}",
            ]
        )
    header = ["mean Jaccard", "x chance", "opposed", "mean cosine", "closest pair (Jaccard)"]
    return [_title(by), *header], rows


def markdown(report: OverlapReport, by: Groups | None, pair: tuple[str, str] | None) -> str:
    """Return a heading, the tables and the legend."""
    out = ["# Overlap of adapters", ""]
    tables = [adapter_table(report), report.table()]
    if by is not None:
        tables.append(report.table(by, pair))
    for header, rows in tables:
        out.append("| " + " | ".join(map(_escape, header)) + " |")
        out.append("|---|" + "---:|" * (len(header) - 1))
        out += ["| " + " | ".join(map(_escape, row)) + " |" for row in rows]
        out.append("")
    return "\n".join([*out, LEGEND[0].upper() + LEGEND[1:]]) + "\n"


def _title(by: Groups) -> str:
    return by if isinstance(by, str) and by in ("layer", "tensor") else "group"


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
