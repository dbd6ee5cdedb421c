"""SparsePattern and SparseDiff: what they accept, what they refuse, and that they lose no bit."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparseft._integrity as integrity
from sparseft.diff import SparseDiff, SparsePattern, as_pattern, index_dtype_for
from sparseft.errors import DiffError, MaskError

HUGE = (65_536, 40_000)  # 2.6e9 entries: past int32; nothing here may allocate it
SHAPES = st.lists(st.integers(0, 7), min_size=0, max_size=4).map(tuple)
DIFF_DIGEST = "85a9c2bd0dc0992083d4d71465dec6e0"
PATTERN_DIGEST = "b5e5645ed6dae3811a1e001809565c15"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def masks(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(SHAPES)
    n = math.prod(shape)
    bits = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    return torch.tensor(bits, dtype=torch.bool).reshape(shape)


@given(mask=masks())
def test_mask_round_trip(mask: torch.Tensor):
    pattern = SparsePattern.from_mask(mask)
    assert torch.equal(pattern.to_mask(), mask)
    assert pattern.shape == mask.shape
    assert pattern.nnz == int(mask.sum())
    assert pattern.indices.dtype == torch.int32
    # The validating constructor accepts what from_mask made unchecked.
    assert SparsePattern(pattern.indices, pattern.shape).equals(pattern)
    again = SparsePattern.from_indices(pattern.indices.flip(0).long(), mask.shape, sort=True)
    assert again.equals(pattern)
    assert again.digest() == pattern.digest()


@given(mask=masks(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9))
def test_dense_round_trip(mask: torch.Tensor, dtype: torch.dtype, seed: int):
    delta = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    diff = SparseDiff.from_dense(delta, mask)
    assert torch.equal(diff.to_dense(), torch.where(mask, delta, 0))
    assert diff.pattern.equals(SparsePattern.from_mask(mask))
    assert diff.equals(SparseDiff(diff.indices, diff.values, diff.shape))


def test_from_mask_in_several_pieces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(integrity, "_CPU_CHUNK", 2)  # from_mask walks 16 pieces at a time
    mask = torch.rand(13, 17, generator=torch.Generator().manual_seed(0)) < 0.3
    expected = mask.reshape(-1).nonzero().view(-1).int()
    assert torch.equal(SparsePattern.from_mask(mask).indices, expected)
    assert torch.equal(SparsePattern.from_mask(mask.t()).to_mask(), mask.t())  # not contiguous


@pytest.mark.parametrize(
    ("indices", "fault"),
    [
        (i32(0, 2, 1), "not ascending: indices[1] = 2, indices[2] = 1"),
        (i32(0, 3, 3), "a duplicate: indices[1] = 3, indices[2] = 3"),
        (i32(-1, 3), "indices[0] = -1 is negative"),
        (i32(0, 12), "indices[1] = 12, but the tensor has 12 entries"),
        (i32(2**31 - 1, -(2**31)), "not ascending"),  # their difference overflows int32
        (torch.tensor([0, 1]), "indices is torch.int64, wanted torch.int32"),
        (torch.tensor([0.0, 1.0]), "indices is torch.float32, wanted torch.int32"),
        (i32(0, 1).view(1, 2), "indices has shape (1, 2), wanted (nnz,)"),
    ],
    ids=["unsorted", "duplicate", "negative", "past-end", "wraps", "int64", "float", "2-d"],
)
def test_bad_indices(indices: torch.Tensor, fault: str):
    with pytest.raises(MaskError) as caught:
        SparsePattern(indices, torch.Size((3, 4)))
    assert fault in str(caught.value)
    with pytest.raises(DiffError) as caught_diff:
        SparseDiff(indices, torch.zeros(indices.shape), torch.Size((3, 4)))
    assert fault in str(caught_diff.value)


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
@pytest.mark.parametrize("place", [0, 1, 2, 3, 5, 8])
def test_fault_is_found_at_every_piece_edge(
    monkeypatch: pytest.MonkeyPatch, chunk: int, place: int
):
    monkeypatch.setattr(integrity, "_CPU_CHUNK", chunk)
    indices = torch.arange(10, dtype=torch.int32)
    assert integrity.find_index_fault(indices, 10) is None
    indices[place + 1] = indices[place]
    assert f"indices[{place}]" in (integrity.find_index_fault(indices, 10) or "")
    values = torch.zeros(10)
    assert integrity.find_value_fault(values) is None
    values[place] = math.nan
    assert integrity.find_value_fault(values) == f"not finite: entry {place} is nan"


def test_wild_positions_do_not_wrap_into_range():
    # 2**32 + 1 narrowed to int32 would be 1.
    with pytest.raises(MaskError, match="4294967297"):
        SparsePattern.from_indices(torch.tensor([2**32 + 1]), (3, 4))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_from_indices_takes_any_integer(dtype: torch.dtype):
    given_indices = torch.tensor([7, 1, 3], dtype=dtype)
    pattern = SparsePattern.from_indices(given_indices, (3, 4), sort=True)
    assert pattern.indices.tolist() == [1, 3, 7]
    assert pattern.indices.dtype == torch.int32
    with pytest.raises(MaskError, match=r"not ascending.*sort=True"):
        SparsePattern.from_indices(given_indices, (3, 4))


def test_from_indices_copies():
    mine = i32(1, 2)
    pattern = SparsePattern.from_indices(mine, (3,))
    mine[0] = 5
    assert pattern.indices.tolist() == [1, 2]


@pytest.mark.parametrize("bad", [torch.tensor([True]), torch.tensor([0.5]), torch.tensor(3)])
def test_from_indices_refuses(bad: torch.Tensor):
    with pytest.raises(MaskError, match="wanted"):
        SparsePattern.from_indices(bad, (3, 4))


@pytest.mark.parametrize("shape", [(-1, 4), (2**32, 2**32)])
def test_impossible_shapes(shape: tuple[int, ...]):
    with pytest.raises(MaskError, match="shape"):
        SparsePattern(i32(), torch.Size(shape))
    with pytest.raises(DiffError, match="shape"):
        SparseDiff(i32(), torch.empty(0), torch.Size(shape))


def test_index_dtype_changes_at_2_to_31():
    assert index_dtype_for(2**31 - 1) == torch.int32
    assert index_dtype_for(2**31) == torch.int64
    last = math.prod(HUGE) - 1
    diff = SparseDiff(torch.tensor([0, last]), torch.ones(2), torch.Size(HUGE))
    assert diff.numel == last + 1
    assert diff.nbytes == 2 * (8 + 4)
    assert diff.pattern.col_indices().tolist() == [0, 39_999]
    assert diff.pattern.row_offsets()[[0, 1, 65_535, 65_536]].tolist() == [0, 1, 1, 2]
    with pytest.raises(DiffError, match=r"torch\.int32, wanted torch\.int64"):
        SparseDiff(i32(0), torch.ones(1), torch.Size(HUGE))
    with pytest.raises(MaskError, match="out of range"):
        SparsePattern(torch.tensor([last + 1]), torch.Size(HUGE))


@settings(max_examples=50)
@given(mask=masks())
def test_csr_words(mask: torch.Tensor):
    pattern = SparsePattern.from_mask(mask)
    rows, cols = pattern.matrix_shape
    matrix = mask.reshape(rows, cols)
    counts = matrix.sum(dim=1)
    assert pattern.row_offsets().tolist() == [0, *counts.cumsum(0).tolist()]
    assert pattern.col_indices().tolist() == (
        matrix.nonzero()[:, 1].tolist() if mask.numel() else []
    )
    assert pattern.row_offsets() is pattern.row_offsets()  # kept
    if len(mask.shape) >= 2:
        assert rows == mask.shape[0]


def test_0d():
    diff = SparseDiff.from_dense(torch.tensor(2.5))
    assert diff.shape == ()
    assert diff.indices.tolist() == [0]
    assert diff.to_dense().shape == ()
    assert SparsePattern.from_mask(torch.tensor(False)).nnz == 0


def test_equals_is_bitwise_and_digest_agrees():
    make = lambda values, **kw: SparseDiff(i32(0, 3), values, torch.Size((2, 2)), **kw)  # noqa: E731
    base = make(torch.tensor([0.0, 1.0]))
    others = {
        "sign of zero": make(torch.tensor([-0.0, 1.0])),
        "dtype": make(torch.tensor([0.0, 1.0]).half()),
        "mode": make(torch.tensor([0.0, 1.0]), mode="set"),
        "shape": SparseDiff(i32(0, 3), torch.tensor([0.0, 1.0]), torch.Size((4,))),
        "place": SparseDiff(i32(0, 2), torch.tensor([0.0, 1.0]), torch.Size((2, 2))),
        "last bit": make(torch.tensor([0.0, 1.0 + 2**-23])),
    }
    same = make(torch.tensor([0.0, 1.0]))
    assert base.equals(same)
    assert base.digest() == same.digest()
    for what, other in others.items():
        assert not base.equals(other), what
        assert base.digest() != other.digest(), what


def test_digest_is_fixed():
    # Adapters on disk carry these digests: a change of the recipe is a change of the format.
    diff = SparseDiff(i32(0, 3), torch.tensor([1.0, -2.0]), torch.Size((2, 2)))
    assert diff.digest() == DIFF_DIGEST
    assert diff.pattern.digest() == PATTERN_DIGEST


@pytest.mark.parametrize(
    ("values", "kwargs", "message"),
    [
        (torch.tensor([1.0, math.nan]), {}, "entry 1 is nan"),
        (torch.tensor([-math.inf, 1.0]), {}, "entry 0 is -inf"),
        (torch.tensor([1, 2]), {}, "values is torch.int64"),
        (torch.tensor([1j, 2j]), {}, "values is torch.complex64"),
        (torch.zeros(3), {}, "values has shape (3,) but indices has (2,)"),
        (torch.zeros(2, 1), {}, "values has shape (2, 1)"),
        (torch.zeros(2), {"mode": "replace"}, "mode is 'replace', wanted one of 'add', 'set'"),
        (torch.zeros(2, device="meta"), {}, "values is on meta but indices on cpu"),
    ],
    ids=["nan", "inf", "int", "complex", "length", "2-d", "mode", "device"],
)
def test_bad_values(values: torch.Tensor, kwargs: dict[str, str], message: str):
    with pytest.raises(DiffError) as caught:
        SparseDiff(i32(0, 1), values, torch.Size((2, 2)), **kwargs)  # type: ignore[arg-type]
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="wanted|but|finite"):  # also what callers would expect
        SparseDiff(i32(0, 1), values, torch.Size((2, 2)), **kwargs)  # type: ignore[arg-type]


def test_from_dense_defaults_to_nonzero_and_copies():
    delta = torch.tensor([[0.0, 1.0], [-2.0, 0.0]], requires_grad=True)
    diff = SparseDiff.from_dense(delta)
    assert diff.indices.tolist() == [1, 2]
    assert not diff.values.requires_grad
    with torch.no_grad():
        delta.fill_(9.0)
    assert diff.values.tolist() == [1.0, -2.0]
    with pytest.raises(MaskError, match="transposed"):
        SparseDiff.from_dense(torch.zeros(2, 3), torch.ones(3, 2, dtype=torch.bool))


def test_to_casts_values_only_and_refuses_overflow():
    diff = SparseDiff.from_dense(torch.tensor([1.0, 70_000.0]))
    assert diff.to() is diff
    assert diff.to("cpu", torch.float32) is diff
    narrow = diff.to(dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert narrow.indices is diff.indices
    with pytest.raises(DiffError, match="overflows; not finite: entry 1"):
        diff.to(dtype=torch.float16)


def test_frozen_copyable_and_readable():
    diff = SparseDiff.from_dense(torch.tensor([[0.0, 0.5]]))
    with pytest.raises(AttributeError):
        diff.values = torch.zeros(1)  # type: ignore[misc]
    for other in (copy.deepcopy(diff), pickle.loads(pickle.dumps(diff))):
        assert other.equals(diff)
        assert other.values.data_ptr() != diff.values.data_ptr()
    assert "nnz=1 of 2 (50.000%)" in repr(diff)
    assert "nnz=1 of 2 (50.000%)" in repr(diff.pattern)


def test_from_pattern_keeps_the_patterns_caches():
    pattern = SparsePattern.from_mask(torch.eye(3, dtype=torch.bool))
    offsets = pattern.row_offsets()
    diff = SparseDiff.from_pattern(pattern, torch.ones(3))
    assert diff.pattern.row_offsets() is offsets
    with pytest.raises(DiffError, match="indices has"):
        SparseDiff.from_pattern(pattern, torch.ones(2))


def test_as_pattern_names_what_is_wrong():
    mask = torch.ones(2, 3, dtype=torch.bool)
    diff = SparseDiff.from_dense(torch.ones(2, 3))
    for good in (mask, SparsePattern.from_mask(mask), diff):
        assert as_pattern(good, name="w", shape=(2, 3)).nnz == 6
    with pytest.raises(
        MaskError, match=r"'encoder\.w' has shape \(2, 3\) but the tensor has \(4,\)"
    ):
        as_pattern(mask, name="encoder.w", shape=(4,))
    with pytest.raises(MaskError, match=r"transposed"):
        as_pattern(mask, name="w", shape=(3, 2))
    with pytest.raises(MaskError, match=r"'w' is torch\.float32, wanted torch\.bool"):
        as_pattern(mask.float(), name="w", shape=(2, 3))
    with pytest.raises(MaskError, match="'w' is list"):
        as_pattern([True], name="w", shape=(1,))


@pytest.mark.gpu
def test_same_answers_on_a_gpu():
    mask = torch.rand(301, 257, generator=torch.Generator().manual_seed(0)) < 0.1
    delta = torch.randn(301, 257, generator=torch.Generator().manual_seed(1))
    here = SparseDiff.from_dense(delta, mask)
    there = SparseDiff.from_dense(delta.cuda(), mask.cuda())
    assert there.device.type == "cuda"
    assert there.equals(here)
    assert there.digest() == here.digest()
    assert here.to("cuda").equals(here)
    assert torch.equal(there.to_dense().cpu(), here.to_dense())
    assert torch.equal(there.pattern.row_offsets().cpu(), here.pattern.row_offsets())
    assert torch.equal(there.pattern.to_mask().cpu(), mask)
    with pytest.raises(DiffError, match=r"not ascending: indices\[1\]"):
        SparseDiff(i32(0, 2, 1).cuda(), torch.zeros(3).cuda(), torch.Size((4,)))
    with pytest.raises(DiffError, match="entry 2 is nan"):
        SparseDiff(i32(0, 1, 2).cuda(), torch.tensor([0, 0, math.nan]).cuda(), torch.Size((4,)))
    with pytest.raises(DiffError, match="values is on cuda:0 but indices on cpu"):
        SparseDiff(here.indices, there.values, here.shape)
