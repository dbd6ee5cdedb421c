"""Loading by name: from a folder, from the cache of downloads, or else from the hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparseft.errors import SparseFtError

__all__ = ["first_line", "load_from_anywhere"]


def load_from_anywhere(source: str, load: Callable[..., Any]) -> Any:
    """Return ``load(**where)`` of a folder, of the cache of downloads, or else of the hub.

    The hub is asked one question first: without an answer its client would try each file six times,
    half a minute in all, with two lines for each on standard error.

    Args:
        source: a folder or a name on the hub.
        load: a ``from_pretrained`` of ``source``; takes ``local_files_only``.

    Raises:
        ConnectionError: neither here nor in the cache, and the hub does not answer.
        OSError, ValueError: whatever ``load`` raises.
    """
    if Path(source).expanduser().is_dir():
        return load()
    try:
        return load(local_files_only=True)
    except SparseFtError:  # it is there, and wrong
        raise
    except (OSError, ValueError):  # not there, or not whole
        _require_hub(source)
    return load()


def _require_hub(source: str) -> None:
    """Check that the hub answers, whatever it says of ``source``."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(source, timeout=10)
    # Connection errors come from the HTTP library, which differs between versions of the client.
    except Exception as error:
        if getattr(error, "response", None) is not None or isinstance(error, ValueError):
            return  # an answer, or no name for the hub: the loader says more
        raise ConnectionError(
            "it is neither a folder here nor in the cache of downloads, and the hub does not "
            f"answer ({first_line(error)})"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without its full stop; its class if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
