"""Differences and pruned residuals on the CPU: definitions, exact counts and ties, refusals."""

from __future__ import annotations

import tracemalloc

import pytest
import torch

from sparseft.errors import BackendError, DecompositionError
from sparseft.ops import _residual_blocks, difference_, prune_residual_
from sparseft.ops.residual import difference_reference, prune_residual_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def whole_numbers(count: int, m: int, n: int, r: int, dtype=torch.float32):
    """Matrices whose products are exact in any order, with many ties."""
    delta = torch.randint(-3, 4, (count, m, n)).to(dtype)
    left = torch.randint(-2, 3, (count, m, r)).to(dtype)
    return delta, left, torch.randint(-1, 2, (count, r, n)).to(dtype)


@pytest.fixture(params=["whole", "cut"])
def small_blocks(request, monkeypatch):
    """Also with blocks and samples that small matrices do not fit into."""
    if request.param == "cut":
        monkeypatch.setattr(_residual_blocks, "BLOCK", 32)
        monkeypatch.setattr(_residual_blocks, "_COLUMNS", 8)
        monkeypatch.setattr(_residual_blocks, "_SAMPLE", 16)


# ---- differences


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_difference_has_the_definitions_bits(dtype, wide):
    theta1, theta0 = torch.randn(37, 23).to(dtype), torch.randn(37, 23).half()
    for new, old in (
        (theta1, theta0),
        (theta1, None),
        (theta1.mT.contiguous().mT, torch.randn(37, 46).to(dtype)[:, ::2]),
    ):
        for out in (torch.empty(37, 23, dtype=wide), torch.empty(23, 37, dtype=wide).mT):
            assert difference_(out, new, old) is out
            assert torch.equal(out, difference_reference(new, old, wide))


def test_a_difference_in_bf16_is_not_rounded_to_it():
    out = difference_(torch.empty(1, 1), torch.ones(1, 1).bfloat16(), torch.full((1, 1), 2.0**-9))
    assert out.item() == 1 - 2.0**-9


def test_a_large_difference_goes_by_blocks():
    theta1, theta0 = torch.randn(700, 800).bfloat16(), torch.randn(700, 800).bfloat16()
    out = difference_(torch.empty(800, 700).mT, theta1, theta0)
    assert torch.equal(out, theta1.float() - theta0.float())
    assert difference_(torch.empty(0, 5), torch.empty(0, 5), torch.empty(0, 5)).shape == (0, 5)


@pytest.mark.parametrize(
    ("out", "theta1", "theta0", "match"),
    [
        (torch.empty(2, 3), torch.ones(3, 2), None, r"theta1 is torch.float32 \(3, 2\)"),
        (torch.empty(2, 3), torch.ones(2, 3), torch.ones(2, 3).int(), "theta0 is torch.int32"),
        (torch.empty(2, 3).half(), torch.ones(2, 3), None, "out is torch.float16"),
        (torch.empty(3), torch.ones(3), None, r"wanted float32 or float64 \(m, n\)"),
    ],
)
def test_differences_that_do_not_fit_are_refused(out, theta1, theta0, match):
    with pytest.raises(DecompositionError, match=match):
        difference_(out, theta1, theta0)


# ---- pruning


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("m", "n", "r"), [(1, 1, 1), (1, 40, 0), (7, 13, 2), (33, 20, 3), (40, 5, 1), (20, 64, 2)]
)
def test_ties_go_to_the_first(m, n, r, dtype):
    for _ in range(4):
        delta, left, right = whole_numbers(3, m, n, r, dtype)
        keep = [int(k) for k in torch.randint(0, m * n + 1, (3,))]
        wanted = prune_residual_reference(delta, left, right, keep)
        assert prune_residual_(delta, left, right, keep) is delta
        assert torch.equal(delta, wanted)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("value", [0.0, 2.0])
def test_equal_residuals_everywhere(value):
    delta = torch.full((2, 19, 23), value)
    nothing = torch.zeros(2, 19, 1), torch.zeros(2, 1, 23)
    prune_residual_(delta, *nothing, [100, 436])
    flat = delta.view(2, -1)
    assert (flat[0, :100] == value).all()
    assert (flat[1, :436] == value).all()
    assert flat[0, 100:].count_nonzero() == flat[1, 436:].count_nonzero() == 0


