"""Sampled gradients through the kernels: interpreted at small shapes, on a GPU also at real ones.

Accuracy by the one rule: at most twice what torch loses in fp32 on the same operands.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from sparseft import ops
from sparseft.diff import SparsePattern
from sparseft.ops.sampled_grad import (
    sampled_embedding_grad_reference,
    sampled_weight_grad_reference,
)

pytestmark = pytest.mark.usefixtures("poisoned_launcher")
LANES = [
    pytest.param("cpu", marks=pytest.mark.interpret, id="interpret"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
WAYS = ["tiles", "dots"]


def _load(name: str):
    path = Path(__file__).resolve().parent.parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


assert_as_accurate = _load("_accuracy").assert_as_accurate


@pytest.fixture(autouse=True)
def poisoned_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in what ``torch.empty`` returns: the op allocates its result before any launcher runs."""
    allocate = torch.empty

    def poisoned(*args, **kwargs):
        out = allocate(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def way(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    """Force tiles or dots, whatever the cost rule says; ("tiles", parts) also splits the tokens."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from sparseft.ops import _tiles
    from sparseft_kernels import _configs

    name, split = request.param if isinstance(request.param, tuple) else (request.param, 1)

    def plan(tokens, shape, nnz, programs, itemsize, precision, target):
        config = _configs.tile_configs(target, precision)[0] if name == "tiles" else None
        return _configs.SampledPlan(config, split)

    monkeypatch.setattr(_tiles, "plan_sampled_grad", plan)
    return name


both_ways = pytest.mark.parametrize("way", WAYS, indirect=True)


def mask_of(kind: str, m: int, n: int) -> torch.Tensor:
    mask = torch.zeros(m, n, dtype=torch.bool)
    if kind == "all":
        mask[:] = True
    elif kind == "rows":
        mask[1::40] = True
    elif kind == "columns":
        mask[:, 2::50] = True
    elif kind == "block":
        mask[m // 2 : m // 2 + 20, n // 3 : n // 3 + 30] = True
    elif kind == "last entry":
        mask[-1, -1] = True
    elif kind != "none":
        mask = torch.rand(m, n) < float(kind)
    return mask


def operands(t: int, m: int, n: int, dtype: torch.dtype, device: str):
    return torch.randn(t, m).to(dtype).to(device), torch.randn(t, n).to(dtype).to(device)


def check(dy, x, pattern, got, *, transposed=False, name=""):
    exact = sampled_weight_grad_reference(dy.double(), x.double(), pattern.indices, transposed)
    theirs = sampled_weight_grad_reference(dy.float(), x.float(), pattern.indices, transposed)
    assert got.dtype == torch.float32
    assert_as_accurate(got, theirs, exact, name=name)


# Densities 0.01 % to 10 % of 130 x 264 (100 % below), and clusters. Interpreted dots cost by the
# entry, so they leave out the dense ones, where the cost rule would never take them.
MASKS = ["0.0001", "0.001", "0.01", "rows", "columns", "block", "last entry"]


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize(
    ("mask", "way"),
    [(mask, way) for mask in MASKS for way in WAYS] + [("0.05", "tiles"), ("0.1", "tiles")],
    indirect=["way"],
)
def test_masks(mask, way, device):
    pattern = SparsePattern.from_mask(mask_of(mask, 130, 264)).to(device)
    # Errors are compared as RMS: those of a single entry would be a matter of luck.
    draws = [operands(70, 130, 264, torch.bfloat16, device) for _ in range(1 + 30 // pattern.nnz)]
    got, theirs, exact = [], [], []
    for dy, x in draws:
        got.append(ops.sampled_weight_grad(dy, x, pattern, backend="triton"))
        theirs.append(sampled_weight_grad_reference(dy.float(), x.float(), pattern.indices))
        exact.append(sampled_weight_grad_reference(dy.double(), x.double(), pattern.indices))
    assert_as_accurate(torch.cat(got), torch.cat(theirs), torch.cat(exact))


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("way", ["tiles"], indirect=True)
@pytest.mark.parametrize("width", [8, 264])
def test_every_entry(width, way, device):
    """nnz = numel; 16 Ki entries in a program, a chunk at a time."""
    dy, x = operands(9, 130, width, torch.bfloat16, device)
    pattern = SparsePattern.from_mask(mask_of("all", 130, width)).to(device)
    check(dy, x, pattern, ops.sampled_weight_grad(dy, x, pattern, backend="triton"))


@pytest.mark.parametrize("device", LANES)
@both_ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("t", "m", "n"), [(1, 129, 72), (67, 131, 257), (16, 1, 99), (300, 20, 9)], ids=str
)
def test_dtypes_and_odd_sizes(t, m, n, dtype, way, device):
    dy, x = operands(t, m, n, dtype, device)
    pattern = SparsePattern.from_mask(mask_of("0.03" if m > 50 else "0.5", m, n)).to(device)
    check(dy, x, pattern, ops.sampled_weight_grad(dy, x, pattern, backend="triton"))


@pytest.mark.parametrize("device", LANES)
@both_ways
def test_operands_of_two_dtypes(way, device):
    dy, x = operands(20, 40, 48, torch.bfloat16, device)
    pattern = SparsePattern.from_mask(mask_of("0.2", 40, 48)).to(device)
    other = torch.randn(20, 48, device=device)
    check(dy, other, pattern, ops.sampled_weight_grad(dy, other, pattern, backend="triton"))
    half = x.to(torch.float16)
    check(dy, half, pattern, ops.sampled_weight_grad(dy, half, pattern, backend="triton"))


@pytest.mark.parametrize("device", LANES)
@both_ways
def test_strides(way, device):
    """Sliced, transposed, expanded and shifted operands, read where they lie."""
    base = torch.randn(40, 300).bfloat16().to(device)
    pattern = SparsePattern.from_mask(mask_of("0.05", 70, 144)).to(device)
    x = base[:, :144]
    for dy in (
        base[:, 150:220],  # rows 600 bytes apart, first element misaligned
        torch.randn(70, 40).bfloat16().to(device).t(),
        torch.randn(80, 70).bfloat16().to(device)[::2],
        torch.randn(40, 140).bfloat16().to(device)[:, ::2],
        torch.ones((), dtype=torch.bfloat16, device=device).expand(40, 70),
    ):
        got = ops.sampled_weight_grad(dy, x, pattern, backend="triton")
        check(dy, x, pattern, got)
        copies = dy.contiguous(), x.contiguous()
        assert torch.equal(got, ops.sampled_weight_grad(*copies, pattern, backend="triton"))
    folded = x.reshape(5, 8, 144).transpose(0, 1)
    dy = torch.randn(8, 5, 70).bfloat16().to(device)
    check(dy, folded, pattern, ops.sampled_weight_grad(dy, folded, pattern, backend="triton"))


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("way", ["tiles"], indirect=True)
def test_misaligned_operands_are_padded_in_panels(way, device, monkeypatch):
    """Like a 250,002-row head: rows of 4001 elements, copied 1024 columns at a time."""
    from sparseft.ops import _tiles
    from sparseft_kernels import sampled_grad

    monkeypatch.setattr(sampled_grad, "PANEL", 1024)
    dy, x = operands(18, 4001, 301, torch.bfloat16, device)
    assert sampled_grad.is_copied(dy, 301, whole=False)
    mask = mask_of("0.02", 4001, 301)
    mask[:1024] = False  # a panel without work
    pattern = SparsePattern.from_mask(mask).to(device)
    assert _tiles.tiles_of(pattern.indices, 4001, 301).rows.active is None
    check(dy, x, pattern, ops.sampled_weight_grad(dy, x, pattern, backend="triton"))


@pytest.mark.parametrize("device", LANES)
@both_ways
def test_conv1d_orientation(way, device):
    dy, x = operands(33, 72, 136, torch.bfloat16, device)
    pattern = SparsePattern.from_mask(mask_of("0.05", 136, 72)).to(device)
    got = ops.sampled_weight_grad(dy, x, pattern, transposed=True, backend="triton")
    check(dy, x, pattern, got, transposed=True)


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("way", ["tiles", "dots", ("tiles", 3)], indirect=True, ids=str)
def test_out_is_added_to(way, device):
    dy, x = operands(150, 72, 136, torch.bfloat16, device)
    pattern = SparsePattern.from_mask(mask_of("0.05", 72, 136)).to(device)
    once = ops.sampled_weight_grad(dy, x, pattern, backend="triton")
    out = torch.randn(pattern.nnz, device=device)
    expected = out + once
    assert ops.sampled_weight_grad(dy, x, pattern, out=out, backend="triton") is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("way", [("tiles", 2), ("tiles", 5)], indirect=True, ids=str)
def test_tokens_in_parts(way, device):
    """Parts are whole steps of tokens, so five of 150 tokens become three; every one is summed."""
    dy, x = operands(150, 136, 72, torch.bfloat16, device)
    pattern = SparsePattern.from_mask(mask_of("0.05", 136, 72)).to(device)
    got = ops.sampled_weight_grad(dy, x, pattern, backend="triton")
    check(dy, x, pattern, got)
    assert torch.equal(got, ops.sampled_weight_grad(dy, x, pattern, backend="triton"))


@pytest.mark.parametrize("device", LANES)
@both_ways
def test_several_slabs_of_tokens(way, device, monkeypatch):
    from sparseft_kernels import sampled_grad

    monkeypatch.setattr(sampled_grad, "DOTS", sampled_grad.DOTS._replace(slab_bytes=1))
    dy, x = operands(700, 40, 24, torch.bfloat16, device)
    pattern = SparsePattern.from_mask(mask_of("0.1", 40, 24)).to(device)
    check(dy, x, pattern, ops.sampled_weight_grad(dy, x, pattern, backend="triton"))


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("way", ["tiles"], indirect=True)
def test_chunks_of_the_layout_change_nothing(way, device, monkeypatch):
    from sparseft.ops import _tiles

    dy, x = operands(9, 300, 264, torch.bfloat16, device)
    pattern = SparsePattern.from_mask(mask_of("0.02", 300, 264)).to(device)
    whole = ops.sampled_weight_grad(dy, x, pattern, backend="triton")
    monkeypatch.setattr(_tiles, "_CHUNK", 100)
    again = SparsePattern(pattern.indices.clone(), pattern.shape)
    assert torch.equal(ops.sampled_weight_grad(dy, x, again, backend="triton"), whole)


@pytest.mark.parametrize("device", LANES)
@both_ways
@pytest.mark.parametrize(("t", "m", "n"), [(0, 5, 7), (4, 0, 7), (4, 5, 0), (4, 5, 7)], ids=str)
def test_nothing_to_do(t, m, n, way, device):
    dy, x = operands(t, m, n, torch.bfloat16, device)
    mask = mask_of("none" if t else "all", m, n)
    pattern = SparsePattern.from_mask(mask).to(device)
    got = ops.sampled_weight_grad(dy, x, pattern, backend="triton")
    assert torch.equal(got, torch.zeros(pattern.nnz, device=device))
    out = torch.ones(pattern.nnz, device=device)
    ops.sampled_weight_grad(dy, x, pattern, out=out, backend="triton")
    assert torch.equal(out, torch.ones(pattern.nnz, device=device))


@pytest.mark.parametrize("device", LANES)
@both_ways
def test_weights_beyond_two_to_the_31(way, device):
    rows, cols = 46345, 46343
    at = [3, 1500, cols * 999, (1 << 31) - 1, 1 << 31, rows * cols - 1, rows * cols - 900]
    indices = torch.tensor(sorted(at), device=device)
    pattern = SparsePattern.from_indices(indices, (rows, cols))
    assert pattern.indices.dtype == torch.int64
    dy, x = operands(3, rows, cols, torch.bfloat16, device)
    got = ops.sampled_weight_grad(dy, x, pattern, backend="triton")
    r, c = indices // cols, indices % cols
    exact = (dy[:, r].double() * x[:, c].double()).sum(0)
    assert_as_accurate(got, (dy[:, r].float() * x[:, c].float()).sum(0), exact)


# Embeddings.


def embedding_case(density: float, tokens: tuple[int, ...], dtype: torch.dtype, device: str):
    vocab, dim = 60, 136
    ids = torch.randint(0, vocab, tokens)
    ids.view(-1)[: ids.numel() // 3] = 7  # a frequent one: several blocks of positions
    pattern = SparsePattern.from_mask(torch.rand(vocab, dim) < density).to(device)
    return torch.randn(*tokens, dim).to(dtype).to(device), ids.to(device), pattern


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.01, 1.0])
@pytest.mark.parametrize(("padding", "scale"), [(None, False), (7, True), (-1, False)])
def test_embedding(padding, scale, density, dtype, device):
    dy, ids, pattern = embedding_case(density, (2, 40), dtype, device)
    got = ops.sampled_embedding_grad(
        dy, ids, pattern, padding_idx=padding, scale_grad_by_freq=scale, backend="triton"
    )
    row = None if padding is None else padding % pattern.shape[0]
    rest = (ids, pattern.indices, pattern.shape[0], row, scale)
    assert got.dtype == torch.float32
    exact = sampled_embedding_grad_reference(dy.double(), *rest)
    assert_as_accurate(got, sampled_embedding_grad_reference(dy.float(), *rest), exact)
    if row is not None:
        assert not got[pattern.indices // pattern.shape[1] == row].any()


@pytest.mark.parametrize("device", LANES)
def test_embedding_strides_and_token_dtypes(device):
    dy, ids, pattern = embedding_case(0.2, (4, 10), torch.bfloat16, device)
    expected = ops.sampled_embedding_grad(dy, ids, pattern, backend="triton")
    assert torch.equal(
        ops.sampled_embedding_grad(dy, ids.int(), pattern, backend="triton"), expected
    )
    strided = torch.cat((dy, dy), -1)[..., : dy.shape[-1]]
    folded = dy.transpose(0, 1).contiguous().transpose(0, 1)
    other = ids.t().contiguous().t()
    for view in (strided, folded):
        assert not view.is_contiguous()
        got = ops.sampled_embedding_grad(view, other, pattern, backend="triton")
        assert torch.equal(got, expected)


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize(("density", "tokens"), [(0.0, (5,)), (0.3, (0,)), (0.3, (1,))], ids=str)
def test_embedding_edges(density, tokens, device):
    dy, ids, pattern = embedding_case(density, tokens, torch.float32, device)
    got = ops.sampled_embedding_grad(dy, ids, pattern, backend="triton")
    exact = sampled_embedding_grad_reference(dy, ids, pattern.indices, pattern.shape[0])
    assert torch.equal(got, exact)


@pytest.mark.parametrize("device", LANES)
def test_embedding_of_a_huge_vocabulary(device):
    """Indices past 2**31; one integer per row would be 8 GiB."""
    vocab, dim = 1 << 30, 1024
    at = torch.tensor([5 * dim + 1, 5 * dim + 7, (vocab - 1) * dim + 3], device=device)
    pattern = SparsePattern.from_indices(at, (vocab, dim))
    dy, ids = torch.randn(3, dim, device=device), torch.tensor([5, vocab - 1, 5], device=device)
    got = ops.sampled_embedding_grad(dy, ids, pattern, backend="triton")
    assert torch.equal(got, torch.stack((dy[0, 1] + dy[2, 1], dy[0, 7] + dy[2, 7], dy[1, 3])))
