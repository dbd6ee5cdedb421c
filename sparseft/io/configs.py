"""JSON files that say what lies beside them: configurations of models and adapters, indexes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparseft.errors import AdapterFormatError, CompositionError, SparseFtError

__all__ = ["read_config", "read_json_object"]

# Bytes; the largest honest configurations (module names by the thousand) are below a million.
_MOST = 10_000_000


def read_json_object(
    file: Path, error: type[SparseFtError] = AdapterFormatError, most: int = _MOST
) -> dict[str, Any]:
    """Return the object in a JSON file that anybody may have written.

    Args:
        file: the file.
        error: class of what is raised.
        most: bytes that are read.

    Raises:
        AdapterFormatError: or ``error``: larger than ``most``, no JSON, or no object.
        OSError: it is not there, or cannot be read.
    """
    size = file.stat().st_size
    if size > most:
        raise error(f"{file} has {size:,} bytes; refused.")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as bad:
        raise error(f"{file} is no JSON ({str(bad)[:100]}).") from None
    if not isinstance(content, dict):
        raise error(f"{file} holds {type(content).__name__}, wanted an object.")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a model's ``config.json``.

    Raises:
        CompositionError: there is none, or it is no JSON object.
    """
    file = folder / "config.json"
    try:
        return read_json_object(file, CompositionError)
    except FileNotFoundError:
        raise CompositionError(
            f"{folder} has no config.json, so it is no model. Give a folder written by "
            "save_pretrained."
        ) from None
    except OSError as bad:
        raise CompositionError(f"{file} cannot be read: {bad.strerror or bad}.") from None