@pytest.mark.parametrize("shape", [(70, 90), (40, 5000), (400, 700)])
def test_real_numbers_keep_exactly_the_largest(shape, assert_as_accurate):
    m, n = shape
    delta, left, right = torch.randn(2, m, n), torch.randn(2, m, 5), torch.randn(2, 5, n)
    low = prune_residual_(delta.clone(), left, right, 0)
    exact = left.double() @ right.double()
    assert_as_accurate(low, left @ right, exact)
    for keep in (1, m * n // 10, m * n // 2, m * n - 1, m * n):
        got = prune_residual_(delta.clone(), left, right, keep)
        # given the product that this backend made, the selection is the definition's
        rest = (delta - low).abs().view(2, -1)
        chosen = rest.argsort(dim=1, descending=True, stable=True)[:, :keep]
        wanted = low.view(2, -1).scatter(1, chosen, delta.view(2, -1).gather(1, chosen))
        assert torch.equal(got.view(2, -1), wanted), keep


def test_a_sample_that_misleads_is_not_believed(monkeypatch):
    """Sampled rows hold nothing, or everything."""
    seen = []
    real = _residual_blocks._between

    def between(*args):
        seen.append(real(*args))
        return seen[-1]

    monkeypatch.setattr(_residual_blocks, "_between", between)
    for quiet in (True, False):
        delta = torch.randn(1, 512, 40) + 5
        rows = torch.zeros(512, dtype=torch.bool)
        rows[::16] = True
        delta[:, rows == quiet] = 0
        nothing = torch.zeros(1, 512, 1), torch.zeros(1, 1, 40)
        wanted = prune_residual_reference(delta, *nothing, 1000)
        seen.clear()
        assert torch.equal(prune_residual_(delta, *nothing, 1000), wanted)
        assert seen[0] is None and len(seen) == 2  # noqa: PT018


def test_a_wide_bracket_keeps_no_more_keys_than_it_needs(monkeypatch):
    monkeypatch.setattr(_residual_blocks, "BLOCK", 64)
    delta, left, right = whole_numbers(1, 60, 30, 1)
    wanted = prune_residual_reference(delta, left, right, 20)
    assert torch.equal(prune_residual_(delta, left, right, 20), wanted)


def test_factors_in_half_precision_are_widened():
    delta, left, right = whole_numbers(2, 9, 8, 3)
    wanted = prune_residual_reference(delta, left, right, 11)
    assert torch.equal(prune_residual_(delta, left.half(), right.bfloat16(), 11), wanted)


def test_infinite_entries_come_first_and_nan_is_refused_before_anything_is_written():
    delta, left, right = whole_numbers(3, 6, 7, 2)
    delta[0, 1, 2] = float("inf")
    low = left @ right
    kept = prune_residual_(delta.clone(), left, right, 1)
    assert kept[0, 1, 2] == float("inf")
    assert int((kept[0] != low[0]).sum()) == 1
    delta[2, 5, 6] = float("nan")
    before = delta.clone()
    with pytest.raises(DecompositionError, match=r"matrix 2 of shape \(6, 7\).*holds NaN"):
        prune_residual_(delta, left, right, [1, 2, 3])
    assert torch.equal(delta.nan_to_num(99), before.nan_to_num(99))
    # nothing is ranked in these: the NaN goes, or stays
    assert torch.equal(prune_residual_(delta, left, right, [0, 42, 0])[2], low[2])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"delta": torch.zeros(2, 3, 4).half()}, "delta is torch.float16"),
        ({"delta": torch.zeros(3, 4)}, r"wanted float32 or float64 \(B, m, n\)"),
        ({"delta": torch.zeros(2, 4, 3).mT}, "written in place, so wanted contiguous"),
        ({"left": torch.zeros(2, 4, 1)}, r"left is torch.float32 \(2, 4, 1\)"),
        ({"right": torch.zeros(2, 2, 4)}, r"wanted floating \(2, 1, 4\)"),
        ({"right": torch.zeros(2, 1, 4).int()}, "right is torch.int32"),
        ({"keep": 13}, "keep is 13; wanted an integer of 0 to 12"),
        ({"keep": -1}, "keep is -1"),
        ({"keep": [1]}, r"keep is \[1\]"),
        ({"keep": [1, True]}, "keep is"),
        ({"keep": 0.5}, "keep is 0.5"),
    ],
)
def test_what_does_not_fit_is_refused(change, match):
    arguments = {
        "delta": torch.zeros(2, 3, 4),
        "left": torch.zeros(2, 3, 1),
        "right": torch.zeros(2, 1, 4),
        "keep": 2,
    }
    with pytest.raises(DecompositionError, match=match):
        prune_residual_(**(arguments | change))


def test_triton_says_why_it_cannot(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    delta, left, right = whole_numbers(1, 3, 4, 1, torch.float64)
    with pytest.raises(BackendError, match="delta has dtype torch.float64"):
        prune_residual_(delta, left, right, 1, backend="triton")


@pytest.mark.slow
def test_nothing_of_a_matrixs_size_is_made(monkeypatch):
    """Blocks, and keys and positions of a few percent, in torch's memory and in numpy's."""
    delta, left = torch.randn(1, 512, 4096), torch.randn(1, 512, 4)
    right, size = torch.randn(1, 4, 4096), 4 * delta.numel()
    monkeypatch.setattr(_residual_blocks, "BLOCK", 1 << 16)
    monkeypatch.setattr(_residual_blocks, "_SAMPLE", 1 << 16)

    def peak(run) -> int:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            tracemalloc.start()
            run()
            _, arrays = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        held = most = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        return most + arrays

    assert peak(lambda: (delta - left @ right).abs().sum()) > size, "the check must be able to fail"
    assert peak(lambda: prune_residual_(delta, left, right, delta.numel() // 20)) < 0.6 * size
