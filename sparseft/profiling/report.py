"""A `Profile` as the cells of a table, as lines of text, and as JSON with provenance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparseft._text import human_bytes
from sparseft.profiling.communication import Communication
from sparseft.profiling.fits import GRID, Fit
from sparseft.profiling.memory import PARTS, MemoryUse
from sparseft.profiling.profiles import Profile, ProfileRow
from sparseft.profiling.workload import Way

__all__ = [
    "exchange_table",
    "fit_line",
    "label_of",
    "lines_above",
    "notes_below",
    "profile_json",
    "profile_table",
]

_NAMES = {"lora": "LoRA", "shira": "SHiRA", "gradient_mask": "grad. mask"}
_HEADINGS = {
    "weights": "weights",
    "diff": "diff",
    "gradients": "grads",
    "optimizer": "optim.",
    "activations": "activ.",
    "temporary": "temp.",
}
_LEGEND = (
    "diff: what the way of training keeps beside the model: leaves, indices, base values, plans; "
    "adapters; masks.",
    "activ.: at the peak, what the forward pass holds for the backward pass. temp.: the rest.",
)
_EXCHANGES = {
    "all_reduced": "all-reduced",
    "all_gathered": "all-gathered",
    "reduce_scattered": "reduce-scattered",
    "broadcast": "broadcast",
}
_OF_RANKS = (
    "Bytes that each rank exchanges in a step: tensors reduced, gathered or sent, whole; sent by a "
    "ring of N ranks: 2 (N - 1)/N of what is all-reduced, (N - 1)/N of what is gathered or "
    "scattered (Patarasuk and Yuan 2009).",
)
# From here on in GiB.
_LARGE = 4 << 30


def label_of(way: Way) -> str:
    """Return ``attached 0.1%``, ``LoRA = 0.1%`` (of equal count), ``dense``."""
    name = _NAMES.get(way.kind, way.kind) + (f" {way.variant}" if way.variant else "")
    if way.density is None:
        return name
    equal = "= " if way.kind in ("lora", "shira") else ""
    return f"{name} {equal}{100 * way.density:.4g}%"


def profile_table(found: Profile) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of cells, narrow enough for 100 columns.

    Where something was measured each way takes two rows, the predicted and the measured; a number
    in brackets says which of `notes_below` tells why there is none. The unit is in `lines_above`.
    """
    parts = [_HEADINGS[name] for name in PARTS]
    unit = _unit(found)[1]
    reasons = _reasons(found)
    if not any(row.measurement for row in found.rows):
        header = ["way", "trained", *parts, "peak"]
        return header, [
            [
                label_of(row.way),
                _count(row.trainable),
                *_bytes(row.predicted, unit, _note(reasons, row.not_predicted)),
            ]
            for row in found.rows
        ]
    header = ["way", "", *parts, "peak", "error", "step", "tok/s"]
    rows = []
    for row in found.rows:
        error = "" if row.error is None else f"{row.error:+.1%}"
        missing = _note(reasons, row.not_predicted)
        rows.append(
            [label_of(row.way), "pred.", *_bytes(row.predicted, unit, missing), error, "", ""]
        )
        time, speed = "", ""
        if row.measurement is not None and row.measurement.steps:
            time = _time(row.measurement.seconds["median"])
            speed = f"{row.measurement.tokens_per_second:,.0f}"
        missing = _note(reasons, row.not_measured)
        second = f"  {_count(row.trainable)}" if row.trainable else ""
        rows.append([second, "meas.", *_bytes(row.measured, unit, missing), "", time, speed])
    if not any(row.measurement and row.measurement.steps for row in found.rows):
        return header[:-2], [cells[:-2] for cells in rows]  # ranks that share a CPU are not timed
    return header, rows


