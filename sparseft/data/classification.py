"""Labelled sentences or sentence pairs: from local tables, and as token ids for a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.utils.data

from sparseft._text import did_you_mean
from sparseft.data.tables import read_table
from sparseft.errors import DataError

__all__ = [
    "EncodedDataset",
    "Example",
    "encode",
    "label_index",
    "load_classification",
    "row_example",
]


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled text or pair of texts.

    Args:
        text: the sentence, or the first of a pair.
        label: index into the task's labels.
        pair: the second sentence, None for tasks on one.
        id: the data set's own name for the example, or its place (file line, row number).
    """

    text: str
    label: int
    pair: str | None = None
    id: str = ""


def label_index(
    value: Any, labels: Sequence[str], *, where: str, aliases: Mapping[str, str] | None = None
) -> int:
    """Return the index of a label, after ``aliases`` (spelling in the files -> label).

    Raises:
        DataError: a label outside the set; the message names ``where`` (file and row), the label
            and the set.
    """
    text = str(value).strip()
    text = (aliases or {}).get(text, text)
    try:
        return labels.index(text)
    except ValueError:
        raise DataError(
            f"{where}: label {text!r} is not one of {', '.join(map(repr, labels))}."
            f"{did_you_mean(text, labels)}"
        ) from None


def row_example(
    row: Mapping[str, Any],
    *,
    labels: Sequence[str],
    text_fields: Sequence[str],
    label_field: str,
    id_field: str | None,
    aliases: Mapping[str, str] | None,
    where: str,
    default_id: str,
) -> Example:
    """Return the example in one row of a table.

    Raises:
        DataError: a missing column, an empty text, a label outside the set; each names ``where``.
    """
    for name in (*text_fields, label_field):
        if row.get(name) is None:
            raise DataError(
                f"{where}: no value in column {name!r}; the columns are "
                f"{', '.join(map(repr, row))}."
                f"{did_you_mean(name, map(str, row))}"
            )
    texts = [str(row[name]).strip() for name in text_fields]
    for name, text in zip(text_fields, texts, strict=True):
        if not text:
            raise DataError(f"{where}: empty text in column {name!r}.")
    return Example(
        text=texts[0],
        pair=texts[1] if len(texts) > 1 else None,
        label=label_index(row[label_field], labels, where=where, aliases=aliases),
        id=str(row[id_field]) if id_field and row.get(id_field) is not None else default_id,
    )


def load_classification(
    path: str | Path,
    labels: Sequence[str],
    *,
    text_fields: Sequence[str] = ("text",),
    label_field: str = "label",
    id_field: str | None = "id",
    columns: Sequence[str] | None = None,
    where: Mapping[str, str] | None = None,
    aliases: Mapping[str, str] | None = None,
    skip: Callable[[Mapping[str, Any]], bool] | None = None,
    format: str | None = None,
) -> list[Example]:
    """Return the labelled examples of a CSV, TSV or JSONL file, in file order.

    Args:
        path: the file.
        labels: the task's labels; an example's label is its index here.
        text_fields: one or two columns that hold the text.
        label_field: the column of the label.
        id_field: the column of the example's name; where there is none, the line number is taken.
        columns: the names of the columns, in order, of a file without a header line.
        where: keep only rows with these values, e.g. ``{"language": "sw"}``.
        aliases: other spellings of labels in the file -> label.
        skip: leaves out the rows it returns True for, e.g. known placeholders of a release.
        format: ``"csv"``, ``"tsv"`` or ``"jsonl"``; None tells it from the ending.

    Raises:
        DataError: unreadable file, missing column, label outside the set (file, line, label and set
            are named), no rows, no rows that match ``where`` (the values that exist are named).
    """
    if len(text_fields) not in (1, 2):
        raise DataError(f"one or two text columns are supported, got {list(text_fields)}.")
    examples: list[Example] = []
    seen: dict[str, dict[str, None]] = {name: {} for name in where or {}}
    rows = 0
    for line, row in read_table(path, columns=columns, format=format):
        rows += 1
        keep = True
        for name, wanted in (where or {}).items():
            if name not in row:
                raise DataError(
                    f"{path}, line {line}: no column {name!r}; the columns are "
                    f"{', '.join(map(repr, row))}."
                )
            seen[name][str(row[name])] = None
            keep = keep and str(row[name]) == wanted
        if keep and not (skip is not None and skip(row)):
            examples.append(
                row_example(
                    row,
                    labels=labels,
                    text_fields=text_fields,
                    label_field=label_field,
                    id_field=id_field,
                    aliases=aliases,
                    where=f"{path}, line {line}",
                    default_id=str(line),
                )
            )
    if not rows:
        raise DataError(f"{path}: the file has no rows; labelled examples were expected.")
    if not examples:
        found = "; ".join(f"{n}: {', '.join(sorted(v))}" for n, v in seen.items())
        raise DataError(
            f"{path}: none of {rows} rows is left"
            + (f" with {dict(where)}; the file has {found}." if where else ".")
        )
    return examples


class EncodedDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Token ids and labels, one dict a row: what a Trainer or DataLoader takes.

    Args:
        columns: model input name -> one list of ints per example.
        labels: one label index per example.
    """

    def __init__(self, columns: Mapping[str, Sequence[list[int]]], labels: Sequence[int]) -> None:
        self.columns = dict(columns)
        self.labels = list(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {name: values[index] for name, values in self.columns.items()}
        row["labels"] = self.labels[index]
        return row

    def lengths(self) -> list[int]:
        """Return the number of tokens of each example."""
        return [len(ids) for ids in self.columns["input_ids"]]


def encode(tokenizer: Any, examples: Iterable[Example], max_length: int = 128) -> EncodedDataset:
    """Return token ids of the examples, cut to ``max_length``, unpadded.

    Args:
        tokenizer: a Hugging Face tokenizer.
        examples: one text or pair each, all of one kind; the longer of a pair is cut first.
        max_length: tokens of an example, special tokens included.

    Raises:
        DataError: no examples; a length beyond the tokenizer's limit.
    """
    examples = list(examples)
    if not examples:
        raise DataError("no examples to encode: the data set is empty.")
    limit = getattr(tokenizer, "model_max_length", None)
    if max_length < 1 or (limit is not None and max_length > limit):
        raise DataError(f"max_length={max_length} is outside 1 ... {limit}, what the model takes.")
    pairs = [e.pair for e in examples]
    if any((p is None) != (pairs[0] is None) for p in pairs):
        raise DataError("single texts and pairs cannot be mixed in one data set.")
    columns = tokenizer(
        [e.text for e in examples],
        None if pairs[0] is None else pairs,
        truncation=True,
        max_length=max_length,
    )
    return EncodedDataset({k: list(v) for k, v in columns.items()}, [e.label for e in examples])
