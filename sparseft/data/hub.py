"""Labelled examples through the ``datasets`` library: a hub name, or a folder it can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparseft.data.classification import Example, row_example
from sparseft.errors import DataError

__all__ = ["HubSource", "load_hub_examples"]


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """Where a task lies on the hub and what its columns are called there.

    Args:
        path: name of the data set.
        text_fields: one or two text columns.
        label_field: the column of the label, an integer class, an integer or a string.
        label_names: names of integer labels, in the order of the hub's integers, where the data set
            does not carry them itself.
        splits: our split -> theirs.
        configs: our language code -> their configuration, where they differ.
        aliases: their spelling of a label -> ours.
        revision: branch or commit.
    """

    path: str
    text_fields: tuple[str, ...] = ("text",)
    label_field: str = "label"
    label_names: tuple[str, ...] | None = None
    splits: Mapping[str, str] = field(
        default_factory=lambda: {"train": "train", "valid": "validation", "test": "test"}
    )
    configs: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None


def load_hub_examples(
    source: HubSource,
    labels: Sequence[str],
    *,
    path: str | None = None,
    language: str | None = None,
    split: str = "test",
) -> list[Example]:
    """Return the examples of one language and split through ``datasets.load_dataset``.

    Args:
        source: columns and names.
        labels: the task's labels, in the task's order; the data set's own order is translated by
            name.
        path: another name, or a local folder that ``datasets`` can read, in place of
            ``source.path``.
        language: code of the language; None where the data set has a single configuration.
        split: ``train``, ``valid`` or ``test``.

    Raises:
        DataError: it cannot be fetched (says how to give local files), has no such split, no rows,
            or other labels.
    """
    import datasets

    name = path or source.path
    config = source.configs.get(language, language) if language else None
    theirs = source.splits.get(split, split)
    what = f"data set {name!r}" + (f" ({config})" if config else "") + f", split {theirs!r}"
    try:
        # datasets offers no typed way to say "unknown configuration or split": both are ValueErrors
        table = datasets.load_dataset(name, config, split=theirs, revision=source.revision)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{what} cannot be loaded: {reason}. Without a network, download the files elsewhere "
            "and give their "
            "folder as the data root (--data FOLDER)."
        ) from error
    names = getattr(table.features.get(source.label_field), "names", None) or source.label_names
    examples = []
    for i, row in enumerate(table):
        label: Any = row.get(source.label_field)
        if isinstance(label, int) and names is not None and 0 <= label < len(names):
            row = {**row, source.label_field: names[label]}
        examples.append(
            row_example(
                row,
                labels=labels,
                text_fields=source.text_fields,
                label_field=source.label_field,
                id_field="id",
                aliases=source.aliases,
                where=f"{what}, row {i}",
                default_id=str(i),
            )
        )
    if not examples:
        raise DataError(f"{what} has no rows.")
    return examples
