"""Check the header of an adapter file as if an enemy had written it.

Nothing is believed: sizes (before anything is allocated), JSON types, names, offsets, counts, and
how all of them fit together. What comes out (`FileHeader`) can be relied on; the tensors' contents
are checked in `sparseft.io.load`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparseft.adapter import AdapterMetadata, DiffHeader
from sparseft.diff import VALUE_DTYPES, index_dtype_for
from sparseft.fingerprint import SAMPLES, Fingerprint, TensorFingerprint
from sparseft.io.checker import Checker, kind, short
from sparseft.io.safetensors_v1 import (
    COMPACT_VERSION,
    DTYPE_NAMES,
    FORMAT,
    FORMAT_VERSION,
    MAX_HEADER,
    METADATA_KEYS,
    checksum,
)

__all__ = ["FileHeader", "TensorPlace", "parse_header"]

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorPlace:
    """Where one tensor lies: dtype, shape and the first byte counted from the file's start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FileHeader:
    """A checked header: adapter name, metadata, and the tensors with their places and digests.

    ``compact``: the file is of format version 2, i.e. holds indices as gaps where that is smaller.
    """

    name: str
    metadata: AdapterMetadata
    diffs: Mapping[str, DiffHeader]
    digests: Mapping[str, str]
    dense_digests: Mapping[str, str]
    places: Mapping[str, TensorPlace]
    compact: bool


def parse_header(head: bytes | memoryview, file_size: int, *, source: str) -> FileHeader:
    """Check the first bytes of an adapter file and say what the file holds.

    Args:
        head: at least the length and the header, i.e. the first ``8 + length`` bytes.
        file_size: bytes in the whole file.
        source: what to call the file in errors.

    Raises:
        AdapterFormatError: anything is not as `sparseft.io.safetensors_v1` says.
    """
    check = Checker(source)
    if file_size == 0:
        check.fail("the file is empty; the write that made it failed, or the copy did.")
    if file_size < 8:
        check.fail(f"the file has {file_size} bytes and ends inside the 8-byte header length.")
    (length,) = struct.unpack("<Q", head[:8])
    if length > min(file_size - 8, MAX_HEADER):
        check.fail(_why_no_header(bytes(head[:8]), length, file_size))
    try:
        text = bytes(head[8 : 8 + length]).decode("utf-8")
    except UnicodeDecodeError as bad:
        check.fail(f"the header is not UTF-8 ({bad.reason} at byte {bad.start}).")
    header = check.object(check.json(text, "the header"), "the header")
    metadata = _metadata(check, header.pop("__metadata__", None), list(header))
    places = _places(check, header, data_start=8 + length, file_size=file_size)
    compact = metadata["format_version"] == COMPACT_VERSION
    diffs, digests, dense = _contents(check, metadata["tensors"], places, compact=compact)
    name, provenance = _provenance(check, metadata["adapter"], metadata["fingerprint"])
    table = {n: (DTYPE_NAMES[place.dtype], place.shape) for n, place in places.items()}
    wanted = check.digest(metadata["checksum"], "metadata (checksum)")
    if checksum(metadata, table) != wanted:
        check.fail("the metadata does not match its checksum: the file was damaged or edited.")
    return FileHeader(name, provenance, diffs, digests, dense, places, compact)


def _why_no_header(start: bytes, length: int, file_size: int) -> str:
    if start.startswith(b"PK\x03\x04") or (start[0] == 0x80 and start[1] in range(2, 6)):
        return (
            "this is a pickle (torch.save), not safetensors; pickles can run code and are never "
            "opened here. Ask for a safetensors file."
        )
    if length > MAX_HEADER:
        return (
            f"not a safetensors file: it begins with {start!r} where those have the length of "
            f"their header, and so long a header is above the limit of {MAX_HEADER:,} bytes."
        )
    return (
        f"header length {length} is more than the file's {file_size} bytes: the file is cut off. "
        "Copy or download it again."
    )


def _metadata(check: Checker, found: Any, tensor_names: list[str]) -> dict[str, str]:
    if found is None:
        some = ", ".join(map(repr, tensor_names[:3]))
        check.fail(
            f"no metadata: a safetensors file, but not an adapter (tensors {some} ...). "
            "Adapter.save writes adapters."
        )
    metadata = check.object(found, "__metadata__")
    for key, value in metadata.items():
        check.string(key, "a metadata key")
        check.string(value, f"metadata {key!r}")
    if metadata.get("format") != FORMAT:
        got = metadata.get("format")
        check.fail(
            f"metadata 'format' is {got!r}, wanted {FORMAT!r}: a safetensors file, but not an "
            "adapter."
        )
    version = metadata.get("format_version")
    if version not in (FORMAT_VERSION, COMPACT_VERSION):
        check.fail(
            f"format_version is {version!r}, this release reads {FORMAT_VERSION!r} and "
            f"{COMPACT_VERSION!r}. A newer file needs a newer sparseft."
        )
    return check.fields(metadata, METADATA_KEYS, "__metadata__")


