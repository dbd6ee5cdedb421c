"""Exact top-k over many tensors: against one stable sort of everything, and its memory."""

from __future__ import annotations

import tracemalloc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseft import ops
from sparseft.diff import SparsePattern
from sparseft.errors import BackendError, MaskError
from sparseft.ops import score_keys
from sparseft.ops.topk import topk_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def masks(patterns: dict[str, SparsePattern]) -> dict[str, torch.Tensor]:
    return {name: pattern.to_mask() for name, pattern in patterns.items()}


def assert_same(got: dict[str, SparsePattern], expected: dict[str, torch.Tensor], nnz: int) -> None:
    assert list(got) == list(expected)
    assert sum(p.nnz for p in got.values()) == nnz
    for name, mask in masks(got).items():
        assert torch.equal(mask, expected[name]), name
        SparsePattern(got[name].indices, got[name].shape)  # ascending, unique, in range


def scores_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if kind == "zeros":
        return torch.zeros(shape, dtype=dtype)
    if kind == "minus zeros":
        return torch.where(torch.rand(shape) < 0.5, -0.0, 0.0).to(dtype)
    if kind == "ties":
        return torch.randint(-2, 3, shape).to(dtype)
    if kind == "tiny":
        return (torch.randn(shape, dtype=torch.float64) * 1e-42).to(dtype)
    if kind == "inf":
        return torch.where(torch.rand(shape) < 0.3, float("inf"), torch.randn(shape)).to(dtype)
    return torch.randn(shape).to(dtype)


@settings(max_examples=150, deadline=None)
@given(
    tensors=st.lists(
        st.tuples(
            st.lists(st.integers(0, 5), max_size=3),
            st.sampled_from(DTYPES),
            st.sampled_from(["normal", "zeros", "minus zeros", "ties", "tiny", "inf"]),
        ),
        min_size=1,
        max_size=5,
    ),
    fraction=st.floats(0, 1),
    edge=st.sampled_from(["0", "1", "n-1", "n", "fraction"]),
    chunk=st.sampled_from([1, 3, 1 << 20]),
    seed=st.integers(0, 2**16),
)
def test_equals_one_stable_sort(tensors, fraction, edge, chunk, seed):
    torch.manual_seed(seed)
    scores = {f"t{i}": scores_of(k, tuple(s), d) for i, (s, d, k) in enumerate(tensors)}
    n = sum(s.numel() for s in scores.values())
    nnz = {"0": 0, "1": 1, "n-1": n - 1, "n": n, "fraction": int(fraction * n)}[edge]
    nnz = max(0, min(nnz, n))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_keys, "CHUNK", chunk)
        got = ops.topk_patterns(scores.items(), nnz, abs=True)
    assert_same(got, topk_reference(scores.items(), nnz), nnz)


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_larger_than_the_buffer(dtype, density, monkeypatch):
    monkeypatch.setattr(score_keys, "CHUNK", 1000)
    scores = {f"t{i}": torch.randn(97, 131).to(dtype) for i in range(5)}
    nnz = int(density * 5 * 97 * 131)
    assert_same(
        ops.topk_patterns(scores.items(), nnz, abs=True), topk_reference(scores.items(), nnz), nnz
    )


def test_float64_arriving_late_keeps_the_order():
    scores = {
        "a": torch.rand(300),
        "b": torch.rand(300, dtype=torch.float64),
        "c": torch.rand(300).bfloat16(),
    }
    for nnz in (5, 100, 700):
        assert_same(
            ops.topk_patterns(scores.items(), nnz), topk_reference(scores.items(), nnz), nnz
        )


def test_ties_go_to_the_first_added_then_the_lowest_index():
    ones = {"late": torch.ones(3), "early": torch.ones(2, 2)}
    got = ops.topk_patterns(ones.items(), 5)
    assert got["late"].indices.tolist() == [0, 1, 2]
    assert got["early"].indices.tolist() == [0, 1]


def test_strided_scores():
    scores = torch.randn(60, 70).t()
    assert_same(
        ops.topk_patterns([("a", scores)], 100, abs=True), topk_reference([("a", scores)], 100), 100
    )


def test_a_factory_is_read_once_lazily():
    calls = []

    def named():
        for i in range(3):
            calls.append(i)
            yield f"t{i}", torch.full((4,), float(i))

    got = ops.topk_patterns(named, 4)
    assert calls == [0, 1, 2]
    assert [p.nnz for p in got.values()] == [0, 0, 4]