def exchange_table(found: Profile) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of what each rank exchanges in a step; no rows of one rank alone.

    Where it was measured, a second row says so; bytes in full, for they are to be equal.
    """
    header = ["way", "", *_EXCHANGES.values(), "sent by a ring"]
    rows = []
    for row in found.rows if found.world_size > 1 else ():
        name = label_of(row.way)
        for kind, sent in (("pred.", row.exchange_predicted), ("meas.", row.exchange_measured)):
            if sent is not None:
                sizes = [*(getattr(sent, part) for part in _EXCHANGES)]
                sizes.append(sent.on_the_wire(found.world_size))
                rows.append([name, kind, *(f"{n:,}" if n else "-" for n in sizes)])
                name = ""
    return header, rows


def lines_above(found: Profile) -> list[str]:
    """Return what was run, on what, in which unit, measured how."""
    work = found.workload
    base = f", base {work.base}" if work.base else ""
    checkpointing = ", checkpointing" if work.checkpointing else ""
    ranks = ""
    if found.world_size > 1:
        ranks = f", each of {found.world_size} ranks, {found.sharding}"
    task = "" if work.task == "auto" else f", {work.task}"
    how = f"Measured: {found.how}" if found.how else "Nothing measured"
    timed = next((r.measurement.steps for r in found.rows if r.measurement), 0)
    steps = f"; time: median of {timed} steps" if timed else ""
    return [
        f"{Path(work.model).name}{task}: batch {work.batch} x {work.length} tokens, "
        f"{work.dtype}{base}, {work.optimizer}{checkpointing}; {found.device}{ranks}",
        f"Peak memory of a training step in {_unit(found)[0]}.",
        f"{how}{steps}.",
    ]


def notes_below(found: Profile) -> list[str]:
    """Return the legend, and the reasons by their number."""
    reasons = _reasons(found)
    # Each way's own: ranks share a dense model's gradients and no adapter's.
    names: dict[str, list[str]] = {}
    for row in found.rows:
        for text in row.assumed:
            if row.way.kind not in names.setdefault(text, []):
                names[text].append(row.way.kind)
    kinds = {row.way.kind for row in found.rows}
    assumed = [f"Assumed{_of(ways, kinds)}: {text}." for text, ways in names.items()]
    legend = [*_LEGEND, *(_OF_RANKS if found.world_size > 1 else ()), *assumed]
    if not any(row.measurement for row in found.rows) and len(set(reasons)) == 1:
        return [*legend, f"Not measured: {next(iter(reasons))}."]
    return [*legend, *(f"[{number}] {text}" for text, number in reasons.items())]


def fit_line(found: Fit) -> str:
    """Return ``largest density that fits in 24GiB: 0.043 (predicted peak 24.0 GiB)``."""
    start = f"largest density that fits in {found.text}: "
    if found.density is None:
        return (
            f"{start}none; with next to nothing trained (density {GRID[0]:g}) the model and its "
            f"activations take {human_bytes(found.peak)}, {human_bytes(found.peak - found.limit)} "
            "more than that"
        )
    return f"{start}{found.density:g} (predicted peak {human_bytes(found.peak)})"


def profile_json(found: Profile) -> dict[str, Any]:
    """Return everything as plain data, bytes in full, with what made it."""
    from sparseft.benchmarking.results import machine
    from sparseft.evaluation.provenance import provenance

    return {
        "provenance": provenance(hardware=machine()),
        "workload": asdict(found.workload),
        "device": found.device,
        "world_size": found.world_size,
        "sharding": found.sharding,
        "measured_how": found.how,
        "rows": [_row_json(row, found.world_size) for row in found.rows],
        "fits": [asdict(fit) for fit in found.fits],
    }


def _row_json(row: ProfileRow, ranks: int) -> dict[str, Any]:
    timed = row.measurement if row.measurement is not None and row.measurement.steps else None
    return {
        "way": asdict(row.way),
        "label": label_of(row.way),
        "trainable": row.trainable,
        "predicted": _use_json(row.predicted),
        "not_predicted": row.not_predicted,
        "assumed": list(row.assumed),
        "measured": _use_json(row.measured),
        "not_measured": row.not_measured,
        "error": row.error,
        "exchange_predicted": _exchange_json(row.exchange_predicted, ranks),
        "exchange_measured": _exchange_json(row.exchange_measured, ranks),
        "seconds": None if timed is None else dict(timed.seconds),
        "steps": None if timed is None else timed.steps,
        "tokens_per_second": None if timed is None else timed.tokens_per_second,
    }


def _use_json(use: MemoryUse | None) -> dict[str, int] | None:
    return None if use is None else {**use.parts(), "peak": use.peak}


def _exchange_json(sent: Communication | None, ranks: int) -> dict[str, int] | None:
    return None if sent is None or ranks == 1 else sent.to_json(ranks)


def _unit(found: Profile) -> tuple[str, int]:
    uses = [use for row in found.rows for use in (row.predicted, row.measured) if use is not None]
    large = max((use.peak for use in uses), default=0) >= _LARGE
    return ("GiB", 1 << 30) if large else ("MiB", 1 << 20)


def _bytes(use: MemoryUse | None, unit: int, missing: str) -> list[str]:
    if use is None:
        return [*[""] * len(PARTS), missing]
    digits = 2 if unit == 1 << 30 else 1
    return [f"{n / unit:.{digits}f}" for n in (*use.parts().values(), use.peak)]


def _reasons(found: Profile) -> dict[str, int]:
    """Return why something is missing, each reason once, and its number."""
    texts: Sequence[str] = [t for r in found.rows for t in (r.not_predicted, r.not_measured) if t]
    return {text: number for number, text in enumerate(dict.fromkeys(texts), start=1)}


def _note(reasons: dict[str, int], text: str) -> str:
    return f"[{reasons[text]}]" if text else ""


def _count(n: int | None) -> str:
    if n is None:
        return ""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return str(n)


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _of(ways: list[str], kinds: set[str]) -> str:
    return "" if set(ways) == kinds else f" ({', '.join(_NAMES.get(way, way) for way in ways)})"
