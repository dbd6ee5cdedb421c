"""The fast checks of a load answer as the slow ones do, and threads change nothing but the time."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest
import torch

import sparseft.io.load as load
from sparseft._integrity import find_index_fault, find_value_fault
from sparseft.adapter import Adapter
from sparseft.diff import SparseDiff, SparsePattern
from sparseft.errors import AdapterFormatError
from sparseft.io import verify
from sparseft.io.verify import index_fault, read_all, value_fault

PIECE = verify._PIECE
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, PIECE - 1, PIECE, PIECE + 1, PIECE + 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype: torch.dtype, place: int, bad: float):
    limits = torch.finfo(dtype)
    values = torch.full((PIECE + 7,), limits.max, dtype=dtype)
    values[::2] = limits.min
    values[5] = limits.smallest_normal / 2
    assert value_fault(values) is None
    values[place] = bad
    assert value_fault(values) == find_value_fault(values)
    assert f"entry {place} is {bad}" in str(value_fault(values))
    assert value_fault(values.view(-1, 1)) == find_value_fault(values)


@pytest.mark.parametrize("n", [0, 1, 2, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 3])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_indices(n: int, dtype: torch.dtype):
    indices = torch.arange(0, 2 * n, 2, dtype=dtype)
    assert index_fault(indices, 2 * n) is None
    damage = [(i, -1) for i in (0, 1, PIECE - 1, PIECE, PIECE + 1, n - 1) if 0 <= i < n]
    damage += [(i, int(indices[i - 1])) for i, _ in damage if i]
    damage += [(n - 1, 2 * n)] if n else []
    for place, value in damage:
        wrong = indices.clone()
        wrong[place] = value
        fault = index_fault(wrong, 2 * n)
        assert fault is not None, (place, value)
        assert fault == find_index_fault(wrong, 2 * n)


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_cores", lambda: 4)


def test_large_reads_are_shared_among_threads(four_cores: None):
    together = threading.Barrier(4, timeout=20)  # passed only if four threads are inside at once
    seen: list[str] = []

    def read(name: str) -> str:
        seen.append(name)
        if len(seen) <= 4:
            together.wait()
        return name.upper()

    sizes = {"a": 1, "b": 5, "c": 3, "d": verify.WORTH_THREADS, "e": 2}
    assert read_all(read, sizes) == {n: n.upper() for n in sizes}
    assert list(read_all(read, sizes)) == list(sizes)
    assert set(seen[:4]) == {"d", "b", "c", "e"}  # the largest first


def test_small_reads_start_no_thread(four_cores: None):
    here = threading.get_ident()
    assert set(read_all(lambda _: threading.get_ident(), {"a": 1, "b": 1}).values()) == {here}
    assert read_all(str, {}) == {}


def test_the_first_fault_by_name_is_the_one_that_is_told(four_cores: None):
    def read(name: str) -> str:
        if name in ("b", "c"):
            raise ValueError(name)
        return name

    for _ in range(20):
        with pytest.raises(ValueError, match="^b$"):
            read_all(read, {"a": 1, "b": 1, "c": verify.WORTH_THREADS})


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Six tensors, 6 MiB in all: more than what is worth threads."""
    n = 1 << 17
    one = SparseDiff.from_pattern(
        SparsePattern._trusted(torch.arange(n, dtype=torch.int32), (n,)), torch.ones(n)
    )
    return Adapter({f"w{i}": one for i in range(6)}).save(tmp_path / "large")


@pytest.mark.parametrize("compact", [False, True])
def test_threads_read_the_same(large: Path, four_cores: None, compact: bool):
    adapter = Adapter.load(large)
    file = adapter.save(large, compact=compact)
    loaded = Adapter.load(file)
    assert loaded.equals(adapter)
    assert loaded.digest == adapter.digest


def test_going_through_a_lazy_adapter_reads_the_rest_at_once(
    large: Path, four_cores: None, monkeypatch: pytest.MonkeyPatch
):
    read: list[str] = []
    diff = load.MappedFile.diff
    monkeypatch.setattr(
        load.MappedFile, "diff", lambda self, name: (read.append(name), diff(self, name))[1]
    )
    lazy = Adapter.load(large, check="lazy")
    for name in ("w3", "w0"):  # here and there: only those
        assert lazy[name].nnz
    assert read == ["w3", "w0"]
    lazy = Adapter.load(large, check="lazy")
    read.clear()
    walk = iter(lazy.values())
    next(walk)
    assert read == ["w0"]
    next(walk)
    assert sorted(read) == [f"w{i}" for i in range(6)]
    list(walk)
    assert len(read) == 6


def test_reading_ahead_refuses_only_the_bad_tensor(large: Path, four_cores: None):
    raw = bytearray(large.read_bytes())
    raw[-1] ^= 1  # the last value of w5
    large.write_bytes(raw)
    lazy = Adapter.load(large, check="lazy")
    walk = iter(lazy.items())
    assert [next(walk)[0] for _ in range(5)] == [f"w{i}" for i in range(5)]
    for _ in range(2):
        with pytest.raises(AdapterFormatError, match="'w5': digest"):
            lazy["w5"]
    with pytest.raises(AdapterFormatError, match="'w5': digest"):
        Adapter.load(large)
