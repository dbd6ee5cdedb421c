"""Results as JSON lines: one per contender of a case, each complete by itself.

A line holds what was measured, the ceilings of its run and what made it: commit, hardware,
versions, threads, seed, the time. Lines of many runs can be put into one file.
"""

from __future__ import annotations

import datetime
import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseft.benchmarking.ceilings import Ceilings
from sparseft.benchmarking.results import machine
from sparseft.errors import DataError, OptionError
from sparseft.evaluation.provenance import provenance

__all__ = ["append_records", "dump_lines", "made_by", "make_records", "read_records"]

SEED = 0  # every case draws from it

# What a line has at least.
_NEEDED = {"case": str, "status": str, "provenance": dict}
_CASE = ("op", "shape", "dtype", "baseline")
_SPREAD = ("median", "quartile1", "quartile3", "min")


def made_by(device: str) -> dict[str, Any]:
    """Return what the lines of a run share: commit, hardware, versions, threads, seed, time."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return provenance(
        hardware=machine(), device=device, seed=SEED, measured_at=now.isoformat(timespec="seconds")
    )


def make_records(
    results: Iterable[Mapping[str, Any]], made: Mapping[str, Any], ceilings: Ceilings | None = None
) -> list[dict[str, Any]]:
    """Return a record per contender of what `run_suite` returned.

    Args:
        results: cases; one without contenders (skipped, not run, error) is a record by itself.
        made: of `made_by`.
        ceilings: of the run.
    """
    records = []
    for result in results:
        shared = {
            "case": result["name"],
            **{key: result.get(key) for key in _CASE},
            "case_facts": result.get("facts", {}),
            "ceilings": None if ceilings is None else ceilings.to_json(),
            "provenance": dict(made),
        }
        for row in result.get("contenders") or [{**result, "name": None}]:
            records.append(_record(row) | shared)
    return records


def _record(row: Mapping[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "contender": row["name"],
        "status": row["status"],
        "reason": row.get("reason", ""),
        "ours": row.get("ours", False),
        "work": row.get("work", ""),
        **{key: row.get(key) for key in ("against", "density", "bytes", "flops")},
        "checks": row.get("checks", []),
        "facts": row.get("facts", {}) if row["name"] is not None else {},
        **dict.fromkeys(("clock", "samples", "ratio", *_SPREAD)),
        **row.get("speed", {}),
    }
    clocks = row.get("clocks", {})
    for name, clock in list(clocks.items())[:1]:  # the first is the one of ratios
        record |= {"clock": name, "samples": clock["samples"], "ratio": clock.get("ratio")}
        record |= {key: clock["seconds"][key] for key in _SPREAD}
        record["host_median"] = clock["host_seconds"]["median"]
    return record


def dump_lines(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the records as lines of strict JSON (no NaN)."""
    return "".join(json.dumps(_finite(r), allow_nan=False) + "\n" for r in records)


def append_records(path: str | Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add lines to a file, in one write: several writers' lines do not mix.

    Raises:
        OptionError: its last line is cut off (a run was killed while it wrote).
        OSError: it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = dump_lines(records).encode()
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        found = os.fstat(handle)
        size = found.st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            raise OptionError(
                f"{path}: the last line is cut off; remove it, or write to another file."
            )
        if data:
            written = os.write(handle, data)
            if written < len(data):  # a full disk: leave no half line
                os.ftruncate(handle, os.fstat(handle).st_size - written)
                raise OSError(28, os.strerror(28), str(path))
        if stat.S_ISREG(found.st_mode):  # /dev/null and pipes have nothing to sync
            os.fsync(handle)
    finally:
        os.close(handle)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a file.

    Raises:
        DataError: a line that is no record; says its number and what is wrong.
        OSError: no such file.
    """
    records = []
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: no JSON ({error}).") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: {type(record).__name__}, wanted an object.")
        for key, kind in _NEEDED.items():
            if not isinstance(record.get(key), kind):
                got = f"is {record[key]!r:.40}" if key in record else "is missing"
                raise DataError(
                    f"{path}, line {number}: {key!r} {got}, wanted {kind.__name__}; every line of "
                    "`sparseft bench --json` has it."
                )
        records.append(record)
    return records


def _finite(value: Any) -> Any:
    """Return it with texts for NaN and infinities, which JSON does not have: a red check's."""
    if isinstance(value, float) and value - value != 0:
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
