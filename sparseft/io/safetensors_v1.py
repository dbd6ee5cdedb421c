"""Adapter files: the format, versions 1 and 2, field by field, and its writer.

An adapter is one safetensors file, by default ``adapter.safetensors`` in a folder of its own::

    8 bytes   length of the header, unsigned little-endian; at most 100,000,000
    header    UTF-8 JSON object, padded with spaces so that the data starts at a multiple of 8
    data      the tensors' bytes, little-endian, row-major, one after another without gaps

The header maps each tensor's name to ``{"dtype", "shape", "data_offsets"}``, and ``"__metadata__"``
to strings. Tensors lie in descending order of item size, then by name, so each is aligned.

Tensors, for each parameter ``NAME`` with a diff (``nnz`` entries) or trained fully:

``diffs/NAME/indices``
    I32 or I64, (nnz,): flat row-major positions, ascending and unique. I32 exactly when the
    parameter has fewer than 2**31 entries. In format version 2 U8, (bytes,): the gaps between them
    (`sparseft.io.gaps`), exactly where those take fewer bytes.
``diffs/NAME/values``
    F32, BF16, F16 or F64, (nnz,): finite; entry i belongs to position ``indices[i]``.
``dense/NAME``
    F32, BF16, F16 or F64, of the parameter's shape: the whole parameter, which replaces the base's;
    finite.

Metadata, all required. Values are strings; those marked JSON hold a JSON document with sorted keys.

``format``
    ``"sparseft-adapter"``.
``format_version``
    ``"1"``, or ``"2"`` exactly when some indices are gaps (``Adapter.save(compact=True)``). Raised
    when a reader of the old version would misread the file.
``adapter`` (JSON)
    ``name`` string; ``base_name`` string or null, never a path; ``method`` string; ``density``
    number or null; ``seed`` integer or null; ``versions`` object of strings (library: version);
    ``parents`` list of content digests of the adapters that lay beneath while this one was trained;
    ``extra`` object.
``tensors`` (JSON)
    ``diffs``: NAME to ``shape`` (list of integers; the parameter's), ``nnz`` (integer), ``mode``
    (``"add"``: W[indices] + values; ``"set"``: W[indices] = values) and ``digest`` (32 hex digits,
    BLAKE2b of 16 bytes, as `SparseDiff.digest`: of the positions, however they are stored).
    ``dense``: NAME to ``digest`` (as `dense_digest`).
``fingerprint`` (JSON)
    null, or NAME to ``shape``, ``dtype``, ``digest`` and ``samples`` of the base tensor
    (`sparseft.fingerprint`), and ``step`` (number) where that is quantised; non-finite samples are
    the strings ``"nan"``, ``"inf"``, ``"-inf"``.
``checksum``
    32 hex digits, BLAKE2b of 16 bytes over the canonical JSON (sorted keys, no spaces, UTF-8) of
    ``{"metadata": all other metadata, "tensors": {tensor name: [dtype, shape]}}``. Independent of
    order and padding, so a file rewritten by another safetensors writer stays valid.

The same adapter gives the same bytes: no time, no path, one order of everything. The file is
written here and not by the safetensors package because that keeps metadata in a hash map, whose
order (and so the file's bytes) changes from process to process; any safetensors reader reads it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparseft._integrity import find_index_fault, find_value_fault, raw_pieces
from sparseft.adapter import dense_digest
from sparseft.diff import SparseDiff
from sparseft.errors import AdapterFormatError
from sparseft.io.atomic import atomic_write
from sparseft.io.gaps import encode_gaps

if TYPE_CHECKING:
    from sparseft.adapter import Adapter, AdapterMetadata
    from sparseft.fingerprint import Fingerprint

__all__ = [
    "COMPACT_VERSION",
    "DEFAULT_FILE",
    "DTYPE_NAMES",
    "FORMAT",
    "FORMAT_VERSION",
    "MAX_HEADER",
    "METADATA_KEYS",
    "adapter_file",
    "checksum",
    "save_adapter",
]

FORMAT = "sparseft-adapter"
FORMAT_VERSION = "1"
COMPACT_VERSION = "2"
DEFAULT_FILE = "adapter.safetensors"
MAX_HEADER = (
    100_000_000  # the safetensors package's own limit, so both readers accept the same files
)
METADATA_KEYS = ("adapter", "checksum", "fingerprint", "format", "format_version", "tensors")
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


def adapter_file(path: str | os.PathLike[str]) -> Path:
    """Return the file ``path`` means: itself if it ends in .safetensors, else the one inside."""
    path = Path(path)
    return path if path.suffix == ".safetensors" and not path.is_dir() else path / DEFAULT_FILE


def canonical_json(data: Any) -> str:
    """Return JSON in its one form here: sorted keys, no spaces, UTF-8, no NaN or infinity."""
    return json.dumps(
        data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def checksum(
    metadata: Mapping[str, str], tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> str:
    """Return the header's checksum (see the module docstring).

    Args:
        metadata: all metadata; a ``checksum`` among it is left out.
        tensors: tensor name -> (dtype name, shape).
    """
    covered = {
        "metadata": {k: v for k, v in metadata.items() if k != "checksum"},
        "tensors": {n: [dtype, list(shape)] for n, (dtype, shape) in tensors.items()},
    }
    return hashlib.blake2b(canonical_json(covered).encode(), digest_size=16).hexdigest()


def _provenance(name: str, metadata: AdapterMetadata) -> dict[str, Any]:
    return {
        "name": name,
        "base_name": metadata.base_name,
        "method": metadata.method,
        "density": metadata.density,
        "seed": metadata.seed,
        "versions": dict(metadata.versions),
        "parents": list(metadata.parents),
        "extra": metadata.extra,
    }


def _fingerprint(fingerprint: Fingerprint | None) -> dict[str, Any] | None:
    if fingerprint is None:
        return None
    return {
        name: {
            "shape": list(t.shape),
            "dtype": t.dtype,
            "digest": t.digest,
            "samples": [s if math.isfinite(s) else str(s) for s in t.samples],
            **({"step": t.step} if t.step else {}),
        }
        for name, t in fingerprint.tensors.items()
    }


def _check_writable(name: str, diff: SparseDiff) -> None:
    """A file holds only what its reader accepts, also if tensors changed since construction."""
    fault = find_index_fault(diff.indices, diff.numel)
    if fault is not None:
        raise AdapterFormatError(f"diff of {name!r}: indices are {fault}; nothing was written.")
    fault = find_value_fault(diff.values)
    if fault is not None:
        raise AdapterFormatError(f"diff of {name!r}: values are {fault}; nothing was written.")


def build_header(
    adapter: Adapter, *, compact: bool = False
) -> tuple[bytes, list[tuple[str, Tensor]]]:
    """Return the file's first bytes (length, header) and the tensors in the order they follow."""
    version = FORMAT_VERSION
    tensors: dict[str, Tensor] = {}
    diffs: dict[str, dict[str, Any]] = {}
    for name, diff in adapter.diffs.items():
        _check_writable(name, diff)
        gaps = encode_gaps(diff.indices) if compact else None
        if gaps is not None:
            version = COMPACT_VERSION
        tensors[f"diffs/{name}/indices"] = diff.indices if gaps is None else gaps
        tensors[f"diffs/{name}/values"] = diff.values
        shape = list(diff.shape)
        diffs[name] = {"shape": shape, "nnz": diff.nnz, "mode": diff.mode, "digest": diff.digest()}
    dense: dict[str, dict[str, str]] = {}
    for name, tensor in adapter.dense.items():
        fault = find_value_fault(tensor)
        if fault is not None:
            raise AdapterFormatError(f"dense {name!r}: values are {fault}; nothing was written.")
        tensors[f"dense/{name}"] = tensor
        dense[name] = {"digest": dense_digest(tensor)}

    try:
        metadata = {
            "format": FORMAT,
            "format_version": version,
            "adapter": canonical_json(_provenance(adapter.name, adapter.metadata)),
            "tensors": canonical_json({"diffs": diffs, "dense": dense}),
            "fingerprint": canonical_json(_fingerprint(adapter.metadata.fingerprint)),
        }
        "".join(metadata.values()).encode("utf-8")
    except UnicodeEncodeError as bad:
        raise AdapterFormatError(
            f"a name or metadata of adapter {adapter.name!r} is not valid Unicode: {bad}"
        ) from None
    except (TypeError, ValueError) as bad:
        raise AdapterFormatError(
            f"metadata of adapter {adapter.name!r} has no JSON form: {bad}"
        ) from None
    order = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    metadata["checksum"] = checksum(
        metadata, {n: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in order}
    )
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for tensor_name, tensor in order:
        end = offset + tensor.numel() * tensor.element_size()
        header[tensor_name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, order


def save_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = True,
    compact: bool = False,
) -> Path:
    """Write ``adapter`` to ``path/adapter.safetensors``, or to ``path`` if it ends in .safetensors.

    The documented behaviour and errors are those of `Adapter.save`.
    """
    # Here and not above: the reader needs this module's constants.
    from sparseft.io.header import parse_header

    if sys.byteorder != "little":
        raise AdapterFormatError("adapters are written on little-endian machines only.")
    file = adapter_file(path)
    head, tensors = build_header(adapter, compact=compact)
    # The reader's own checks, before anything touches the disk: types of metadata, sizes, names.
    size = len(head) + sum(t.numel() * t.element_size() for _, t in tensors)
    parse_header(head, size, source=f"adapter {adapter.name!r} (not written)")
    with atomic_write(file, overwrite=overwrite) as out:
        out.write(head)
        for _, tensor in tensors:
            for piece in raw_pieces(tensor):
                out.write(piece)
    return file
