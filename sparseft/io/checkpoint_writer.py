"""Write a safetensors file of a checkpoint as a stream: header first, then tensor after tensor."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from sparseft.errors import CompositionError
from sparseft.io.atomic import atomic_write
from sparseft.io.checkpoint_shards import TensorInfo

__all__ = ["aligned", "write_safetensors"]


def _item_size(info: TensorInfo) -> int:
    return info.torch_dtype.itemsize if info.torch_dtype is not None else 1


def aligned(tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
    """Return the tensors in an order in which each begins at a multiple of its item size.

    That given, if it is such; else by descending item size. Readers view the bytes where they lie.
    """
    offset = 0
    for info in tensors:
        if offset % _item_size(info):
            return sorted(tensors, key=_item_size, reverse=True)  # stable
        offset += info.nbytes
    return list(tensors)


def write_safetensors(
    path: Path,
    tensors: Sequence[TensorInfo],
    metadata: Mapping[str, str],
    contents: Callable[[TensorInfo], Iterable[memoryview]],
) -> None:
    """Write one file, whole or not at all; holds one piece in memory at a time.

    Args:
        path: the file.
        tensors: what it is to hold, in this order.
        metadata: the header's strings; ``format`` is "pt" where they lack one.
        contents: gives the bytes of a tensor, row-major and little-endian, in pieces.

    Raises:
        CompositionError: a tensor has more or fewer bytes than its entry says.
        OSError: writing failed.
    """
    if sys.byteorder != "little":
        raise CompositionError("checkpoints are written on little-endian machines only.")
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for info in tensors:
        end = offset + info.nbytes
        entry = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offset, end]}
        header[info.name] = entry
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for info in tensors:
            written = 0
            for piece in contents(info):
                out.write(piece)
                written += len(piece)
            if written != info.nbytes:
                raise CompositionError(
                    f"{info.name!r} has {written} bytes where {info.nbytes} were announced."
                )
