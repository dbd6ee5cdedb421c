"""Compact files: the same adapter in fewer bytes, one byte string for each list of positions."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from sparseft.adapter import Adapter
from sparseft.cli.main import main
from sparseft.diff import SparseDiff, SparsePattern, index_dtype_for
from sparseft.errors import AdapterFormatError, DiffError
from sparseft.io.gaps import GapsError, decode_gaps, encode_gaps

W = "layer.0.weight"
IDX = f"diffs/{W}/indices"
Forge = Callable[..., Path]


def reference(positions: list[int]) -> bytes:
    """The encoding as the format's text has it, number by number."""
    low, middle, high = b"", b"", b""
    for before, here in itertools.pairwise([-1, *positions]):
        gap = here - before - 1
        low += min(gap, 255).to_bytes(1, "little")
        if gap >= 255:
            middle += min(gap - 255, 65_535).to_bytes(2, "little")
        if gap >= 255 + 65_535:
            high += (gap - 255 - 65_535).to_bytes(8, "little")
    return low + middle + high


def tensor_of(positions: list[int], numel: int) -> Tensor:
    return torch.tensor(positions, dtype=index_dtype_for(numel))


def stream_of(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()


# Around every edge: the byte's escape, the word's, and what no int32 holds.
EDGES = [0, 1, 254, 255, 256, 65_789, 65_790, 65_791, 2**31, 2**40]
steps = st.lists(st.sampled_from(EDGES) | st.integers(0, 300), max_size=40)


@settings(max_examples=300, deadline=None)
@given(steps=steps, room=st.sampled_from([0, 1, 2**31]))
def test_any_positions_come_back(steps: list[int], room: int):
    positions = [p + i for i, p in enumerate(itertools.accumulate(steps))]
    numel = (positions[-1] + 1 if positions else 0) + room
    indices = tensor_of(positions, numel)
    wanted = reference(positions)
    stream = encode_gaps(indices)
    if stream is None:
        assert len(wanted) >= indices.nbytes
    else:
        assert bytes(stream.numpy()) == wanted
        assert len(wanted) < indices.nbytes
    back = decode_gaps(stream_of(wanted), len(positions), numel, indices.dtype)
    assert back.dtype == indices.dtype
    assert torch.equal(back, indices)
    if positions:
        with pytest.raises(GapsError, match="out of range"):
            decode_gaps(stream_of(wanted), len(positions), positions[-1], indices.dtype)


@settings(max_examples=400, deadline=None)
@given(
    data=st.lists(st.sampled_from([0, 1, 7, 254, 255]), max_size=24).map(bytes),
    nnz=st.integers(0, 12),
    numel=st.sampled_from([0, 1, 20, 4000, 2**31 - 1, 2**31, 2**62]),
)
def test_any_bytes_are_positions_or_refused(data: bytes, nnz: int, numel: int):
    """What is accepted is sorted, unique, in range, and has no other spelling."""
    dtype = index_dtype_for(numel)
    try:
        indices = decode_gaps(stream_of(data), nnz, numel, dtype)
    except GapsError:
        return
    places = indices.tolist()
    assert places == sorted(set(places))
    assert len(places) == nnz
    assert all(0 <= p < numel for p in places)
    assert reference(places) == data


@pytest.mark.parametrize(
    ("data", "nnz", "numel", "message"),
    [
        (b"", 1, 9, "0 bytes for 1 entries: the gaps are cut off"),
        (b"\1\2", 3, 99, "2 bytes for 3 entries"),
        (b"\1\xff", 2, 999, "1 of 2 gaps need 4: cut off"),
        (b"\xff\1", 1, 999, "need 3: cut off"),
        (b"\xff\xff\xff" + b"\0" * 7, 1, 2**40, "10 bytes, but 1 gaps need 11"),
        (b"\xff\1\0\0", 1, 999, "4 bytes, but 1 gaps need 3"),
        (b"\0\0", 1, 9, "2 bytes, but 1 gaps need 1"),
        (b"\1", 0, 9, "1 bytes, but 0 gaps need 0"),
        (b"\4\4", 2, 9, r"indices\[1\] = 9, but the tensor has 9 entries"),
        (b"\xff" * 3 + b"\xff" * 8, 1, 2**62, r"indices\[0\] = 18446744073709617405"),
        (b"\xff" * 9 + b"\xff" * 24, 3, 2**62, r"indices\[2\] = 55340232221128852217"),
        (b"\xff\xff\xff" + b"\0" * 8, 1, 65_790, r"indices\[0\] = 65790"),
    ],
    ids=[
        "empty", "short", "no-word", "half-word", "half-long", "trailing", "trailing-byte",
        "for-nothing", "one-past", "largest", "sum-past-64-bits", "past-int32-sum",
    ],
)  # fmt: skip
def test_bad_streams(data: bytes, nnz: int, numel: int, message: str):
    with pytest.raises(GapsError, match=message):
        decode_gaps(stream_of(data), nnz, numel, index_dtype_for(numel))


def spread(shape: tuple[int, int], density: float, seed: int, *, clustered: bool) -> SparsePattern:
    """A random mask, or one whose rows hold eight times as many entries in a tenth of them."""
    rng = torch.Generator().manual_seed(seed)
    chance = torch.full((shape[0], 1), density)
    if clustered:
        full = torch.rand(shape[0], 1, generator=rng) < 0.1
        chance = torch.where(full, min(8 * density, 1.0), density * 2 / 9)
    return SparsePattern.from_mask(torch.rand(shape, generator=rng) < chance)


@pytest.mark.parametrize("clustered", [False, True], ids=["random", "clustered"])
@pytest.mark.parametrize("density", [0.01, 0.0276, 0.1])
def test_bytes_per_entry(tmp_path: Path, density: float, clustered: bool):
    pattern = spread((1000, 768), density, 3, clustered=clustered)
    values = torch.randn(pattern.nnz, generator=torch.Generator().manual_seed(1))
    adapter = Adapter({"w": SparseDiff.from_pattern(pattern, values)})
    for dtype, most in ((torch.float32, 5.4), (torch.bfloat16, 3.4)):
        file = adapter.save(tmp_path / "c", compact=True, dtype=dtype)
        header = int.from_bytes(file.read_bytes()[:8], "little") + 8
        assert (file.stat().st_size - header) / pattern.nnz <= most
        loaded = Adapter.load(file)
        assert loaded.digest == adapter.to(dtype=dtype).digest
        assert loaded.summary().bytes_per_entry <= most


def test_both_encodings_are_one_adapter(adapter: Adapter, saved: Path, tmp_path: Path):
    file = adapter.save(tmp_path / "compact", compact=True)
    assert file.stat().st_size < saved.stat().st_size
    for check in ("full", "lazy"):
        loaded = Adapter.load(file, check=check)
        assert loaded.equals(adapter)
        assert (loaded.digest, loaded.name) == (adapter.digest, adapter.name)
        assert loaded.metadata == adapter.metadata
        assert loaded.nbytes == adapter.nbytes
    # There and back, each the same bytes as the first time.
    assert Adapter.load(file).save(tmp_path / "plain").read_bytes() == saved.read_bytes()
    again = Adapter.load(saved).save(tmp_path / "again", compact=True)
    assert again.read_bytes() == file.read_bytes()
    with safe_open(file, "pt") as stock:  # any safetensors reader opens it
        assert stock.metadata()["format_version"] == "2"
        assert stock.get_tensor(IDX).dtype == torch.uint8
    loaded = Adapter.load(file)
    loaded.save(file, compact=True)  # onto the file it is mapped from
    assert file.read_bytes() == again.read_bytes()


def test_a_diff_that_gaps_do_not_help_stays_as_it_is(tmp_path: Path, header_of: Any):
    far = SparseDiff(torch.tensor([5, 2**27]).int(), torch.ones(2), torch.Size((2**28,)))
    near = SparseDiff.from_dense(torch.ones(9))
    mixed = Adapter({"far": far, "near": near})
    file = mixed.save(tmp_path / "mixed", compact=True)
    header = header_of(file)
    assert header["diffs/far/indices"]["dtype"] == "I32"
    assert header["diffs/near/indices"] | {"data_offsets": 0} == {
        "dtype": "U8", "shape": [9], "data_offsets": 0,
    }  # fmt: skip
    loaded = Adapter.load(file)
    assert loaded.equals(mixed)
    assert [loaded.header(n).encoding for n in ("far", "near")] == ["plain", "gaps"]
    # Nothing gained: the file of before, which every release reads.
    for adapter in (Adapter({"far": far}), Adapter({}), Adapter({}, dense={"h": torch.ones(3)})):
        plain = adapter.save(tmp_path / "plain").read_bytes()
        assert adapter.save(tmp_path / "same", compact=True).read_bytes() == plain


def test_past_int32(tmp_path: Path):
    shape = torch.Size((65_536, 40_000))
    places = torch.tensor([0, 3, 9, 2**31 - 1, 2**31, shape.numel() - 1])
    adapter = Adapter({"embed": SparseDiff(places, torch.ones(6), shape)})
    file = adapter.save(tmp_path, compact=True)
    loaded = Adapter.load(file)
    assert loaded.header("embed").encoding == "gaps"
    assert loaded.equals(adapter)
    assert loaded["embed"].indices.dtype == torch.int64


def test_values_may_be_cast_while_saving(adapter: Adapter, tmp_path: Path):
    half = adapter.to(dtype=torch.bfloat16)
    for compact in (False, True):
        file = adapter.save(tmp_path, dtype=torch.bfloat16, compact=compact)
        assert Adapter.load(file).equals(half)
    assert {d.dtype for d in adapter.values()} == {torch.float32, torch.bfloat16}  # as it was
    large = Adapter({"w": SparseDiff.from_dense(torch.tensor([1e30]))})
    before = file.read_bytes()
    with pytest.raises(DiffError, match=r"cast from torch\.float32 to torch\.float16 overflows"):
        large.save(file, dtype=torch.float16)
    assert file.read_bytes() == before


def _stream(data: bytes, nnz: int, shape: list[int] | None = None) -> Callable[..., None]:
    """Replace the tensor's indices by these bytes, and its values by as many ones."""

    def edit(tensors: dict[str, Tensor], listing: dict[str, Any], metadata: dict[str, str]) -> None:
        tensors[IDX] = stream_of(data)
        tensors[f"diffs/{W}/values"] = torch.ones(nnz)
        listing["diffs"][W]["nnz"] = nnz
        if shape is not None:
            listing["diffs"][W]["shape"] = shape

    return edit


def _indices(values: Tensor) -> Callable[..., None]:
    def edit(tensors: dict[str, Tensor], listing: dict[str, Any], metadata: dict[str, str]) -> None:
        tensors[IDX] = values
        tensors[f"diffs/{W}/values"] = torch.ones(len(values))
        listing["diffs"][W]["nnz"] = len(values)

    return edit


def _version(version: str) -> Callable[..., None]:
    def edit(tensors: dict[str, Tensor], listing: dict[str, Any], metadata: dict[str, str]) -> None:
        metadata["format_version"] = version

    return edit


HOSTILE = {
    "past-end": (_stream(b"\1\x0e", 2), "indices[1] = 16, but the tensor has 15 entries"),
    "fewer-bytes": (_stream(b"\1\2", 3), "take 2 bytes as gaps, wanted 3 or more"),
    "no-smaller": (_stream(b"\1" + b"\0" * 7, 2), "wanted 2 or more (one for each entry) and less"),
    "trailing": (_stream(b"\1\2\3", 2), "3 bytes, but 2 gaps need 2"),
    "cut-escape": (_stream(b"\1\xff\0", 2, [999]), "1 of 2 gaps need 4: cut off"),
    "wraps": (
        _stream(b"\0\0\0\xff\xff\xff" + b"\xff" * 8, 4, [2**30]),
        "indices[3] = 18446744073709617408",
    ),
    "two-dimensional": (
        lambda t, listing, m: t.update({IDX: torch.zeros(3, 3).byte()}),
        "has shape [3, 3], wanted [9]",
    ),
    "not-gaps": (_indices(torch.arange(4).int()), "indices as gaps where those are smaller"),
    "not-gaps-unsorted": (_indices(torch.tensor([3, 1]).int()), "not ascending"),
    "wrong-dtype": (_indices(torch.arange(4)), "I64, wanted I32"),
    "as-version-1": (_version("1"), "U8, wanted I32"),
    "as-version-3": (_version("3"), "'3', this release reads '1' and '2'"),
}


@pytest.fixture
def compact(adapter: Adapter, tmp_path: Path) -> Path:
    return adapter.save(tmp_path / "compact", compact=True)


def refuse(file: Path, *parts: str) -> None:
    messages = set()
    for check in ("full", "lazy"):
        with pytest.raises(AdapterFormatError) as caught:
            list(Adapter.load(file, check=check).values())
        messages.add(str(caught.value))
    (message,) = messages
    for part in (str(file), *parts):
        assert part in message


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_compact_files(compact: Path, forge: Forge, case: str):
    edit, message = HOSTILE[case]
    forge(compact, edit, seal=True)
    refuse(compact, message, *([] if case.startswith("as-version") else [f"'{W}'"]))


def test_a_changed_gap_fails_the_digest(compact: Path, forge: Forge):
    def edit(tensors: dict[str, Tensor], listing: dict[str, Any], metadata: dict[str, str]) -> None:
        tensors[IDX][-1] ^= 1

    forge(compact, edit, seal=False)
    refuse(compact, W)


def test_flipped_bits_and_cuts_are_refused(compact: Path):
    original = compact.read_bytes()
    expected = Adapter.load(compact)
    data = 8 + int.from_bytes(original[:8], "little")
    for position in [*range(8, data, 11), *range(data - 8, len(original))]:
        damaged = bytearray(original)
        damaged[position] ^= 1 << (position % 7)
        compact.write_bytes(damaged)
        try:
            got = Adapter.load(compact)
        except AdapterFormatError:
            continue
        assert got.equals(expected), position  # padding alone may differ
        assert data - 8 <= position < data or original[position : position + 1].isspace()
    for length in [*range(8, data, 199), *range(data, len(original))]:
        compact.write_bytes(original[:length])
        with pytest.raises(AdapterFormatError):
            Adapter.load(compact, check="lazy")


def test_the_summary_says_how_it_is_stored(compact: Path, saved: Path, adapter: Adapter):
    small, plain = Adapter.load(compact).summary(), Adapter.load(saved).summary()
    assert (small.encoding, plain.encoding, adapter.summary().encoding) == (
        "gaps",
        "plain",
        "plain",
    )
    assert small.nbytes == plain.nbytes == plain.stored_nbytes == adapter.nbytes
    assert small.stored_nbytes == plain.stored_nbytes - 3 * adapter.nnz
    assert small.bytes_per_entry == pytest.approx(plain.bytes_per_entry - 3)
    assert {r.encoding for r in small.tensors} == {"gaps", "plain"}  # the head is dense
    assert math.isclose(Adapter({}).summary().bytes_per_entry, 0.0)


def test_inspect_says_it_too(compact: Path, saved: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(compact), str(saved), "--json"]) == 0
    small, plain = json.loads(capsys.readouterr().out)["adapters"]
    assert (small["encoding"], plain["encoding"]) == ("gaps", "plain")
    assert small["digest"] == plain["digest"]
    assert small["bytes_per_entry"] == pytest.approx(plain["bytes_per_entry"] - 3)
    assert {t["name"]: t["stored_nbytes"] for t in small["tensors"]}["layer.0.bias"] == 2 * 3
    assert main(["inspect", str(compact)]) == 0
    text = capsys.readouterr().out
    assert "compact (gaps" in text
    assert re.search(r"layer\.0\.bias .* 3\.00 ", text)
    assert f"{small['bytes_per_entry']:.2f} bytes per entry" in text
