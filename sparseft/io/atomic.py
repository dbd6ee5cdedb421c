"""Write a file whole or not at all: temporary file in the same folder, fsync, rename.

Used for everything the project writes. A failure at any moment (disk full, exception, kill, power
cut) leaves the old file as it was; a kill can leave a hidden ``.NAME.*.tmp``, which nothing reads.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["atomic_write", "atomic_write_json", "atomic_write_text"]

# Errors that only writing has: in a block that also reads, they are the written file's.
_OF_WRITING = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS}
_BUFFER = 1 << 18  # bytes


class _Raw(io.FileIO):
    """A file that remembers why it could not be written: torch.save turns that into an error about
    its own source code.
    """

    failed: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failed = error
            raise


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut, where the system lets folders be synced."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError:  # some network file systems refuse; the rename itself has succeeded
        pass
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that takes the place of ``path`` when the block ends without an error.

    The file is readable and seekable, so ``torch.save(state, file)`` works. Missing folders are
    made; a symbolic link is followed and stays; an existing file keeps its permission bits.

    Args:
        path: the file to write.
        overwrite: whether an existing file may be replaced.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is False.
        OSError: writing failed (disk full, no permission); says ``path``, which is as it was, and
            folders that were made for it are gone.

    Example:
        >>> with atomic_write("state.bin") as file:
        ...     _ = file.write(b"all of it, or nothing")
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already; pass overwrite=True or another path.")
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder, wanted a file name inside it.")
    # Cut, so that a long name does not pass the usual 255-byte limit with the suffix added.
    stem = os.fsencode(target.name)[:200].decode(errors="ignore")
    temporary = target.with_name(f".{stem}.{secrets.token_hex(6)}.tmp")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    made: list[Path] = []
    raw, inside = None, False
    try:
        _make_folder(target.parent, made)
        # os.open applies the umask, which tempfile.mkstemp (always 0600) would not.
        raw = _Raw(os.open(temporary, flags, 0o666), "r+b")
        with io.BufferedRandom(raw, _BUFFER) as file:
            inside = True
            yield file
            inside = False
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            os.chmod(temporary, target.stat().st_mode & 0o7777)
        os.replace(temporary, target)
    except BaseException as error:  # KeyboardInterrupt too: leave no debris, then go on raising
        with contextlib.suppress(OSError):
            temporary.unlink()
        with contextlib.suppress(OSError):  # somebody else's file is in it
            for folder in reversed(made):
                folder.rmdir()
        failed = raw.failed if raw is not None else None
        if isinstance(error, Exception) and failed is not None and not isinstance(error, OSError):
            raise _named(failed, path, temporary) from error
        if isinstance(error, OSError) and (
            not inside or error is failed or error.errno in _OF_WRITING
        ):
            _named(error, path, temporary)
        raise
    _sync_folder(target.parent)


def _make_folder(folder: Path, made: list[Path]) -> None:
    """Make a folder and those above it; ``made`` gets the ones that were not there, outermost
    first.
    """
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        with contextlib.suppress(FileExistsError):  # by another process, meanwhile
            each.mkdir()
            made.append(each)


def _named(error: OSError, path: str | os.PathLike[str], temporary: Path) -> OSError:
    """Give an error of the system the name of the file, where it has none or the temporary one."""
    own = error.filename is None or os.fspath(error.filename) == os.fspath(temporary)
    if error.errno is not None and own:
        error.filename, error.filename2 = os.fspath(path), None
    return error


def atomic_write_text(path: str | os.PathLike[str], text: str, *, overwrite: bool = True) -> None:
    """Write ``text`` as UTF-8 with ``\\n`` line ends, whole or not at all."""
    with atomic_write(path, overwrite=overwrite) as file:
        file.write(text.encode("utf-8"))


def atomic_write_json(
    path: str | os.PathLike[str], data: Any, *, indent: int | None = 2, overwrite: bool = True
) -> None:
    """Write ``data`` as JSON with sorted keys, whole or not at all; NaN and infinity are errors.

    Raises:
        ValueError: a NaN or infinite number, which JSON cannot hold.
        TypeError: something JSON has no form for.
    """
    text = json.dumps(data, indent=indent, sort_keys=True, ensure_ascii=False, allow_nan=False)
    atomic_write_text(path, text + "\n", overwrite=overwrite)
