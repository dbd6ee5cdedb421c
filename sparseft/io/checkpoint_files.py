"""Model checkpoints on disk, read tensor by tensor: one file, or shards with an index."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from sparseft._text import did_you_mean
from sparseft.errors import CompositionError, UnknownNameError
from sparseft.io.checkpoint_shards import MAX_HEADER, Shard, TensorInfo, open_shard
from sparseft.io.configs import read_json_object

__all__ = ["CheckpointFiles"]

# What from_pretrained looks for, in its order.
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class CheckpointFiles:
    """The files of a checkpoint and what they hold; contents are read when asked for.

    Args:
        path: a folder as save_pretrained writes it (one file or shards with an index, safetensors
            or pytorch_model.bin), or one file.
        what: what it is for, in messages, e.g. ``"base"``.

    Attributes:
        shards: the files, in order of their names.
        index: the index file's content; None for a checkpoint of one file.

    Raises:
        FileNotFoundError: no weights there, or a shard is missing.
        CompositionError: a file that is damaged, or not what its name says.
    """

    def __init__(self, path: str | os.PathLike[str], what: str = "base") -> None:
        self.path = Path(path)
        self.index: dict[str, Any] | None = None
        files = self._find(what)
        self.shards: list[Shard] = [open_shard(file) for file in files]
        self._home: dict[str, Shard] = {}
        for shard in self.shards:
            for name in shard.tensors:
                if name in self._home:
                    raise CompositionError(
                        f"{what}: {name!r} is in {self._home[name].file.name} and in "
                        f"{shard.file.name}; one of the two is left over from another save."
                    )
                self._home[name] = shard
        if self.index is not None:
            absent = [n for n in self.index["weight_map"] if n not in self._home]
            if absent:
                raise CompositionError(
                    f"{what}: the index of {self.path} names {absent[0]!r}, which is in none of "
                    "its files; the checkpoint is incomplete."
                )

    def _find(self, what: str) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        for single, index in zip(_SINGLE, _INDEXES, strict=True):
            if (self.path / single).is_file():
                return [self.path / single]
            if (self.path / index).is_file():
                return self._shards_of(self.path / index, what)
        files = sorted(self.path.glob("*.safetensors")) if self.path.is_dir() else []
        if len(files) == 1:
            return files
        raise FileNotFoundError(
            f"{what}: no weights in {self.path} ({len(files)} .safetensors files, no index); "
            "wanted model.safetensors, its shards with an index, or pytorch_model.bin."
        )

    def _shards_of(self, index: Path, what: str) -> list[Path]:
        try:
            table = read_json_object(index, CompositionError, MAX_HEADER)
            names = sorted(set(table["weight_map"].values()))
            plain = all(isinstance(n, str) and n == os.path.basename(n) and n for n in names)
        except (CompositionError, TypeError, KeyError, AttributeError) as bad:
            raise CompositionError(f"{what}: {index} is no index of shards: {bad}") from None
        if not plain:
            raise CompositionError(f"{what}: {index} names files outside its folder; refused.")
        files = [index.with_name(name) for name in names]
        absent = [f.name for f in files if not f.is_file()]
        if absent:
            raise FileNotFoundError(
                f"{what}: {index} names {absent[0]}, which is not there ({len(absent)} of "
                f"{len(files)} shards are missing); download the rest."
            )
        self.index = table
        return files

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in the order of files and contents."""
        return list(self._home)

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def _shard(self, name: str) -> Shard:
        if name not in self._home:
            raise UnknownNameError(
                f"{self.path} has no tensor {name!r}.{did_you_mean(name, self._home)}"
            )
        return self._home[name]

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape and size of a tensor."""
        return self._shard(name).tensors[name]

    def read(self, name: str) -> Tensor:
        """Return one tensor in memory of its own."""
        return self._shard(name).read(name)

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of one tensor, a few megabytes at a time."""
        return self._shard(name).pieces(name)

    def same_bytes(self, name: str, other: CheckpointFiles, other_name: str) -> bool:
        """Whether two tensors are equal in dtype, shape and every bit."""
        a, b = self.info(name), other.info(other_name)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        return _same_stream(self.pieces(name), other.pieces(other_name))


def _same_stream(a: Iterator[memoryview], b: Iterator[memoryview]) -> bool:
    """Compare two streams of as many bytes, whatever the sizes of their pieces."""
    left, right = memoryview(b""), memoryview(b"")
    while True:
        left = left or next(a, memoryview(b""))
        right = right or next(b, memoryview(b""))
        n = min(len(left), len(right))
        if not n:
            return len(left) == len(right)
        if left[:n].tobytes() != right[:n].tobytes():  # views compare byte by byte
            return False
        left, right = left[n:], right[n:]
