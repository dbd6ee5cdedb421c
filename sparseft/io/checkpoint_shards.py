"""One file of a model checkpoint: what it holds, and its tensors, one at a time.

Files are read by position, not mapped: the pages of a mapped file count as memory of the process
until the system takes them back, so a walk over a mapped checkpoint looks like loading all of it.
Everything in a header is checked before a byte is read; pickles are opened under ``weights_only``.
"""

from __future__ import annotations

import json
import logging
import math
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from sparseft._integrity import raw_pieces
from sparseft.errors import CompositionError
from sparseft.io.pickles import check_tensors, is_archive, load_pickle

__all__ = ["TORCH_DTYPES", "Shard", "TensorInfo", "dtype_name", "open_shard"]

logger = logging.getLogger(__name__)

MAX_HEADER = 100_000_000  # bytes; the safetensors package's own limit
REMAP = 1 << 26  # bytes of a mapped pickle that may be resident before it is mapped anew
PIECE = 1 << 20  # bytes copied at a time: from 1 to 16 MiB the speed is the disk's

# safetensors' names of the dtypes torch has. Others (sub-byte floats) are copied, never read.
TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return safetensors' name of a dtype.

    Raises:
        CompositionError: it has none.
    """
    if dtype not in _NAMES:
        raise CompositionError(f"safetensors has no {dtype}; cast the tensor first.")
    return _NAMES[dtype]


class TensorInfo(NamedTuple):
    """What a file says of one tensor.

    Args:
        name: its name in the file.
        dtype: safetensors' name of the dtype, e.g. ``"BF16"``.
        shape: its shape.
        nbytes: bytes of its contents.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorInfo:
        """Describe a tensor."""
        nbytes = tensor.numel() * tensor.element_size()
        return cls(name, dtype_name(tensor.dtype), tuple(tensor.shape), nbytes)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype, None if torch has none."""
        return TORCH_DTYPES.get(self.dtype)

    @property
    def is_floating(self) -> bool:
        """Whether the entries are numbers that a diff can change: fp64, fp32, fp16 or bf16."""
        return self.dtype in ("F64", "F32", "F16", "BF16")


class Shard(ABC):
    """One file of a checkpoint.

    ``tensors`` has what it holds, in the order of its contents; ``metadata`` the strings of its
    header.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return one tensor in memory of its own, contiguous, free to be changed."""

    @abstractmethod
    def pieces(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of one tensor, a few megabytes at a time."""


class _SafetensorsShard(Shard):
    def __init__(self, file: Path) -> None:
        super().__init__(file)
        with file.open("rb") as stream:
            stat = os.fstat(stream.fileno())
            self._seen = _identity(stat)
            header, self._start = _read_header(stream, stat.st_size, file)
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict):
            raise CompositionError(f"{file}: __metadata__ is no object; the file is damaged.")
        self.metadata = {str(k): str(v) for k, v in metadata.items()}
        self._begin: dict[str, int] = {}
        room = stat.st_size - self._start
        entries = [(*_entry(file, name, value, room), name) for name, value in header.items()]
        for begin, info, name in sorted(entries, key=lambda e: (e[0], e[0] + e[1].nbytes)):
            self.tensors[name], self._begin[name] = info, begin

    def _open(self, name: str) -> BinaryIO:
        stream = self.file.open("rb")
        if _identity(os.fstat(stream.fileno())) != self._seen:
            stream.close()
            raise CompositionError(f"{self.file} was changed by somebody while it was being read.")
        stream.seek(self._start + self._begin[name])
        return stream

    def read(self, name: str) -> Tensor:
        info = self.tensors[name]
        dtype = info.torch_dtype
        if dtype is None:
            raise CompositionError(f"{self.file}: {name!r} is {info.dtype}, which torch lacks.")
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        with self._open(name) as stream:
            _fill(stream, raw.numpy().data, self.file, name)
        return raw.view(dtype).view(info.shape)

    def pieces(self, name: str) -> Iterator[memoryview]:
        left = self.tensors[name].nbytes
        buffer = memoryview(bytearray(min(left, PIECE)))
        with self._open(name) as stream:
            while left:
                piece = buffer[: min(left, PIECE)]
                _fill(stream, piece, self.file, name)
                yield piece
                left -= len(piece)


