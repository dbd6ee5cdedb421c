"""Capture, restore, write: bit-exact data movement, one rounding where a sum is taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseft import ops
from sparseft.diff import SparseDiff, SparsePattern
from sparseft.errors import DiffError
from sparseft.ops import _common

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(INTEGER[x.element_size()])


def any_bits(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of random bits: NaNs with payloads, infinities, subnormals among them."""
    integer = INTEGER[torch.empty(0, dtype=dtype).element_size()]
    info = torch.iinfo(integer)
    return torch.randint(info.min, info.max, shape, dtype=integer).view(dtype)


def pattern_of(shape: tuple[int, ...], density: float = 0.3) -> SparsePattern:
    return SparsePattern.from_mask(torch.rand(shape) < density)


SHAPES = [(), (7,), (5, 6), (2, 3, 4), (2, 3, 4, 5), (0, 4), (300, 401)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_capture_and_restore_every_bit(shape, dtype):
    weight = any_bits(shape, dtype)
    before = bits(weight).clone()
    pattern = pattern_of(shape)
    saved = ops.gather_entries(weight, pattern.indices)
    assert saved.dtype == dtype
    assert torch.equal(bits(saved), before.flatten()[pattern.indices.long()])
    ops.write_entries_(weight, pattern.indices, torch.zeros_like(saved))
    assert torch.equal(weight.flatten()[pattern.indices.long()], torch.zeros_like(saved))
    ops.write_entries_(weight, pattern.indices, saved)
    assert torch.equal(bits(weight), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_sum_rounds_once(dtype):
    weight = torch.zeros(200, 31, dtype=dtype)
    pattern = pattern_of((200, 31))
    base = torch.randn(pattern.nnz).to(dtype)
    values = torch.randn(pattern.nnz) * 1e-2
    untouched = ~pattern.to_mask()
    ops.write_sum_(weight, pattern.indices, base, values)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (base.to(wide) + values.to(wide)).to(dtype)
    assert torch.equal(weight[pattern.to_mask()], expected)
    assert torch.equal(weight[untouched], torch.zeros_like(weight[untouched]))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_index_dtypes_and_chunks(index_dtype, monkeypatch):
    monkeypatch.setattr(_common, "CHUNK", 64)
    weight = torch.randn(40, 50)
    pattern = pattern_of((40, 50))
    indices = pattern.indices.to(index_dtype)
    values = torch.randn(pattern.nnz)
    expected = weight.clone()
    expected[pattern.to_mask()] = values
    ops.write_entries_(weight, indices, values)
    assert torch.equal(weight, expected)
    assert torch.equal(ops.gather_entries(weight, indices), values)


def strided(kind: str) -> torch.Tensor:
    if kind == "transposed":
        return torch.randn(6, 5).t()
    if kind == "slice":
        return torch.randn(9, 12)[2:7, 1:11:2]
    return torch.randn(2, 3, 4, 5).permute(2, 0, 3, 1)


@pytest.mark.parametrize("kind", ["transposed", "slice", "permuted"])
def test_non_contiguous_weights_are_changed_in_place(kind):
    weight = strided(kind)
    assert not weight.is_contiguous()
    pattern = pattern_of(tuple(weight.shape), 0.5)
    mask = pattern.to_mask()
    expected = weight.clone()
    expected[mask] = 1.5
    saved = ops.gather_entries(weight, pattern.indices)
    assert torch.equal(saved, weight.contiguous()[mask])
    original, address = weight.clone(), weight.data_ptr()
    ops.write_entries_(weight, pattern.indices, torch.full((pattern.nnz,), 1.5))
    assert torch.equal(weight, expected)
    assert weight.data_ptr() == address
    ops.write_sum_(weight, pattern.indices, saved, torch.zeros(pattern.nnz))
    assert torch.equal(weight, original)


def test_the_view_outside_a_slice_is_untouched():
    whole = torch.randn(9, 12)
    before = whole.clone()
    part = whole[2:7, 1:11:2]
    pattern = pattern_of((5, 5), 1.0)
    ops.write_entries_(part, pattern.indices, torch.zeros(25))
    before[2:7, 1:11:2] = 0
    assert torch.equal(whole, before)


def test_expanded_weights_are_rejected_by_name():
    weight = torch.randn(1, 5).expand(4, 5)
    pattern = pattern_of((4, 5), 1.0)
    assert torch.equal(ops.gather_entries(weight, pattern.indices), weight.flatten())
    with pytest.raises(DiffError, match=r"write_entries_.*share memory.*contiguous\(\)"):
        ops.write_entries_(weight, pattern.indices, torch.zeros(20))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 6), min_size=0, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    coeff=st.sampled_from([0.0, 1.0, -0.5, 3.25]),
    mode=st.sampled_from(["add", "set"]),
    seed=st.integers(0, 2**16),
)
def test_apply_then_undo_is_the_identity(shape, dtype, coeff, mode, seed):
    torch.manual_seed(seed)
    if mode == "set" and coeff not in (0, 1):
        coeff = 1.0
    weight = any_bits(tuple(shape), dtype)
    before = bits(weight).clone()
    pattern = pattern_of(tuple(shape), 0.5)
    diff = SparseDiff.from_pattern(pattern, torch.randn(pattern.nnz), mode)
    saved = ops.apply_diff_(weight, diff, coeff=coeff)
    mask = pattern.to_mask()
    assert torch.equal(bits(weight)[~mask], before[~mask])
    old = before.view(dtype)[mask]
    if coeff == 0:
        assert torch.equal(bits(weight), before)
    elif mode == "set":
        assert torch.equal(weight[mask], diff.values.to(dtype))
    else:
        product = diff.values * coeff
        expected = (old.float() + product).to(dtype)
        assert torch.equal(weight[mask].isnan(), expected.isnan())
        assert torch.equal(weight[mask].nan_to_num(), expected.nan_to_num())
    ops.undo_(weight, diff.indices, saved)
    assert torch.equal(bits(weight), before)


