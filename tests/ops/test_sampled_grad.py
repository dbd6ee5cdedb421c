"""sampled_weight_grad against its reference: shapes, masks, dtypes, orientation, gradients."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from sparseft import ops
from sparseft.diff import SparsePattern
from sparseft.errors import BackendError, MaskError
from sparseft.ops import _layout, _sampled_cpu
from sparseft.ops.sampled_grad import sampled_weight_grad_reference


def mask_of(kind: str, m: int, n: int) -> torch.Tensor:
    mask = torch.zeros(m, n, dtype=torch.bool)
    if kind == "full":
        mask[:] = True
    elif kind == "rows":
        mask[::3] = True
    elif kind == "columns":
        mask[:, ::5] = True
    elif kind == "sparse columns":
        mask[:, ::7] = torch.rand(m, len(range(0, n, 7))) < 0.05
    elif kind == "block":
        mask[m // 3 : m // 2 + 1, n // 4 : n // 2 + 1] = True
    elif kind == "dense above, sparse below":
        mask[: m // 2] = torch.rand(m // 2, n) < 0.6
        mask[m // 2 :] = torch.rand(m - m // 2, n) < 0.01
    elif kind == "one entry":
        mask[m - 1, n - 1] = True
    elif kind != "empty":
        mask = torch.rand(m, n) < float(kind)
    return mask


MASKS = (
    "full", "rows", "columns", "sparse columns", "block", "dense above, sparse below", "one entry",
    "empty", "0.002", "0.03", "0.3",
)  # fmt: skip
SHAPES = [  # T, M, N
    (37, 130, 67),
    (1, 65, 33),
    (300, 64, 128),
    (1037, 129, 40),
    (5, 1, 9),
    (5, 9, 1),
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("t", "m", "n"), SHAPES, ids=str)
def test_equals_the_dense_gradient_at_the_mask(mask, t, m, n, assert_as_accurate):
    pattern = SparsePattern.from_mask(mask_of(mask, m, n))
    # The rule compares two RMS errors: of one entry each they would be two draws of luck.
    draws = max(1, 200 // max(1, pattern.nnz))
    got, theirs, exact = [], [], []
    for _ in range(draws):
        dy, x = torch.randn(t, m), torch.randn(t, n)
        got.append(ops.sampled_weight_grad(dy, x, pattern))
        theirs.append(sampled_weight_grad_reference(dy, x, pattern.indices))
        exact.append(sampled_weight_grad_reference(dy.double(), x.double(), pattern.indices))
    assert_as_accurate(torch.cat(got), torch.cat(theirs), torch.cat(exact))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mask", ["0.01", "0.5"])
def test_dtypes_accumulate_in_fp32_or_better(mask, dtype, assert_as_accurate):
    dy, x = torch.randn(600, 130).to(dtype), torch.randn(600, 70).to(dtype)
    pattern = SparsePattern.from_mask(mask_of(mask, 130, 70))
    got = ops.sampled_weight_grad(dy, x, pattern)
    assert got.dtype == torch.float32
    exact = sampled_weight_grad_reference(dy.double(), x.double(), pattern.indices)
    # against torch in fp32 on the same low-precision operands: no rounding to bf16 may happen
    # inside
    theirs = sampled_weight_grad_reference(dy.to(got.dtype), x.to(got.dtype), pattern.indices)
    assert_as_accurate(got, theirs, exact)


@pytest.mark.parametrize("mask", ["0.01", "0.5"])
def test_float64_stays_float64(mask):
    dy, x = torch.randn(600, 130).double(), torch.randn(600, 70).double()
    pattern = SparsePattern.from_mask(mask_of(mask, 130, 70))
    got = ops.sampled_weight_grad(dy, x, pattern)
    torch.testing.assert_close(got, sampled_weight_grad_reference(dy, x, pattern.indices))


def test_operands_of_two_dtypes():
    """Autocast hands over bf16 gradients beside fp32 inputs."""
    dy, x = torch.randn(20, 8).bfloat16(), torch.randn(20, 6)
    pattern = SparsePattern.from_mask(torch.ones(8, 6, dtype=torch.bool))
    got = ops.sampled_weight_grad(dy, x, pattern)
    assert torch.equal(got, ops.sampled_weight_grad(dy.float(), x, pattern))


@pytest.mark.parametrize("mask", ["0.02", "0.5"])
def test_leading_dimensions_and_strides(mask):
    dy, x = torch.randn(4, 9, 70), torch.randn(4, 9, 50)
    pattern = SparsePattern.from_mask(mask_of(mask, 70, 50))
    expected = ops.sampled_weight_grad(dy.reshape(36, 70), x.reshape(36, 50), pattern)
    assert torch.equal(ops.sampled_weight_grad(dy, x, pattern), expected)
    strided_dy = dy.transpose(1, 2).contiguous().transpose(1, 2)
    strided_x = torch.cat((x, x), -1)[..., :50]
    assert not strided_dy.is_contiguous()
    assert not strided_x.is_contiguous()
    assert torch.equal(ops.sampled_weight_grad(strided_dy, strided_x, pattern), expected)
    expanded = torch.ones(1, 1, 70).expand(4, 9, 70)
    torch.testing.assert_close(
        ops.sampled_weight_grad(expanded, x, pattern),
        sampled_weight_grad_reference(expanded, x, pattern.indices),
    )


@pytest.mark.parametrize("mask", ["0.02", "0.5"])
def test_conv1d_orientation(mask):
    dy, x = torch.randn(40, 70), torch.randn(40, 50)
    keep = mask_of(mask, 50, 70)  # Conv1D stores (in, out)
    pattern = SparsePattern.from_mask(keep)
    got = ops.sampled_weight_grad(dy, x, pattern, transposed=True)
    torch.testing.assert_close(got, (x.t() @ dy)[keep])


@pytest.mark.parametrize("mask", ["0.02", "0.5", "sparse columns"])
def test_out_is_added_to(mask):
    dy, x = torch.randn(40, 130), torch.randn(40, 70)
    pattern = SparsePattern.from_mask(mask_of(mask, 130, 70))
    once = ops.sampled_weight_grad(dy, x, pattern)
    held = torch.randn(pattern.nnz)
    expected = held + once
    assert ops.sampled_weight_grad(dy, x, pattern, out=held) is held
    assert torch.equal(held, expected)


@pytest.mark.parametrize(("t", "m", "n"), [(0, 5, 7), (4, 0, 7), (4, 5, 0)], ids=str)
def test_empty_operands(t, m, n):
    pattern = SparsePattern.from_mask(torch.ones(m, n, dtype=torch.bool))
    got = ops.sampled_weight_grad(torch.randn(t, m), torch.randn(t, n), pattern)
    assert torch.equal(got, torch.zeros(m * n))


def test_repeats_to_the_bit():
    dy, x = torch.randn(700, 200), torch.randn(700, 90)
    for mask in ("0.02", "0.5"):
        pattern = SparsePattern.from_mask(mask_of(mask, 200, 90))
        first = ops.sampled_weight_grad(dy, x, pattern)
        for _ in range(3):
            assert torch.equal(ops.sampled_weight_grad(dy.clone(), x.clone(), pattern), first)


@pytest.mark.parametrize("panel", [64, 128])
@pytest.mark.parametrize("tile", [64 * 90, 1 << 20])
def test_panels_and_tiles_change_nothing_but_rounding(monkeypatch, panel, tile):
    """Every row block falls into exactly one tile or panel, whatever their sizes."""
    monkeypatch.setattr(_sampled_cpu, "_PANEL", panel)
    monkeypatch.setattr(_sampled_cpu, "TILE", tile)
    dy, x = torch.randn(70, 331).double(), torch.randn(70, 90).double()
    for mask in ("0.01", "0.9", "dense above, sparse below", "rows"):
        pattern = SparsePattern.from_mask(mask_of(mask, 331, 90))
        expected = sampled_weight_grad_reference(dy, x, pattern.indices)
        torch.testing.assert_close(ops.sampled_weight_grad(dy, x, pattern), expected)


def test_both_paths_are_taken():
    """The cost model sends dense blocks to the tile, sparse ones to dot products."""
    keep = mask_of("dense above, sparse below", 512, 384)
    layout = _layout.layout_of(SparsePattern.from_mask(keep).indices, 512, 384)
    assert [(first, end, dense) for first, end, _, _, dense in layout.runs(1024, 512)] == [
        (0, 256, True),
        (256, 512, False),
    ]


def test_layout_is_kept_per_index_tensor_and_dies_with_it():
    pattern = SparsePattern.from_mask(mask_of("0.1", 40, 30))
    layout = _layout.layout_of(pattern.indices, 40, 30)
    dy, x = torch.randn(3, 40), torch.randn(3, 30)
    ops.sampled_weight_grad(dy, x, pattern)
    assert _layout.layout_of(pattern.indices, 40, 30) is layout
    alive = weakref.ref(layout)
    del layout, pattern
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mask", ["0.1", "0.9"])
def test_gradcheck(mask, transposed):
    dy = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    shape = (5, 6) if transposed else (6, 5)
    pattern = SparsePattern.from_mask(mask_of(mask, *shape))

    def op(a, b):
        return ops.sampled_weight_grad(a, b, pattern, transposed=transposed)

    assert torch.autograd.gradcheck(op, (dy, x))
    assert torch.autograd.gradgradcheck(op, (dy, x))


def test_operands_are_not_changed():
    dy, x = torch.randn(40, 70), torch.randn(40, 50)
    copies = dy.clone(), x.clone()
    ops.sampled_weight_grad(dy, x, SparsePattern.from_mask(mask_of("0.05", 70, 50)))
    assert torch.equal(dy, copies[0])
    assert torch.equal(x, copies[1])


def test_errors_name_the_shapes():
    pattern = SparsePattern.from_mask(torch.ones(4, 6, dtype=torch.bool))
    with pytest.raises(MaskError, match=r"\(4, 6\).*\(6, 4\).*transposed=True"):
        ops.sampled_weight_grad(torch.randn(3, 6), torch.randn(3, 4), pattern)
    with pytest.raises(MaskError, match="all but the last dimension"):
        ops.sampled_weight_grad(torch.randn(3, 4), torch.randn(2, 6), pattern)
    with pytest.raises(MaskError, match=r"out is torch.float32 \(5,\).*\(24,\)"):
        ops.sampled_weight_grad(torch.randn(3, 4), torch.randn(3, 6), pattern, out=torch.zeros(5))
    with pytest.raises(BackendError, match="lie on cpu"):
        ops.sampled_weight_grad(torch.randn(3, 4), torch.randn(3, 6), pattern, backend="triton")


def test_float64_is_left_to_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pattern = SparsePattern.from_mask(torch.ones(4, 6, dtype=torch.bool))
    dy, x = torch.randn(3, 4).double(), torch.randn(3, 6)
    with pytest.raises(BackendError, match="an operand is torch.float64"):
        ops.sampled_weight_grad(dy, x, pattern, backend="triton")
    with pytest.raises(BackendError, match="an operand is torch.float64"):
        ops.sampled_embedding_grad(
            torch.randn(3, 6).double(), torch.tensor([1, 0, 1]), pattern, backend="triton"
        )


def test_slabs_are_whole_lines_that_do_not_alias():
    for tokens in (1, 15, 16, 127, 128, 300, 512, 1000, 1024, 2048, 4096, 16384):
        slab = _sampled_cpu._slab_length(tokens)
        assert 1 <= slab <= tokens
        assert slab == tokens or (slab % 16 == 0 and slab // 16 % 8), (tokens, slab)
        assert slab <= 2 * _sampled_cpu._SLAB


@pytest.mark.parametrize(
    ("text", "maker"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\n", "AuthenticAMD"),
        ("processor\t: 0\nvendor_id\t: GenuineIntel\n", "GenuineIntel"),
        ("vendor_id : IBM/S390\n", "GenuineIntel"),
        ("CPU implementer\t: 0x41\n", "GenuineIntel"),
        (OSError("no /proc"), "GenuineIntel"),
    ],
)
def test_cost_figures_follow_the_maker(text, maker, monkeypatch):
    def read(*args, **options):
        if isinstance(text, OSError):
            raise text
        return text

    _layout._costs.cache_clear()
    monkeypatch.setattr(_layout.Path, "read_text", read)
    try:
        assert _layout._costs() is _layout._COSTS[maker]
    finally:
        _layout._costs.cache_clear()


def test_ways_are_chosen_by_the_cost_figures(monkeypatch):
    """At 10 % of 768 x 768 dot products win with AMD's figures and dense tiles with Intel's."""
    indices = torch.randperm(768 * 768)[: 768 * 77].sort().values
    chosen = {}
    for maker, costs in _layout._COSTS.items():
        monkeypatch.setattr(_layout, "_costs", lambda costs=costs: costs)
        runs = _layout.layout_of(indices.clone(), 768, 768).runs(1024, 528)
        chosen[maker] = {dense for *_, dense in runs}
    assert chosen == {"GenuineIntel": {True}, "AuthenticAMD": {False}}