def _places(
    check: Checker, table: dict[str, Any], *, data_start: int, file_size: int
) -> dict[str, TensorPlace]:
    """Check every tensor's entry, and that together they cover the data once, without gaps."""
    places: dict[str, TensorPlace] = {}
    spans: list[tuple[int, int, str]] = []
    data_size = file_size - data_start
    for name, value in table.items():
        what = f"tensor {check.string(name, 'a tensor name')!r}"
        entry = check.fields(value, ("dtype", "shape", "data_offsets"), what)
        dtype_name = check.string(entry["dtype"], f"dtype of {what}")
        if dtype_name not in DTYPES:
            check.fail(f"dtype of {what} is {dtype_name!r}, wanted one of {', '.join(DTYPES)}.")
        dtype = DTYPES[dtype_name]
        shape = check.shape(entry["shape"], what)
        offsets = entry["data_offsets"]
        if not isinstance(offsets, list) or len(offsets) != 2:
            check.fail(f"data_offsets of {what} is not a pair [begin, end].")
        begin, end = (check.integer(o, f"data_offsets of {what}") for o in offsets)
        if end > data_size:
            check.fail(
                f"{what} ends at byte {end} of the data, but the file holds {data_size}: it is cut "
                "off. Copy or download it again."
            )
        size = math.prod(shape) * dtype.itemsize
        if end - begin != size:
            check.fail(
                f"{what} spans {end - begin} bytes, but {dtype_name} {list(shape)} needs {size}."
            )
        start = data_start + begin
        if start % dtype.itemsize and size:
            check.fail(
                f"{what} starts at byte {start} of the file, not a multiple of its item size "
                f"{dtype.itemsize}."
            )
        places[name] = TensorPlace(dtype, shape, start)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            how = "overlaps the one before it" if begin < position else "leaves a gap before it"
            check.fail(f"tensor {name!r} {how} (begins at {begin}, wanted {position}).")
        position = end
    if position != data_size:
        check.fail(f"{data_size - position} bytes follow the last tensor; the file is not ours.")
    return places


