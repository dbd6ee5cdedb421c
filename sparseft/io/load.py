"""Open adapter files: memory-mapped, one tensor at a time, checked before anyone sees it.

The file is opened once and everything is read through that one mapping, so replacing the file (as
`Adapter.save` does, by renaming) changes nothing for an adapter already loaded. The mapping is
private: writing into a loaded tensor never reaches the file. As with every memory map, another
program that truncates or rewrites the file in place, without renaming, pulls it from under us.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sparseft._text import did_you_mean
from sparseft.adapter import Adapter, DiffHeader, DiffSource, dense_digest
from sparseft.diff import SparseDiff, index_dtype_for
from sparseft.errors import AdapterFormatError
from sparseft.io.gaps import GapsError, decode_gaps, encode_gaps
from sparseft.io.header import FileHeader, parse_header
from sparseft.io.hub import download_adapter, is_hub_name
from sparseft.io.mapped_guard import MappedGuard
from sparseft.io.safetensors_v1 import DEFAULT_FILE, adapter_file
from sparseft.io.verify import WORTH_THREADS, index_fault, read_all, value_fault

__all__ = ["load_adapter"]


class MappedFile:
    """The bytes of one adapter file and its checked header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            # Copy-on-write: torch wants writable memory, and writes must not reach the file.
            self.bytes = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) if size else None
            self.guard = MappedGuard(file.fileno(), path)
        view = memoryview(self.bytes if self.bytes is not None else b"")
        self.header: FileHeader = parse_header(view, size, source=str(path))

    def tensor(self, name: str) -> Tensor:
        """View one tensor in the mapping; its contents are not checked yet."""
        self.guard.check()
        place = self.header.places[name]
        count = torch.Size(place.shape).numel()
        if self.bytes is None or count == 0:
            return torch.empty(place.shape, dtype=place.dtype)
        flat = torch.frombuffer(self.bytes, dtype=place.dtype, count=count, offset=place.start)
        return flat.view(place.shape)

    def fail(self, message: str) -> AdapterFormatError:
        return AdapterFormatError(f"{self.path}: {message} {self.guard.blame()}")

    def diff(self, name: str) -> SparseDiff:
        """Read and check one diff.

        Raises:
            AdapterFormatError: unsorted, repeated, out of range, not finite, or not the digest's.
        """
        header = self.header.diffs[name]
        indices = self._indices(name, header)
        values = self.tensor(f"diffs/{name}/values")
        fault = value_fault(values)
        if fault is not None:
            raise self.fail(f"diff of {name!r}: values must be finite; {fault}.")
        diff = SparseDiff._trusted(indices, values, header.shape, header.mode)
        got, wanted = diff.digest(), self.header.digests[name]
        if got != wanted:
            raise self.fail(f"diff of {name!r}: digest is {got}, the metadata says {wanted}.")
        return diff

    def _indices(self, name: str, header: DiffHeader) -> Tensor:
        """Read the positions of one diff, as they are or decoded; checked but for the digest."""
        stored = self.tensor(f"diffs/{name}/indices")
        if header.encoding == "gaps":
            try:
                dtype = index_dtype_for(header.numel)
                return decode_gaps(stored, header.nnz, header.numel, dtype)
            except GapsError as bad:
                raise self.fail(f"diff of {name!r}: its compact indices have {bad}.") from None
        fault = index_fault(stored, header.numel)
        if fault is not None:
            raise self.fail(f"diff of {name!r}: indices must ascend within the tensor; {fault}.")
        if self.header.compact and encode_gaps(stored) is not None:
            raise self.fail(
                f"diff of {name!r}: a compact file holds indices as gaps where those are smaller, "
                "and these are not."
            )
        return stored

    def read_ahead(self) -> None:
        """Ask the system for the whole file now, where it can be asked: all of it will be used."""
        if self.bytes is not None and hasattr(mmap, "MADV_WILLNEED"):
            self.bytes.madvise(mmap.MADV_WILLNEED)

    def dense(self, name: str) -> Tensor:
        """Read and check one dense tensor.

        Raises:
            AdapterFormatError: not finite, or not the digest's.
        """
        tensor = self.tensor(f"dense/{name}")
        fault = value_fault(tensor)
        if fault is not None:
            raise self.fail(f"dense tensor {name!r}: values must be finite; {fault}.")
        got, wanted = dense_digest(tensor), self.header.dense_digests[name]
        if got != wanted:
            raise self.fail(f"dense tensor {name!r}: digest is {got}, the metadata says {wanted}.")
        return tensor


