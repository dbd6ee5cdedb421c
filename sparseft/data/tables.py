"""Rows out of CSV, TSV and JSONL files, with the line of each row so that an error can point at it.

TSV here is what the original releases of the tasks ship: fields split at tabs, no quoting, so a
lone ``"`` in a sentence is just a character. CSV follows RFC 4180 (quoted fields may hold commas
and line breaks).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from sparseft._text import did_you_mean
from sparseft.errors import DataError

__all__ = ["FORMATS", "read_table", "table_format"]

FORMATS = {".csv": "csv", ".tsv": "tsv", ".txt": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl"}


def table_format(path: Path) -> str:
    """Return ``"csv"``, ``"tsv"`` or ``"jsonl"`` by the file's ending."""
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise DataError(
            f"{path}: cannot tell the format from the ending {path.suffix!r}. Name the file "
            f"{', '.join(sorted(FORMATS))}, or pass format='csv', 'tsv' or 'jsonl'."
        ) from None


def read_table(
    path: str | Path, *, columns: Sequence[str] | None = None, format: str | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield ``(line number, {column: value})`` for each row, reading as it goes.

    Args:
        path: the file, UTF-8 with or without a byte order mark.
        columns: names of the columns, in order, of a file without a header line; None reads them
            from the header (CSV, TSV) or from the keys (JSONL).
        format: ``"csv"``, ``"tsv"`` or ``"jsonl"``; None tells it from the file's ending.

    Raises:
        DataError: missing file, bytes that are not UTF-8, a row with another number of fields, bad
            JSON.
    """
    path = Path(path)
    kind = format or table_format(path)
    readers = {"csv": _csv_rows, "tsv": _tsv_rows, "jsonl": _json_rows}
    if kind not in readers:
        raise DataError(
            f"format {kind!r} is not one of {sorted(readers)}.{did_you_mean(kind, readers)}"
        )
    try:
        # Only CSV may break a line inside a (quoted) field; elsewhere a row ends at \n alone, so
        # that a lone \r in a sentence does not split it.
        newline = "" if kind == "csv" else "\n"
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield from readers[kind](path, file, columns)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except (IsADirectoryError, PermissionError) as error:
        raise DataError(f"{path}: cannot be read as a file ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 (byte 0x{error.object[error.start]:02x}: {error.reason}). "
            "Convert it, e.g. with iconv -t utf-8."
        ) from None


def _named(
    path: Path, line: int, header: Sequence[str] | None, fields: list[str]
) -> dict[str, Any]:
    if header is None:
        raise DataError(f"{path}: no header line.")
    if len(fields) != len(header):
        raise DataError(
            f"{path}, line {line}: {len(fields)} fields where {len(header)} were expected "
            f"({', '.join(header)})."
        )
    return dict(zip(header, fields, strict=True))


def _csv_rows(
    path: Path, file: TextIO, columns: Sequence[str] | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(file, strict=True)
    header = list(columns) if columns is not None else None
    start = 1
    try:
        for fields in reader:
            if not fields:
                pass
            elif header is None:
                header = fields
            else:
                yield start, _named(path, start, header, fields)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not readable as CSV ({error}).") from None


def _tsv_rows(
    path: Path, file: TextIO, columns: Sequence[str] | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    header = list(columns) if columns is not None else None
    for line, text in _lines(file):
        if not text.strip():
            continue
        fields = text.split("\t")
        if header is None:
            header = fields
        else:
            yield line, _named(path, line, header, fields)


def _json_rows(
    path: Path, file: TextIO, columns: Sequence[str] | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in _lines(file):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {line}: not JSON ({error}).") from None
        if isinstance(row, list) and columns is not None:
            row = _named(path, line, columns, row)
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, line {line}: a JSON object was expected, got {type(row).__name__}."
            )
        yield line, row


def _lines(file: TextIO) -> Iterator[tuple[int, str]]:
    for line, text in enumerate(file, start=1):
        yield line, text.rstrip("\r\n")
