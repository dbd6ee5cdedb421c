"""Open files of ``torch.save`` without running anything that is in them.

Checkpoints and foreign adapters come through here alike.

``torch.load(weights_only=True)`` calls nothing but torch's own list of rebuilding functions.
composable-sft's files hold one numpy integer more per tensor; what they ask of numpy is answered by
the stand-ins below, under the names of numpy 1 and 2, so no code of numpy runs on a file's bytes.
Sizes are checked against the file's: views can claim more elements than are stored.
"""

from __future__ import annotations

import errno
import re
import threading
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseft.errors import AdapterFormatError, SparseFtError

__all__ = ["check_tensors", "is_archive", "is_pickle", "load_pickle"]

# Tensors may share storage (tied parameters); a file that unfolds to more than this is a bomb.
_MOST_UNFOLDED = 8
_LOCK = threading.Lock()
_PIECE = 1 << 20  # bytes
_STORAGE = re.compile(r"[^/]*/data/")  # where torch.save puts the contents of tensors
_FRAME = "Unsupported operand 149"  # the opcode that every pickle of protocol 4 begins with
_ZIP = b"PK\x03\x04"


class _Dtype:
    """What ``numpy.dtype`` is rebuilt as: the kind, the size and the byte order of an integer."""

    def __init__(self, name: object, *_: object) -> None:
        if not (isinstance(name, str) and name[-2:] in ("i1", "i2", "i4", "i8", "u1", "u2", "u4")):
            raise ValueError(f"a numpy value of dtype {str(name)[:20]!r}, wanted an integer")
        self.signed = name[-2] == "i"
        self.size = int(name[-1])
        self.order = "<"

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = state[1]


def _scalar(dtype: object, raw: object) -> int:
    """Rebuild a numpy integer as a Python one."""
    if isinstance(raw, str):
        raw = raw.encode("latin1")
    if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes) or len(raw) != dtype.size:
        raise ValueError("a numpy scalar that is no integer")
    return int.from_bytes(raw, "big" if dtype.order == ">" else "little", signed=dtype.signed)


# The whole list of what is allowed beyond torch's own.
_ALLOWED: list[Any] = [
    (_scalar, "numpy.core.multiarray.scalar"),  # numpy 1
    (_scalar, "numpy._core.multiarray.scalar"),  # numpy 2
    (_Dtype, "numpy.dtype"),
]


def is_pickle(file: Path) -> bool:
    """Whether a file starts as those of ``torch.save`` do (a zip archive, or a bare pickle)."""
    with file.open("rb") as start:
        magic = start.read(4)
    return magic == _ZIP or (len(magic) > 1 and magic[0] == 0x80 and magic[1] in range(6))


def is_archive(file: Path) -> bool:
    """Whether torch takes a file for a zip archive: torch 1.6 and later write those."""
    with file.open("rb") as start:
        return start.read(4) == _ZIP


def _read_through(archive: zipfile.ZipFile, members: Iterable[zipfile.ZipInfo]) -> None:
    """Read members to their ends, where their checksums are compared."""
    for member in members:
        with archive.open(member) as stream:
            while stream.read(_PIECE):
                pass


def _check_archive(file: Path, error: type[SparseFtError], *, contents: bool) -> None:
    """Check a zip archive: whole, not compressed, and each member as its checksum says.

    The checksums of tensors are compared only for ``contents``. Files that torch wrote without any
    (``torch.serialization.set_crc32_options(False)``: all are 0) are taken as they are.
    """
    size = file.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            unpacked = sum(member.file_size for member in members)
            if unpacked > size:
                raise error(
                    f"{file}: {size:,} bytes unpack to {unpacked:,}, but torch.save does not "
                    "compress; refused as a possible bomb."
                )
            if any(member.CRC for member in members):
                few = (m for m in members if contents or not _STORAGE.match(m.filename))
                _read_through(archive, few)
    except (MemoryError, SparseFtError):
        raise
    except Exception as bad:  # hostile bytes raise anything
        if _of_the_disk(bad):
            raise
        raise error(
            f"{file}: the archive is cut off or damaged ({str(bad)[:200].rstrip('.')}). Copy or "
            "download it again."
        ) from None


def _of_the_disk(bad: Exception) -> bool:
    """Whether reading failed, and not what was read: seeking by a damaged number is EINVAL."""
    return isinstance(bad, OSError) and bad.errno not in (None, errno.EINVAL)


def load_pickle(
    file: Path, *, error: type[SparseFtError] = AdapterFormatError, mapped: bool = False
) -> Any:
    """Return what a file of ``torch.save`` holds, its tensors on the CPU.

    Args:
        file: the file.
        error: class of what is raised.
        mapped: map the tensors, and do not read them now to compare their checksums; only for an
            archive (`is_archive`).

    Raises:
        AdapterFormatError: or ``error``: cut off, damaged, compressed, or it asks for code outside
            the list.
        OSError: the disk failed.
    """
    if is_archive(file):
        _check_archive(file, error, contents=not mapped)
    try:
        # One at a time: torch keeps the list of what is allowed for the whole process.
        with (
            _LOCK,
            torch.serialization.safe_globals(_ALLOWED),
            warnings.catch_warnings(),
        ):
            # Refused below if it cannot be read; the advice in it would point into torch.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as bad:  # hostile bytes raise anything
        if _of_the_disk(bad):
            raise
        lines = [line.strip() for line in str(bad).splitlines() if line.strip()]
        reason = next((line for line in lines if "Unsupported" in line), lines[0] if lines else "")
        if reason == _FRAME:
            raise error(
                f"{file}: saved with pickle_protocol=4 or later, of which torch reads none without "
                "running code. Save it again without that option."
            ) from None
        raise error(
            f"{file}: not opened, as it is damaged, cut off, or would run code "
            f"({type(bad).__name__}: {reason[:200]}). Only plain tensors, numbers, lists and dicts "
            "are read from pickles; ask for a safetensors file."
        ) from None


def check_tensors(
    file: Path, tensors: Mapping[str, Tensor], *, error: type[SparseFtError] = AdapterFormatError
) -> None:
    """Check that each tensor is plain, and that all of them are not more than the file can hold.

    Raises:
        AdapterFormatError: or ``error``: something else than a dense CPU tensor; more elements than
            are stored.
    """
    total = 0
    for name, tensor in tensors.items():
        what = f"{file}: tensor {name[:200]!r}"
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not plain or tensor.is_quantized or tensor.device.type != "cpu":
            kind = str(tensor.layout) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise error(f"{what} is {kind}, wanted an ordinary dense tensor.")
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes > tensor.untyped_storage().nbytes():
            raise error(
                f"{what} claims {tensor.numel():,} elements but only "
                f"{tensor.untyped_storage().nbytes():,} bytes are stored."
            )
        total += nbytes
    if total > _MOST_UNFOLDED * file.stat().st_size:
        raise error(
            f"{file}: {file.stat().st_size:,} bytes unfold to {total:,}; refused as a possible "
            "bomb."
        )
