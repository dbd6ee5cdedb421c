"""Capture, restore and write_sum kernels: bit-equal to the reference, interpreted or on a GPU."""

from __future__ import annotations

import pytest
import torch

from sparseft import ops
from sparseft.diff import SparseDiff, SparsePattern

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTEGER = {2: torch.int16, 4: torch.int32}
# Around one tile of 1024 entries, and none.
COUNTS = [0, 1, 1023, 1024, 1025, 3001]

pytestmark = pytest.mark.usefixtures("poisoned_launcher")
LANES = [
    pytest.param("cpu", marks=pytest.mark.interpret, id="interpret"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(INTEGER[x.element_size()])


def any_bits(n: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Random bit patterns: NaNs with payloads, infinities, subnormals among them."""
    integer = INTEGER[torch.empty(0, dtype=dtype).element_size()]
    info = torch.iinfo(integer)
    return torch.randint(info.min, info.max, (n,), dtype=integer).view(dtype).to(device)


def places(n: int, numel: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randperm(numel)[:n].sort().values.to(dtype).to(device)


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", COUNTS)
def test_capture_and_restore_every_bit(n, dtype, index_dtype, device):
    weight = any_bits(4096, dtype, device)
    before = bits(weight).clone()
    indices = places(n, 4096, index_dtype, device)
    saved = ops.gather_entries(weight, indices, backend="triton")
    assert torch.equal(bits(saved), before[indices.long()])
    ops.write_entries_(weight, indices, torch.ones_like(saved), backend="triton")
    assert torch.equal(weight[indices.long()], torch.ones_like(saved))
    ops.write_entries_(weight, indices, saved, backend="triton")
    assert torch.equal(bits(weight), before)


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", COUNTS)
def test_write_sum_equals_the_reference_bit_for_bit(n, dtype, value_dtype, device):
    weight = any_bits(4096, dtype, device)
    indices = places(n, 4096, torch.int32, device)
    base = torch.randn(n).to(dtype).to(device)
    values = (torch.randn(n) * 10 ** torch.randint(-6, 2, (n,))).to(value_dtype).to(device)
    theirs, mine = weight.clone(), weight.clone()
    ops.write_sum_(theirs, indices, base, values, backend="reference")
    ops.write_sum_(mine, indices, base, values, backend="triton")
    assert torch.equal(bits(mine), bits(theirs))


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_to_nearest_even(dtype, device):
    """Sums half way between two values of the dtype, up and down, and one past its range."""
    step = torch.finfo(dtype).eps
    base = torch.ones(6, dtype=dtype, device=device)
    half = torch.tensor([step / 2, 1.5 * step, -step / 4, -0.75 * step, step / 2 + 1e-7, 3.4e38])
    weight = torch.zeros(6, dtype=dtype, device=device)
    indices = torch.arange(6, dtype=torch.int32, device=device)
    ops.write_sum_(weight, indices, base, half.to(device), backend="triton")
    assert torch.equal(weight, (base.float() + half.to(device)).to(dtype))
    assert weight[0] == 1
    assert weight[1] == 1 + 2 * step


@pytest.mark.parametrize("device", LANES)
def test_apply_and_undo_through_the_kernels(device):
    weight = torch.randn(130, 70).bfloat16().to(device)
    before = bits(weight).clone()
    pattern = SparsePattern.from_mask(torch.rand(130, 70) < 0.3).to(device)
    diff = SparseDiff.from_pattern(pattern, torch.randn(pattern.nnz, device=device), "add")
    theirs = weight.clone()
    with ops.backend("reference"):
        ops.apply_diff_(theirs, diff, coeff=0.3)
    with ops.backend("triton"):
        saved = ops.apply_diff_(weight, diff, coeff=0.3)
        assert torch.equal(bits(weight), bits(theirs))
        ops.undo_(weight, diff.indices, saved)
    assert torch.equal(bits(weight), before)


@pytest.mark.gpu
def test_auto_takes_the_kernel_on_a_gpu_without_a_sync():
    weight = torch.randn(1 << 22, device="cuda", dtype=torch.bfloat16)
    indices = places(1 << 18, 1 << 22, torch.int32, "cuda")
    values = torch.randn(1 << 18, device="cuda")
    assert ops.resolve_backend("write_sum_", weight, indices, values) == "triton"
    saved = ops.gather_entries(weight, indices)  # compiled before the check
    ops.write_sum_(weight, indices, saved, values)
    ops.write_entries_(weight, indices, saved)
    torch.cuda.set_sync_debug_mode("error")
    try:
        saved = ops.gather_entries(weight, indices)
        ops.write_sum_(weight, indices, saved, values)
        ops.write_entries_(weight, indices, saved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