class _PickleShard(Shard):
    """``pytorch_model.bin``: mapped, so only what is used is read."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self._open: Mapping[str, Tensor] | None
        self._open, self._mapped = _load_pickle(file)
        self._used = 0
        for name, tensor in self._open.items():
            self.tensors[name] = TensorInfo.of(name, tensor)

    def _tensor(self, name: str) -> Tensor:
        """Return a tensor of the mapping. Pages once used stay with a mapping, so after a while a
        new one takes its place.
        """
        if self._used > REMAP and self._mapped:
            self._open, self._used = None, 0
        if self._open is None:
            self._open, self._mapped = _load_pickle(self.file)
            if {n: TensorInfo.of(n, t) for n, t in self._open.items()} != self.tensors:
                raise CompositionError(f"{self.file} was changed by somebody meanwhile.")
        self._used += self.tensors[name].nbytes
        return self._open[name]

    def read(self, name: str) -> Tensor:
        tensor = self._tensor(name)
        return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)

    def pieces(self, name: str) -> Iterator[memoryview]:
        yield from raw_pieces(self._tensor(name))


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _fill(stream: BinaryIO, buffer: memoryview, file: Path, name: str) -> None:
    """Fill the buffer from where the stream is."""
    done = 0
    while done < len(buffer):
        got = stream.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not got:
            raise CompositionError(f"{file} ends inside {name!r}; copy or download it again.")
        done += got


def _read_header(stream: BinaryIO, size: int, file: Path) -> tuple[dict[str, Any], int]:
    """Return the JSON header and where the contents begin."""
    start = stream.read(8)
    if start.startswith(b"version "):
        raise CompositionError(
            f"{file} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`."
        )
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
    if not 0 <= length <= min(size - 8, MAX_HEADER):
        raise CompositionError(
            f"{file} is no safetensors file, or cut off: its header would have {length} bytes and "
            f"the file has {size}. Copy or download it again."
        )
    try:
        header = json.loads(stream.read(length).decode("utf-8"))
    except (ValueError, RecursionError) as bad:
        raise CompositionError(f"{file}: the header is not JSON ({bad}); it is damaged.") from None
    if not isinstance(header, dict):
        raise CompositionError(f"{file}: the header is no JSON object; it is damaged.")
    return header, 8 + length


def _entry(file: Path, name: str, value: Any, room: int) -> tuple[int, TensorInfo]:
    """Check one tensor's entry in a header; return where it begins, and what it is."""
    try:
        dtype, shape = value["dtype"], tuple(value["shape"])
        begin, end = value["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole or not isinstance(dtype, str) or not begin <= end <= room:
        raise CompositionError(
            f"{file}: the entry of {name!r} lies outside the file, or is damaged. Copy or "
            "download it again."
        )
    info = TensorInfo(name, dtype, shape, end - begin)
    known = info.torch_dtype
    if known is not None and info.numel * known.itemsize != info.nbytes:
        raise CompositionError(
            f"{file}: {name!r} is {dtype} of shape {list(shape)} but has {info.nbytes} bytes; the "
            "file is damaged."
        )
    return begin, info


def _load_pickle(file: Path) -> tuple[dict[str, Tensor], bool]:
    """Open a file of ``torch.save``: tensors by name, nothing else is ever built; and whether they
    are mapped.
    """
    mapped = is_archive(file)
    found = load_pickle(file, error=CompositionError, mapped=mapped)
    if not mapped:
        logger.warning(
            "%s was written before torch 1.6 and cannot be mapped: all of it is read at once", file
        )
    tensors = dict(found) if isinstance(found, Mapping) else {}
    odd = [n for n, t in tensors.items() if not (isinstance(n, str) and isinstance(t, Tensor))]
    if odd or not tensors:
        kind = type(tensors[odd[0]]).__name__ if odd else ""
        what = f"{str(odd[0])[:200]!r} in it is {kind}" if odd else "no tensor is in it"
        raise CompositionError(
            f"{file} is not a state dict ({what}); wanted name -> tensor, as save_pretrained "
            "writes it. A training checkpoint has one inside."
        )
    check_tensors(file, tensors, error=CompositionError)
    return tensors, mapped


def open_shard(file: Path) -> Shard:
    """Open a file: safetensors by that suffix, else one of ``torch.save``.

    Raises:
        CompositionError: damaged, or not what its name says.
    """
    return _SafetensorsShard(file) if file.suffix == ".safetensors" else _PickleShard(file)