def test_a_stack_of_diffs_undoes_in_reverse():
    weight = torch.randn(50, 60).bfloat16()
    before = bits(weight).clone()
    trail = []
    for _ in range(6):
        pattern = pattern_of((50, 60))
        diff = SparseDiff.from_pattern(pattern, torch.randn(pattern.nnz) * 1e-3, "add")
        trail.append((diff, ops.apply_diff_(weight, diff, coeff=0.7)))
    assert not torch.equal(bits(weight), before)
    for diff, saved in reversed(trail):
        ops.undo_(weight, diff.indices, saved)
    assert torch.equal(bits(weight), before)


def test_parameters_that_require_grad_can_be_written():
    weight = torch.nn.Parameter(torch.randn(5, 6))
    pattern = pattern_of((5, 6))
    version = weight._version
    ops.write_entries_(weight, pattern.indices, torch.zeros(pattern.nnz))
    assert weight.is_leaf
    assert weight._version > version, "autograd must see that saved tensors changed"


def test_gradcheck_of_the_functional_forms():
    pattern = pattern_of((4, 5), 0.4)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    base, values = (
        torch.randn(pattern.nnz, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    check = torch.autograd.gradcheck
    assert check(lambda w: ops.gather_entries(w, pattern.indices), (weight,))
    assert check(lambda w, v: ops.write_entries(w, pattern.indices, v), (weight, values))
    assert check(lambda w, b, v: ops.write_sum(w, pattern.indices, b, v), (weight, base, values))
    assert torch.autograd.gradgradcheck(
        lambda w, v: ops.write_entries(w, pattern.indices, v).square(), (weight, values)
    )


def test_functional_forms_leave_their_input_alone():
    weight = torch.randn(4, 5)
    before = weight.clone()
    pattern = pattern_of((4, 5))
    out = ops.write_sum(weight, pattern.indices, torch.ones(pattern.nnz), torch.ones(pattern.nnz))
    assert torch.equal(weight, before)
    assert torch.equal(out[pattern.to_mask()], torch.full((pattern.nnz,), 2.0))


def test_errors_name_what_does_not_fit():
    weight, pattern = torch.randn(4, 5), pattern_of((4, 5))
    good = torch.zeros(pattern.nnz)
    with pytest.raises(DiffError, match=r"values has shape \(3,\)"):
        ops.write_entries_(weight, pattern.indices, torch.zeros(3))
    with pytest.raises(DiffError, match=r"bfloat16 but weight is torch.float32.*cast first"):
        ops.write_entries_(weight, pattern.indices, good.bfloat16())
    with pytest.raises(DiffError, match="indices are torch.float32"):
        ops.gather_entries(weight, good)
    with pytest.raises(DiffError, match="weight has dtype torch.int32"):
        ops.gather_entries(weight.int(), pattern.indices)
    diff = SparseDiff.from_pattern(pattern, good, "add")
    with pytest.raises(DiffError, match=r"diff has shape \(4, 5\) but weight has \(5, 4\)"):
        ops.apply_diff_(torch.randn(5, 4), diff)
    with pytest.raises(DiffError, match="mode 'set'.*coeff=0.5"):
        ops.apply_diff_(weight, SparseDiff.from_pattern(pattern, good, "set"), coeff=0.5)
