"""Adapter files made by an enemy, or by a bad disk: refused, with the wrong tensor's name."""

from __future__ import annotations

import json
import math
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sparseft.adapter import Adapter
from sparseft.errors import AdapterFormatError
from sparseft.io.header import parse_header

W = "layer.0.weight"
Forge = Callable[..., Path]


def _touch_everything(file: Path) -> None:
    adapter = Adapter.load(file, check="lazy")
    list(adapter.values())
    list(adapter.dense.values())


def refuse(file: Path, *parts: str) -> str:
    """Both ways of loading refuse, with the file and all ``parts`` in the message."""
    with pytest.raises(AdapterFormatError) as full:
        Adapter.load(file)
    with pytest.raises(AdapterFormatError) as lazy:
        _touch_everything(file)
    message = str(full.value)
    assert message == str(lazy.value)
    for part in (str(file), *parts):
        assert part in message
    return message


def test_forger_without_an_edit_is_accepted(saved: Path, adapter: Adapter, forge: Forge):
    """The stock safetensors writer keeps files valid, and the forger seals rightly."""
    before = saved.read_bytes()
    forge(saved, lambda tensors, listing, metadata: None)
    assert saved.read_bytes() != before
    assert Adapter.load(saved).equals(adapter)


def _indices(values: list[int], dtype: torch.dtype = torch.int32) -> Callable[..., None]:
    def edit(tensors: dict[str, Tensor], listing: dict[str, Any], metadata: dict[str, str]) -> None:
        tensors[f"diffs/{W}/indices"] = torch.tensor(values, dtype=dtype)
        tensors[f"diffs/{W}/values"] = torch.ones(len(values))
        listing["diffs"][W]["nnz"] = len(values)

    return edit


def _values(values: Tensor) -> Callable[..., None]:
    def edit(tensors: dict[str, Tensor], listing: dict[str, Any], metadata: dict[str, str]) -> None:
        n = values.numel()
        tensors[f"diffs/{W}/indices"] = torch.arange(n, dtype=torch.int32)
        tensors[f"diffs/{W}/values"] = values
        listing["diffs"][W]["nnz"] = n

    return edit


def _listing(**fields: Any) -> Callable[..., None]:
    def edit(tensors: dict[str, Tensor], listing: dict[str, Any], metadata: dict[str, str]) -> None:
        listing["diffs"][W].update(fields)

    return edit


def _dense(value: Tensor) -> Callable[..., None]:
    def edit(tensors: dict[str, Tensor], listing: dict[str, Any], metadata: dict[str, str]) -> None:
        tensors["dense/head.weight"] = value

    return edit


def _drop(tensor: str) -> Callable[..., None]:
    return lambda tensors, listing, metadata: tensors.pop(tensor)


def _extra(tensor: str) -> Callable[..., None]:
    return lambda tensors, listing, metadata: tensors.update({tensor: torch.zeros(1)})


