"""Paths of a command line that are checked before the library reads them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

__all__ = ["need_adapters"]


def need_adapters(paths: Iterable[str]) -> None:
    """Refuse an adapter that is not there, without guessing among a foreign folder's names.

    The library names the nearest files beside the path, which helps below the working folder; of
    ``/nope`` it would ask whether ``/opt`` was meant.

    Raises:
        FileNotFoundError: an absolute path outside the working folder that does not exist.
    """
    for path in map(Path, paths):
        outside = path.is_absolute() and not path.is_relative_to(Path.cwd())
        if outside and path.parent.is_dir() and not path.exists():
            raise FileNotFoundError(
                f"no adapter at {path}: the path does not exist. Wanted a .safetensors file or a "
                "folder with adapter.safetensors."
            )
