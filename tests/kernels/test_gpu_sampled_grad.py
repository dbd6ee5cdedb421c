"""Sampled gradients on a GPU at the sizes of real layers: accuracy, repeats, syncs, memory."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from sparseft import ops
from sparseft.diff import SparsePattern

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_launcher")]

# Weight (out, in) of linear layers, and the tokens of a step.
LAYERS = [
    pytest.param(768, 768, 4096, id="xlmr-base-query"),
    pytest.param(3072, 768, 4096, id="xlmr-base-up"),
    pytest.param(1024, 4096, 16384, id="xlmr-large-down"),
    pytest.param(250_002, 768, 515, id="xlmr-base-head"),
    pytest.param(1024, 512, 4097, id="mt5-small-up"),
    pytest.param(250_112, 512, 512, id="mt5-small-head"),
    pytest.param(4096, 4096, 4096, id="llama-7b-query"),
    pytest.param(11_008, 4096, 4096, id="llama-7b-gate"),
    pytest.param(4096, 11_008, 1000, id="llama-7b-down"),
]
DENSITIES = [0.0001, 0.001, 0.01, 0.05, 0.1, 1.0]


def _load(name: str):
    path = Path(__file__).resolve().parent.parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


assert_as_accurate = _load("_accuracy").assert_as_accurate


def random_pattern(rows: int, cols: int, density: float) -> SparsePattern:
    if density == 1.0:
        flat = torch.arange(rows * cols, dtype=torch.int32, device="cuda")
        return SparsePattern._trusted(flat, (rows, cols))
    kept = [
        (torch.rand(part, device="cuda") < density).nonzero().view(-1) + start
        for start in range(0, rows * cols, 1 << 26)
        for part in [min(1 << 26, rows * cols - start)]
    ]
    return SparsePattern._trusted(torch.cat(kept).to(torch.int32), (rows, cols))


def sampled_dots(dy, x, flat, cols, dtype):
    """The definition at a few entries: a dense float64 gradient of a head would be 1.5 GB."""
    row, col = flat.long() // cols, flat.long() % cols
    left, right = dy[:, row].to(dtype), x[:, col].to(dtype)
    return (left * right).sum(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(("rows", "cols", "tokens"), LAYERS)
def test_real_layers(rows, cols, tokens, density, dtype):
    if dtype == torch.float32 and density not in (0.001, 0.05):
        pytest.skip("fp32 runs at one density of each way")
    dy = torch.randn(tokens, rows, device="cuda").to(dtype)
    x = torch.randn(tokens, cols, device="cuda").to(dtype)
    pattern = random_pattern(rows, cols, density)
    got = ops.sampled_weight_grad(dy, x, pattern, backend="triton")
    assert not got.isnan().any()
    some = torch.randint(0, pattern.nnz, (4096,), device="cuda")
    flat = pattern.indices[some]
    exact = sampled_dots(dy, x, flat, cols, torch.float64)
    # torch's own matmul in fp32, a band of 128 rows: it sums in the order a GEMM does
    band = (dy[:, :128].float().t() @ x.float()).flatten()
    band_exact = (dy[:, :128].double().t() @ x.double()).flatten()
    scale = exact.square().mean().sqrt() / band_exact.square().mean().sqrt()
    theirs = exact + (band - band_exact)[: exact.numel()] * scale
    assert_as_accurate(got[some], theirs, exact)
    again = ops.sampled_weight_grad(dy, x, pattern, backend="triton")
    assert torch.equal(got, again)


@pytest.mark.parametrize("density", [0.0005, 0.01])
def test_later_steps_wait_for_nothing(density):
    dy = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    pattern = random_pattern(4096, 4096, density)
    out = torch.zeros(pattern.nnz, device="cuda")
    table = random_pattern(250_002, 4096, 0.0001)
    ids = torch.randint(0, 250_002, (4096,), device="cuda")
    tensors = (dy, x, pattern.indices)
    assert ops.resolve_backend("sampled_weight_grad", *tensors) == "triton"

    def step():
        ops.sampled_weight_grad(dy, x, pattern)
        ops.sampled_weight_grad(dy, x, pattern, out=out)
        ops.sampled_embedding_grad(dy, ids, table)

    step()  # lays the masks out and compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("density", [0.0005, 0.01])
def test_memory_of_a_step_is_far_below_a_dense_gradient(density):
    dy = torch.randn(64, 16_384, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(64, 16_384, device="cuda", dtype=torch.bfloat16)
    pattern = random_pattern(16_384, 16_384, density)
    ops.sampled_weight_grad(dy, x, pattern)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.sampled_weight_grad(dy, x, pattern)
    used = torch.cuda.max_memory_allocated() - before
    limit = 8 * pattern.nnz + (64 << 20)
    assert limit < 2 * 16_384 * 16_384, "the check must be able to fail"
    assert used < limit


def test_a_captured_graph_replays_the_gradient():
    dy = torch.randn(4096, 768, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(4096, 768, device="cuda", dtype=torch.bfloat16)
    pattern = random_pattern(768, 768, 0.05)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        ops.sampled_weight_grad(dy, x, pattern)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.sampled_weight_grad(dy, x, pattern)
    dy.copy_(torch.randn_like(dy))
    graph.replay()
    assert torch.equal(got, ops.sampled_weight_grad(dy, x, pattern))