def _contents(
    check: Checker, text: str, places: Mapping[str, TensorPlace], *, compact: bool
) -> tuple[dict[str, DiffHeader], dict[str, str], dict[str, str]]:
    """Match what the metadata promises with the tensors that are there."""
    document = check.json(text, "metadata 'tensors'")
    listed = check.fields(document, ("dense", "diffs"), "metadata 'tensors'")
    unclaimed = dict(places)

    def claim(tensor_name: str, owner: str) -> TensorPlace:
        if tensor_name not in unclaimed:
            check.fail(f"{owner} is listed, but its tensor {tensor_name!r} is missing.")
        return unclaimed.pop(tensor_name)

    diffs: dict[str, DiffHeader] = {}
    digests: dict[str, str] = {}
    for name, value in sorted(check.object(listed["diffs"], "list of diffs").items()):
        what = f"diff of {name!r}"
        if not check.string(name, "a parameter name"):
            check.fail("a parameter's name is empty.")
        entry = check.fields(value, ("digest", "mode", "nnz", "shape"), what)
        shape = check.shape(entry["shape"], what)
        nnz = check.integer(entry["nnz"], f"nnz of {what}")
        mode = entry["mode"]
        if mode != "add" and mode != "set":
            check.fail(f"mode of {what} is {short(mode)!r}, wanted 'add' or 'set'.")
        if nnz > math.prod(shape):
            check.fail(
                f"{what} says {nnz} entries, but shape {list(shape)} has only {math.prod(shape)}."
            )
        indices = claim(f"diffs/{name}/indices", what)
        values = claim(f"diffs/{name}/values", what)
        wanted = index_dtype_for(math.prod(shape))
        gaps = compact and indices.dtype == torch.uint8
        if gaps and not nnz <= indices.nbytes < nnz * wanted.itemsize:
            check.fail(
                f"indices of {what} take {indices.nbytes} bytes as gaps, wanted {nnz} or more (one "
                f"for each entry) and less than {nnz * wanted.itemsize} (as positions)."
            )
        for part, place in (("indices", indices), ("values", values)):
            count = indices.nbytes if gaps and part == "indices" else nnz
            if place.shape != (count,):
                check.fail(f"{part} of {what} has shape {list(place.shape)}, wanted [{count}].")
        if indices.dtype != wanted and not gaps:
            check.fail(
                f"indices of {what} are {DTYPE_NAMES[indices.dtype]}, wanted {DTYPE_NAMES[wanted]} "
                f"for {math.prod(shape)} entries."
            )
        if values.dtype not in VALUE_DTYPES:
            check.fail(f"values of {what} are {DTYPE_NAMES[values.dtype]}, wanted floating point.")
        diffs[name] = DiffHeader(
            torch.Size(shape), nnz, mode, values.dtype, "gaps" if gaps else "plain", indices.nbytes
        )
        digests[name] = check.digest(entry["digest"], what)

    dense: dict[str, str] = {}
    for name, value in sorted(check.object(listed["dense"], "list of dense tensors").items()):
        what = f"dense tensor {name!r}"
        if not check.string(name, "a parameter name"):
            check.fail("a parameter's name is empty.")
        if name in diffs:
            check.fail(f"{name!r} is both a diff and a dense tensor.")
        dense[name] = check.digest(check.fields(value, ("digest",), what)["digest"], what)
        place = claim(f"dense/{name}", what)
        if place.dtype not in VALUE_DTYPES:
            check.fail(f"{what} is {DTYPE_NAMES[place.dtype]}, wanted floating point.")
    if compact and all(header.encoding == "plain" for header in diffs.values()):
        check.fail(
            f"format_version is {COMPACT_VERSION!r}, but no indices are gaps; "
            f"wanted {FORMAT_VERSION!r}."
        )
    if unclaimed:
        check.fail(f"tensor {min(unclaimed)!r} is in the file but not listed in its metadata.")
    return diffs, digests, dense


def _provenance(check: Checker, text: str, fingerprint: str) -> tuple[str, AdapterMetadata]:
    what = "metadata 'adapter'"
    keys = ("base_name", "density", "extra", "method", "name", "parents", "seed", "versions")
    found = check.fields(check.json(text, what), keys, what)
    base_name, density, seed = found["base_name"], found["density"], found["seed"]
    versions = check.object(found["versions"], "versions")
    for library, version in versions.items():
        check.string(library, "a library's name")
        check.string(version, f"version of {library!r}")
    if not isinstance(found["parents"], list):
        check.fail(f"parents is {kind(found['parents'])}, wanted a list of strings.")
    metadata = AdapterMetadata(
        format_version=int(FORMAT_VERSION),
        base_name=None if base_name is None else check.string(base_name, "base_name"),
        fingerprint=_fingerprint(check, fingerprint),
        method=check.string(found["method"], "method"),
        density=None if density is None else check.number(density, "density"),
        seed=None if seed is None else check.integer(seed, "seed", low=-(2**63), high=2**64 - 1),
        versions=versions,
        parents=tuple(check.string(p, "an entry of parents") for p in found["parents"]),
        extra=check.object(found["extra"], "extra"),
    )
    return check.string(found["name"], "name"), metadata


def _fingerprint(check: Checker, text: str) -> Fingerprint | None:
    document = check.json(text, "metadata 'fingerprint'")
    if document is None:
        return None
    tensors: dict[str, TensorFingerprint] = {}
    for name, value in check.object(document, "metadata 'fingerprint'").items():
        what = f"fingerprint of {check.string(name, 'a parameter name')!r}"
        step = ("step",) if isinstance(value, dict) and "step" in value else ()
        entry = check.fields(value, ("digest", "dtype", "samples", "shape", *step), what)
        shape = check.shape(entry["shape"], what)
        samples = entry["samples"]
        wanted = SAMPLES if math.prod(shape) else 0
        if not isinstance(samples, list) or len(samples) != wanted:
            check.fail(f"samples of {what} are not a list of {wanted} numbers.")
        tensors[name] = TensorFingerprint(
            shape=shape,
            dtype=check.string(entry["dtype"], f"dtype of {what}"),
            digest=check.digest(entry["digest"], what),
            samples=tuple(
                float(s) if s in ("nan", "inf", "-inf") else check.number(s, f"a sample of {what}")
                for s in samples
            ),
            step=check.number(entry["step"], f"step of {what}") if step else 0.0,
        )
    return Fingerprint(tensors)