@pytest.mark.parametrize("equal", [False, True], ids=["random", "all equal"])
def test_memory_does_not_grow_with_the_number_of_entries(equal, monkeypatch):
    """Held candidates never pass 2 nnz plus one piece, even when every score ties."""
    monkeypatch.setattr(score_keys, "CHUNK", 4096)
    top, nnz, most = ops.StreamingTopK(500), 500, 0
    for i in range(40):
        top.add(f"t{i}", torch.ones(10_000) if equal else torch.rand(10_000))
        most = max(most, sum(s.keys.numel() for s in top._segments))
    assert most <= 2 * nnz
    assert sum(p.nnz for p in top.finish().values()) == nnz


def select_from(tensors: int, shared: torch.Tensor) -> None:
    ops.topk_patterns(((f"t{i}", shared) for i in range(tensors)), 20_000)


def test_allocator_peak_is_a_multiple_of_k_and_a_chunk():
    """The same k over 8 times the entries allocates no more, by torch or by numpy."""

    def peaks(tensors: int) -> tuple[int, int]:
        shared = torch.rand(1 << 20)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            select_from(tensors, shared)
        held = most = 0
        for event in memory_events(profile):
            held += event
            most = max(most, held)
        tracemalloc.start()
        select_from(tensors, shared)
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most, python

    for small, large in zip(peaks(2), peaks(16), strict=True):
        assert large < 1.5 * small + (1 << 20)
        assert large < 24 * (1 << 20), "a chunk of 1 Mi scores and a few temporaries"


def memory_events(profile: torch.profiler.profile) -> list[int]:
    return [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]


@pytest.mark.parametrize("nnz", [0, 3])
def test_nan_is_an_error_that_names_the_tensor(nnz):
    bad = torch.rand(5, 4)
    bad[3, 1] = float("nan")
    top = ops.StreamingTopK(nnz)
    top.add("fine", torch.rand(7))
    with pytest.raises(MaskError, match="'encoder.weight' hold NaN.*flat index 13"):
        top.add("encoder.weight", bad)
    with pytest.raises(MaskError, match="'encoder.weight' hold NaN"):
        ops.topk_patterns([("encoder.weight", -bad)], nnz, abs=True)


def test_bad_calls_are_named():
    with pytest.raises(MaskError, match="'a' hold negative values; pass abs=True"):
        ops.topk_patterns([("a", torch.tensor([1.0, -1.0]))], 1)
    with pytest.raises(MaskError, match="nnz=9 entries.*only 8"):
        ops.topk_patterns([("a", torch.rand(8))], 9)
    with pytest.raises(MaskError, match="'a' were added twice"):
        ops.topk_patterns([("a", torch.rand(8)), ("a", torch.rand(8))], 1)
    with pytest.raises(MaskError, match="'a' have dtype torch.int64"):
        ops.topk_patterns([("a", torch.arange(8))], 1)
    for bad in (-1, 1.5, True):
        with pytest.raises(MaskError, match="integer >= 0"):
            ops.StreamingTopK(bad)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 6),
    width=st.integers(0, 9),
    data=st.data(),
    kind=st.sampled_from(["normal", "ties", "zeros", "minus zeros"]),
    chunk=st.sampled_from([1, 10, 1 << 20]),
)
def test_per_row_keeps_k_in_every_row(rows, width, data, kind, chunk):
    k = data.draw(st.integers(0, width))
    scores = scores_of(kind, (rows, width), torch.float32)
    expected = torch.zeros(rows, width, dtype=torch.bool)
    for r in range(rows):
        order = torch.argsort(scores[r].abs(), descending=True, stable=True)
        expected[r, order[:k]] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_keys, "CHUNK", chunk)
        got = ops.topk_single(scores, k, per_row=True, abs=True)
    assert torch.equal(got.to_mask(), expected)


def test_single_tensor_forms():
    scores = torch.rand(3, 4, 5)
    assert ops.topk_single(scores, 7).nnz == 7
    per_row = ops.topk_single(scores, 7, per_row=True)
    assert per_row.to_mask().flatten(1).sum(1).tolist() == [7, 7, 7]
    with pytest.raises(MaskError, match="21 entries per row.*'w' have 20"):
        ops.topk_single(scores, 21, per_row=True, name="w")
    with pytest.raises(MaskError, match="'w' hold NaN"):
        ops.topk_single(scores * float("nan"), 2, per_row=True, name="w")
    assert ops.topk_single(torch.rand(6), 2, per_row=True).nnz == 2