class MappedDiffs(DiffSource):
    """Diffs of a file, each read and checked once, when it is first asked for.

    Who asks for the first two in order is going through all of them: the rest of a large file is
    then read at once, by several threads.
    """

    def __init__(self, file: MappedFile, device: torch.device) -> None:
        self._file = file
        self._device = device
        self._read: dict[str, SparseDiff] = {}
        self._second = next(islice(file.header.diffs, 1, None), None)
        self._in_file = device.type == "cpu"  # what was read is a view of the mapping
        if self._in_file:
            file.guard.forgets(self._read)

    def __getitem__(self, name: str) -> SparseDiff:
        if self._in_file:
            self._file.guard.check()
        if name not in self._read:
            if name not in self._file.header.diffs:
                raise KeyError(name)
            if name == self._second and len(self._read) == 1:
                self._read_ahead()
        if name not in self._read:
            self._read[name] = self._file.diff(name).to(self._device)
        return self._read[name]

    def _read_ahead(self) -> None:
        size = sum(h.nbytes for h in self._file.header.diffs.values())
        if size >= WORTH_THREADS and self._device.type == "cpu":
            # A bad tensor is refused when it is asked for, not because another one was.
            with contextlib.suppress(AdapterFormatError):
                self.read_all()
            self._second = None

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the diff to answer
        return name in self._file.header.diffs

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.header.diffs)

    def __len__(self) -> int:
        return len(self._file.header.diffs)

    def header(self, name: str) -> DiffHeader:
        return self._file.header.diffs[name]

    def read_all(self) -> None:
        """Read and check every diff not read yet, several at once."""
        left = {n: h.nbytes for n, h in self._file.header.diffs.items() if n not in self._read}
        for name, diff in read_all(self._file.diff, left).items():
            self._read[name] = diff.to(self._device)


class MappedDense(Mapping[str, Tensor]):
    """Dense tensors of a file, each read and checked once, when it is first asked for."""

    def __init__(self, file: MappedFile, device: torch.device) -> None:
        self._file = file
        self._device = device
        self._read: dict[str, Tensor] = {}
        self._in_file = device.type == "cpu"  # what was read is a view of the mapping
        if self._in_file:
            file.guard.forgets(self._read)

    def __getitem__(self, name: str) -> Tensor:
        if self._in_file:
            self._file.guard.check()
        if name not in self._read:
            if name not in self._file.header.dense_digests:
                raise KeyError(name)
            self._read[name] = self._file.dense(name).to(self._device)
        return self._read[name]

    def __contains__(self, name: object) -> bool:
        return name in self._file.header.dense_digests

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.header.dense_digests)

    def __len__(self) -> int:
        return len(self._file.header.dense_digests)

    def read_all(self) -> None:
        """Read and check every tensor, several at once."""
        places = self._file.header.places
        left = {n: places[f"dense/{n}"].nbytes for n in self if n not in self._read}
        for name, tensor in read_all(self._file.dense, left).items():
            self._read[name] = tensor.to(self._device)


def _located(path: str | os.PathLike[str]) -> Path:
    """Return ``path``, or the folder of a download where it can only mean a name on the hub."""
    here = Path(path)
    # Where its first part is a folder here, "owner/name" is a path with a slip in it.
    if isinstance(path, str) and is_hub_name(path) and not here.parent.exists():
        return download_adapter(path)
    return here


def _existing_file(path: str | os.PathLike[str]) -> Path:
    given = Path(path)
    if given.is_file():
        return given
    if given.is_dir():
        if (given / DEFAULT_FILE).is_file():
            return given / DEFAULT_FILE
        found = sorted(p.name for p in given.iterdir() if p.suffix == ".safetensors")
        hint = f" It has {', '.join(found[:5])}: name the file itself." if found else ""
        raise FileNotFoundError(f"folder {given} holds no {DEFAULT_FILE}.{hint}")
    parent = given.parent
    beside = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    hint = did_you_mean(given.name, beside) if parent.is_dir() else f" Nor does {parent}."
    on_hub = " For one of that name on the hub use Adapter.from_pretrained."
    raise FileNotFoundError(
        f"no adapter at {given}: the path does not exist.{hint} "
        f"Wanted a .safetensors file or a folder with {adapter_file('').name}."
        f"{on_hub if is_hub_name(str(path)) else ''}"
    )


def load_adapter(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    check: Literal["full", "lazy"] = "full",
) -> Adapter:
    """Read an adapter; documented behaviour and errors are those of `Adapter.load`."""
    if check not in ("full", "lazy"):
        raise ValueError(f"check is {check!r}, wanted 'full' or 'lazy'.")
    where = _located(path)
    try:
        file = MappedFile(_existing_file(where))
    except (FileNotFoundError, AdapterFormatError):
        from sparseft.io import foreign  # here and not above: an adapter of ours needs none of it

        adapter = foreign.load(where, torch.device(device))
        if adapter is None:
            raise
        return adapter
    diffs, dense = MappedDiffs(file, torch.device(device)), MappedDense(file, torch.device(device))
    if check == "full":
        file.read_ahead()
        diffs.read_all()
        dense.read_all()
    return Adapter(diffs, name=file.header.name, dense=dense, metadata=file.header.metadata)