CONTENTS = {
    "unsorted": (_indices([0, 5, 4]), f"'{W}'", "indices[1] = 5, indices[2] = 4"),
    "duplicate": (_indices([0, 5, 5]), f"'{W}'", "a duplicate"),
    "negative": (_indices([-3, 5]), f"'{W}'", "negative"),
    "past-end": (_indices([0, 15]), f"'{W}'", "15 entries"),
    "wraps": (_indices([2**31 - 1, -(2**31)]), f"'{W}'", "not ascending"),
    "int64-indices": (_indices([0, 1], torch.int64), f"'{W}'", "I64, wanted I32"),
    "nan": (_values(torch.tensor([1.0, math.nan])), f"'{W}'", "entry 1 is nan"),
    "inf": (_values(torch.tensor([math.inf])), f"'{W}'", "entry 0 is inf"),
    "half-inf": (_values(torch.tensor([-math.inf]).half()), f"'{W}'", "entry 0 is -inf"),
    "integer-values": (_values(torch.ones(2).int()), f"'{W}'", "I32, wanted floating point"),
    "values-2d": (_values(torch.ones(2, 1)), f"'{W}'", "[2, 1], wanted [2]"),
    "smaller-shape": (_listing(shape=[1, 5]), f"'{W}'", "has only 5"),
    "overflow-shape": (_listing(shape=[2**62, 4]), f"'{W}'", "overflows"),
    "int32-past-limit": (_listing(shape=[2**31]), f"'{W}'", "I32, wanted I64"),
    "negative-shape": (_listing(shape=[-3, -5]), f"'{W}'", "-3, wanted 0 to"),
    "float-shape": (_listing(shape=[3.0, 5]), f"'{W}'", "float 3.0, wanted an integer"),
    "bool-shape": (_listing(shape=[True, 15]), f"'{W}'", "wanted an integer"),
    "text-shape": (_listing(shape="3x5"), f"'{W}'", "a string, wanted a list"),
    "65-dims": (_listing(shape=[1] * 65), f"'{W}'", "65 dimensions"),
    "nnz-too-low": (_listing(nnz=1), f"'{W}'", "wanted [1]"),
    "nnz-above-numel": (_listing(nnz=16), f"'{W}'", "16 entries"),
    "nnz-text": (_listing(nnz="7"), f"'{W}'", "a string, wanted an integer"),
    "nnz-huge": (_listing(nnz=10**400), f"'{W}'", "a huge integer"),
    "mode": (_listing(mode="mul"), f"'{W}'", "'mul', wanted 'add' or 'set'"),
    "unknown-field": (_listing(scale=2), f"'{W}'", "unknown field 'scale'"),
    "missing-indices": (_drop(f"diffs/{W}/indices"), f"'{W}'", "is missing"),
    "missing-values": (_drop(f"diffs/{W}/values"), f"'{W}'", "is missing"),
    "missing-dense": (_drop("dense/head.weight"), "'head.weight'", "is missing"),
    "extra-tensor": (_extra("diffs/other/values"), "'diffs/other/values'", "not listed"),
    "stray-name": (_extra("head.weight"), "'head.weight'", "not listed"),
    "dense-nan": (_dense(torch.tensor([math.nan])), "'head.weight'", "entry 0 is nan"),
    "dense-int": (_dense(torch.ones(2, dtype=torch.int64)), "'head.weight'", "I64"),
    "dense-bool": (_dense(torch.ones(2, dtype=torch.bool)), "'dense/head.weight'", "'BOOL'"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_contents(saved: Path, forge: Forge, case: str):
    edit, *parts = CONTENTS[case]
    forge(saved, edit)
    refuse(saved, *parts)


def test_one_name_both_sparse_and_dense(saved: Path, forge: Forge):
    def edit(tensors: dict[str, Tensor], listing: dict[str, Any], metadata: dict[str, str]) -> None:
        tensors[f"dense/{W}"] = torch.ones(3, 5)
        listing["dense"][W] = {"digest": "0" * 32}

    refuse(forge(saved, edit), f"'{W}' is both a diff and a dense tensor")


def _adapter_document(**fields: Any) -> Callable[..., None]:
    def edit(tensors: dict[str, Tensor], listing: dict[str, Any], metadata: dict[str, str]) -> None:
        metadata["adapter"] = json.dumps({**json.loads(metadata["adapter"]), **fields})

    return edit


def _metadata(**fields: str | None) -> Callable[..., None]:
    def edit(tensors: dict[str, Tensor], listing: dict[str, Any], metadata: dict[str, str]) -> None:
        for key, value in fields.items():
            if value is None:
                del metadata[key]
            else:
                metadata[key] = value

    return edit


def _fingerprint(**fields: Any) -> Callable[..., None]:
    def edit(tensors: dict[str, Tensor], listing: dict[str, Any], metadata: dict[str, str]) -> None:
        document = json.loads(metadata["fingerprint"])
        document[W].update(fields)
        metadata["fingerprint"] = json.dumps(document)

    return edit


DEEP = "[" * 100_000 + "]" * 100_000
METADATA = {
    "no-format": (_metadata(format=None), "'format' is None"),
    "other-format": (_metadata(format="pt"), "'format' is 'pt'"),
    "no-version": (_metadata(format_version=None), "format_version is None"),
    "newer-version": (_metadata(format_version="3"), "'3', this release reads '1' and '2'"),
    "compact-without-gaps": (_metadata(format_version="2"), "no indices are gaps"),
    "no-adapter": (_metadata(adapter=None), "lacks 'adapter'"),
    "no-checksum": (_metadata(checksum=None), "lacks 'checksum'"),
    "unknown-key": (_metadata(author="x"), "unknown field 'author'"),
    "not-json": (_metadata(adapter="{'name': 1}"), "'adapter' is not valid JSON"),
    "json-nan": (_adapter_document(density=math.nan), "NaN is not JSON"),
    "json-list": (_metadata(adapter="[]"), "a list, wanted an object"),
    "json-twice": (_metadata(adapter='{"name": "a", "name": "b"}'), "'name' appears twice"),
    "deep": (_metadata(adapter=DEEP), "nested too deeply"),
    "deep-extra": (_metadata(fingerprint=DEEP), "nested too deeply"),
    "long-number": (_metadata(adapter="1" * 10_000), "not valid JSON"),
    "name-number": (_adapter_document(name=3), "name is int 3, wanted a string"),
    "density-text": (_adapter_document(density="0.1"), "density is a string"),
    "density-huge": (_adapter_document(density=10**400), "density is out of range"),
    "seed-float": (_adapter_document(seed=1.5), "seed is float 1.5, wanted an integer"),
    "seed-bool": (_adapter_document(seed=True), "seed is bool True"),
    "versions-list": (_adapter_document(versions=[]), "versions is a list"),
    "versions-number": (_adapter_document(versions={"torch": 2}), "version of 'torch'"),
    "parents-text": (_adapter_document(parents="abc"), "parents is a string"),
    "parents-number": (_adapter_document(parents=[1]), "an entry of parents"),
    "extra-list": (_adapter_document(extra=[1]), "extra is a list"),
    "method-null": (_adapter_document(method=None), "method is null"),
    "surrogate": (_adapter_document(name="\ud800"), "surrogates not allowed"),
    "surrogate-extra": (_adapter_document(extra={"\ud800": 1}), "surrogates not allowed"),
    "unknown-provenance": (_adapter_document(author="x"), "unknown field 'author'"),
    "fingerprint-samples": (_fingerprint(samples=[1.0]), f"'{W}' are not a list of 16"),
    "fingerprint-text": (_fingerprint(samples=["x"] * 16), "a sample of fingerprint"),
    "fingerprint-digest": (_fingerprint(digest="XYZ"), "wanted 32 lower-case hex digits"),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata(saved: Path, forge: Forge, case: str):
    edit, *parts = METADATA[case]
    forge(saved, edit)
    refuse(saved, *parts)


def test_edited_contents_without_a_new_seal(saved: Path, forge: Forge):
    def edit(tensors: dict[str, Tensor], listing: dict[str, Any], metadata: dict[str, str]) -> None:
        tensors[f"diffs/{W}/values"] *= 2

    forge(saved, edit, seal=False)
    refuse(saved, f"'{W}'", "digest")


def test_edited_metadata_without_a_new_seal(saved: Path, forge: Forge):
    forge(saved, _adapter_document(base_name="another/base"), seal=False)
    refuse(saved, "checksum")


def test_flipped_bits_are_refused_or_harmless(saved: Path):
    """No flipped bit changes what an adapter says: it is refused, or (padding) means the same."""
    original = saved.read_bytes()
    expected = Adapter.load(saved)
    accepted = 0
    data = 8 + int.from_bytes(original[:8], "little")
    places = [*range(8), *range(8, data, 5), *range(data - 8, len(original))]
    for position in places:
        damaged = bytearray(original)
        damaged[position] ^= 1 << (position % 7)  # with stride 5, every bit of a byte gets its turn
        saved.write_bytes(damaged)
        try:
            got = Adapter.load(saved)
        except AdapterFormatError:
            continue
        accepted += 1
        assert got.equals(expected), position
        assert got.metadata == expected.metadata, position
        assert got.name == expected.name, position
    assert accepted < 8  # at most the padding


def test_truncation_is_refused(saved: Path):
    original = saved.read_bytes()
    data = 8 + int.from_bytes(original[:8], "little")
    for length in [*range(10), *range(10, data, 97), *range(data - 2, len(original))]:
        saved.write_bytes(original[:length])
        with pytest.raises(AdapterFormatError):
            Adapter.load(saved, check="lazy")


def test_bytes_after_the_end(saved: Path):
    saved.write_bytes(saved.read_bytes() + b"\0")
    refuse(saved, "1 bytes follow the last tensor")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"abc", "ends inside the 8-byte header length"),
        (struct.pack("<Q", 2**63), "above the limit"),
        (struct.pack("<Q", 100_000_001) + b"{}", "above the limit"),
        (struct.pack("<Q", 99_999_999) + b"{}", "more than the file's 10 bytes"),
        (struct.pack("<Q", 2) + b"\xff\xff", "not UTF-8"),
        (struct.pack("<Q", 2) + b"[]", "a list, wanted an object"),
        (struct.pack("<Q", 2) + b"{}", "no metadata"),
        (struct.pack("<Q", 21) + b'{"__metadata__": 123}', "int 123, wanted an object"),
        (struct.pack("<Q", 26) + b'{"__metadata__": {"a": 1}}', "metadata 'a' is int 1"),
        (struct.pack("<Q", 14) + b'{"a":1,"a": 2}', "'a' appears twice"),
        (struct.pack("<Q", 200_000) + DEEP.encode(), "nested too deeply"),
    ],
    ids=[
        "empty", "short", "length-2^63", "length-limit", "length-past-file", "not-utf8", "list",
        "no-metadata", "metadata-number", "metadata-value", "twice", "deep",
    ],
)  # fmt: skip
def test_hostile_headers(tmp_path: Path, content: bytes, message: str):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    refuse(file, message)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_not_opened(tmp_path: Path, protocol: int):
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(pickle.dumps({"w": Bomb()}, protocol))
    refuse(file, "pickle", "never opened")