def pairs_of(shapes, dtype1=torch.float32, dtype0=torch.float32):
    return [
        (f"t{i}", torch.randn(s).to(dtype1), torch.randn(s).to(dtype0))
        for i, s in enumerate(shapes)
    ]


@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize("dtype1", DTYPES, ids=str)
@pytest.mark.parametrize("dtype0", [torch.bfloat16, torch.float64], ids=str)
def test_differences_are_taken_wide(dtype0, dtype1, chunk, monkeypatch):
    """In fp32, or fp64 if either side is, a piece at a time, and the tensors stay as they are."""
    monkeypatch.setattr(score_keys, "CHUNK", chunk)
    pairs = pairs_of([(9, 5), (), (0, 3), (4,)], dtype1, dtype0)
    before = [(a.clone(), b.clone()) for _, a, b in pairs]
    wide = torch.float64 if torch.float64 in (dtype0, dtype1) else torch.float32
    scores = [(name, (a.to(wide) - b.to(wide)).abs()) for name, a, b in pairs]
    for nnz in (0, 1, 20, 50):
        got = ops.topk_differences(pairs, nnz)
        assert_same(got.patterns, topk_reference(scores, nnz), nnz)
    for (_, a, b), (c, d) in zip(pairs, before, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_differences_of_strided_tensors(monkeypatch):
    monkeypatch.setattr(score_keys, "CHUNK", 50)
    theta1, theta0 = torch.randn(30, 20).t(), torch.randn(20, 60)[:, ::2]
    for pair in ((theta1, theta0), (theta0, theta1), (theta1.contiguous(), theta0)):
        scores = [("a", (pair[0] - pair[1]).abs())]
        got = ops.topk_differences([("a", *pair)], 77)
        assert_same(got.patterns, topk_reference(scores, 77), 77)


def test_zeros_count_the_entries_kept_to_fill_up():
    theta1, theta0 = torch.tensor([1.0, 0.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    pairs = [("a", theta1, theta0), ("b", theta0, theta0)]
    assert [ops.topk_differences(pairs, nnz).zeros for nnz in (0, 1, 2, 8)] == [0, 0, 1, 7]


def test_pairs_off_the_gpu_are_not_gathered():
    """One pair is alive at a time, so a checkpoint may be read tensor by tensor."""
    alive: list[weakref.ref] = []

    def pairs():
        for i in range(4):
            assert sum(r() is not None for r in alive) <= 2
            theta1 = torch.rand(50)
            alive.append(weakref.ref(theta1))
            yield f"t{i}", theta1, torch.rand(50)
            del theta1

    assert sum(p.nnz for p in ops.topk_differences(pairs(), 10).patterns.values()) == 10
    assert len(alive) == 4


def test_bad_differences_are_named():
    ones, bad = torch.ones(6), torch.ones(6)
    bad[4:] = float("inf")
    with pytest.raises(MaskError, match=r"of 'a' are NaN \(first at flat index 4\).*diverge"):
        ops.topk_differences([("a", bad, bad)], 2)
    with pytest.raises(MaskError, match=r"theta1 of 'a' has shape \(6,\) but theta0 has \(2, 3\)"):
        ops.topk_differences([("a", ones, ones.view(2, 3))], 2)
    with pytest.raises(MaskError, match="theta0 of 'a' has dtype torch.int64"):
        ops.topk_differences([("a", ones, ones.long())], 2)
    with pytest.raises(MaskError, match="'a' have dtype torch.int64"):
        ops.topk_differences([("a", ones.long(), ones)], 2)
    with pytest.raises(MaskError, match="'a' were added twice"):
        ops.topk_differences([("a", ones, ones)] * 2, 2)
    with pytest.raises(MaskError, match="nnz=7 entries.*only 6"):
        ops.topk_differences([("a", ones, ones)], 7)


def test_triton_is_refused_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ones = torch.ones(6)
    for call in (
        lambda: ops.topk_differences([("a", ones, ones)], 2, backend="triton"),
        lambda: ops.topk_patterns([("a", ones)], 2, backend="triton"),
        lambda: ops.topk_patterns(lambda: iter([("a", ones)]), 2, backend="triton"),
        lambda: ops.topk_single(ones, 2, backend="triton"),
    ):
        with pytest.raises(BackendError, match="lie on cpu"):
            call()
