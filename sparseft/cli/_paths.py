"""Paths of a command line that are checked before the library reads them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["need_adapters", "not_an_input"]


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


def not_an_input(target: Path, sources: Iterable[str]) -> None:
    """Refuse an output file that is one of the inputs, or lies among the files of one.

    Args:
        target: the file to be written.
        sources: what is read: files, or folders (an adapter's, a model's).

    Raises:
        CompositionError: writing would replace what is read.
    """
    from sparseft.errors import CompositionError

    if not target.exists():
        return
    place = Path(os.path.realpath(target))
    for source in sources:
        read = Path(os.path.realpath(Path(source).expanduser()))
        if read == place or read == place.parent:
            raise CompositionError(
                f"{target} would be replaced, but {source}, which is read, is or holds that file; "
                "give another --out."
            )
