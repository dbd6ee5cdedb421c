"""Products with sparse diffs on a GPU at the sizes of real layers, and separate mode on them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from sparseft import Adapter, SeparateComposer, ops
from sparseft.diff import SparseDiff, SparsePattern
from sparseft.ops import RowGroups
from sparseft.ops.spmm import spmm_reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_launcher")]

# Weight (out, in), batch rows, tokens of each: prefill, decoding, and a head.
LAYERS = [
    pytest.param(768, 768, 32, 128, id="xlmr-base-query"),
    pytest.param(3072, 768, 32, 1, id="xlmr-base-up-decode"),
    pytest.param(4096, 11_008, 4, 100, id="llama-7b-down"),
    pytest.param(4096, 4096, 1, 1, id="llama-7b-query-one-token"),
    pytest.param(250_002, 768, 8, 5, id="xlmr-base-head"),
]


def _load(name: str):
    path = Path(__file__).resolve().parent.parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


assert_as_accurate = _load("_accuracy").assert_as_accurate


def random_diff(rows: int, cols: int, density: float, *, skewed: bool = False) -> SparseDiff:
    keep = torch.rand(rows, cols, device="cuda") < density
    if skewed:
        keep[rows // 3] = True
        keep[:, cols // 3] = True
    pattern = SparsePattern.from_mask(keep)
    return SparseDiff.from_pattern(pattern, torch.randn(pattern.nnz, device="cuda"))


def groups_of(batch: int) -> RowGroups:
    order = torch.randperm(batch).tolist()
    return RowGroups.of([order[: batch // 2], order[batch // 2 :]], batch, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("density", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "cols", "batch", "length"), LAYERS)
def test_real_layers(rows, cols, batch, length, transposed, density, dtype):
    shape = (cols, rows) if transposed else (rows, cols)
    diffs = [random_diff(*shape, density), random_diff(*shape, density / 2, skewed=True)]
    x = torch.randn(batch, length, cols, device="cuda").to(dtype)
    y = torch.randn(batch, length, rows, device="cuda").to(dtype)
    groups = groups_of(batch)
    got = ops.spmm(x, diffs, rows=groups, add_to=y, transposed=transposed, backend="triton")
    assert not got.isnan().any()

    def define(to):
        return spmm_reference(
            x.to(to), y.to(to), [d.values.to(to) for d in diffs], [d.indices for d in diffs], [],
            groups.order, groups.ends, *shape, transposed,
        )  # fmt: skip

    assert_as_accurate(got, define(torch.float32).to(dtype), define(torch.float64))
    again = ops.spmm(x, diffs, rows=groups, add_to=y, transposed=transposed, backend="triton")
    assert torch.equal(got, again)


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_later_calls_wait_for_nothing(batch):
    diffs = [random_diff(768, 768, 0.01, skewed=True), random_diff(768, 768, 0.01)]
    table = random_diff(5000, 768, 0.01)
    x = torch.randn(batch, 8, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(0, 5000, (batch, 8), device="cuda")
    groups = groups_of(batch)
    assert ops.resolve_backend("segment_spmm", x, diffs[0].values) == "triton"

    def step():
        out = ops.spmm(x, diffs, rows=groups, add_to=x)
        out = ops.embedding_diff(out, ids, table)
        out.sum().backward()

    step()  # lays the diffs out and compiles
    step()  # addresses settle
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_far_below_a_dense_weight():
    diff = random_diff(16_384, 16_384, 0.001)
    x = torch.randn(4, 16_384, device="cuda", dtype=torch.bfloat16)
    y = torch.randn(4, 16_384, device="cuda", dtype=torch.bfloat16)
    ops.spmm(x, diff, add_to=y)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.spmm(x, diff, add_to=y)
    used = torch.cuda.max_memory_allocated() - before
    limit = 8 << 20
    assert limit < 2 * 16_384 * 16_384, "the check must be able to fail"
    assert used < limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_model_under_the_kernels_is_the_model_on_the_reference(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(100, 64), nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 50)
    )
    adapters = {}
    for seed, name in enumerate("ab"):
        diffs = {
            n: SparseDiff.from_dense(torch.randn(p.shape) * (torch.rand(p.shape) < 0.2) * 0.1)
            for n, p in model.named_parameters()
        }
        adapters[name] = Adapter(diffs, name=f"{name}{seed}")
    model = model.to("cuda", dtype)
    ids = torch.randint(0, 100, (6, 40), device="cuda")
    found = {}
    with SeparateComposer(model, adapters) as handle, torch.no_grad():
        for backend in ("reference", "triton"):
            with ops.backend(backend), handle.rows(["a", None, "b", ["a", "b"], "b", "a"]):
                found[backend] = model(ids)
        with handle.rows(["a", None, "b", ["a", "b"], "b", "a"]):
            model(ids)
            torch.cuda.set_sync_debug_mode("error")
            try:
                model(ids)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found["triton"], found["reference"])