def test_a_torch_save_is_not_opened(tmp_path: Path):
    file = tmp_path / "adapter.safetensors"
    torch.save({"w": Bomb()}, file)
    refuse(file, "pickle")


def test_an_ordinary_safetensors_file_is_not_an_adapter(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(2)}, file)
    refuse(file, "no metadata", "'w'")
    save_file({"w": torch.ones(2)}, file, {"format": "pt"})
    refuse(file, "'format' is 'pt'", "not an adapter")


def _rewritten(saved: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """Edit the raw header, keeping its length and the data."""
    raw = saved.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    saved.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return saved


IDX, VAL = f"diffs/{W}/indices", f"diffs/{W}/values"
TABLE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "overlap": (lambda h: h[VAL].update(data_offsets=h[IDX]["data_offsets"]), "overlaps"),
    "swapped": (lambda h: h[IDX]["data_offsets"].reverse(), "needs"),
    "past-end": (lambda h: h[IDX].update(data_offsets=[0, 2**40]), "cut off"),
    "negative": (lambda h: h[IDX].update(data_offsets=[-4, 0]), "-4"),
    "one-offset": (lambda h: h[IDX].update(data_offsets=[0]), "not a pair"),
    "wrong-size": (lambda h: h[IDX].update(dtype="I64"), "needs"),
    "unknown-dtype": (lambda h: h[IDX].update(dtype="F8_E4M3"), "'F8_E4M3'"),
    "dtype-list": (lambda h: h[IDX].update(dtype=["I32"]), "a list, wanted a string"),
    "huge-shape": (lambda h: h[IDX].update(shape=[2**40, 2**40]), "overflows"),
    "no-offsets": (lambda h: h[IDX].pop("data_offsets"), "lacks 'data_offsets'"),
    "extra-field": (lambda h: h[IDX].update(stride=1), "unknown field 'stride'"),
    "not-an-object": (lambda h: h.update({IDX: 3}), "int 3, wanted an object"),
    "same-size-swap": (
        lambda h: h.update({
            IDX: {**h[IDX], "data_offsets": h[VAL]["data_offsets"]},
            VAL: {**h[VAL], "data_offsets": h[IDX]["data_offsets"]},
        }),
        "",  # values read as indices and the other way round: whichever check meets it first
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_tensor_table(saved: Path, case: str):
    edit, message = TABLE[case]
    refuse(_rewritten(saved, edit), message, W)


def test_misaligned_tensor(saved: Path):
    raw = saved.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    text = raw[8 : 8 + length].rstrip(b" ")
    text += b" " * (-(len(text) + 1) % 8)  # the data now starts one byte before a multiple of 8
    saved.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    refuse(saved, "not a multiple of its item size")


def test_a_header_is_believed_about_nothing_it_could_allocate():
    """A few hundred bytes that claim terabytes are refused before any allocation."""
    header = {
        "__metadata__": {"format": "sparseft-adapter", "format_version": "1", "adapter": "{}",
                         "tensors": "{}", "fingerprint": "null", "checksum": "0" * 32},
        "diffs/w/values": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
    }  # fmt: skip
    text = json.dumps(header).encode()
    head = struct.pack("<Q", len(text)) + text
    with pytest.raises(AdapterFormatError, match="cut off"):
        parse_header(head, len(head), source="claim")


def test_lazy_load_refuses_only_the_bad_tensor(saved: Path, adapter: Adapter, forge: Forge):
    forge(saved, _values(torch.tensor([1.0, math.nan])))
    lazy = Adapter.load(saved, check="lazy")
    assert lazy["scale"].equals(adapter["scale"])
    assert lazy.header(W).nnz == 2
    for _ in range(2):  # still refused the second time: nothing unchecked is kept
        with pytest.raises(AdapterFormatError, match=W):
            lazy[W]
    with pytest.raises(AdapterFormatError, match=W):
        _ = lazy.digest
