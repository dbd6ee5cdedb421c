"""Compositions at real sizes on a GPU: XLM-R base's shapes, memory, graphs, no waiting."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparseft import Adapter, Composer, SparseDiff, ops
from sparseft.composition.writer import PackedWriter
from sparseft.diff import SparsePattern
from sparseft.ops.combine import Rule
from sparseft.ops.compose import compose_many_, restore_many_
from sparseft.ops.packed import PackedTerm, PackedUnion
from sparseft.ops.union import union_of

pytestmark = pytest.mark.gpu

# A layer of XLM-R base and its embedding.
SHAPES = [(768, 768)] * 4 + [(3072, 768), (768, 3072), (3072,), (768,), (250_002, 768)]


class Weights(nn.Module):
    def __init__(self, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        for i, shape in enumerate(SHAPES):
            w = torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02)
            self.register_parameter(f"w{i:02d}", nn.Parameter(w))


def random_adapter(seed: int, density: float) -> Adapter:
    g = torch.Generator("cuda").manual_seed(seed)
    diffs = {}
    for i, shape in enumerate(SHAPES):
        numel = torch.Size(shape).numel()
        at = torch.randint(numel, (int(density * numel) + 1,), device="cuda", generator=g).unique()
        values = torch.randn(at.shape, device="cuda", generator=g) * 1e-3
        diffs[f"w{i:02d}"] = SparseDiff(at.int(), values, torch.Size(shape))
    return Adapter(diffs, name=f"a{seed}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["linear", "ties", "magnitude_max", "consensus"])
def test_real_shapes_give_the_definitions_bits(method, dtype):
    torch.manual_seed(0)
    model = Weights(dtype, "cuda")
    adapters = {f"x{i}": random_adapter(i, 0.0276) for i in range(3)}
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    composer = Composer(model, adapters)
    found = []
    for coeffs in ({"x0": 1, "x1": 1}, {"x0": 0.3, "x1": -1.5}, {"x2": 1, "x1": 1, "x0": 0.1}):
        composer.switch(coeffs, method=method)
        assert all(isinstance(w, PackedWriter) for w in composer._placement._writers)
        found.append((coeffs, {n: p.detach().clone() for n, p in model.named_parameters()}))
    composer.revert()
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())
    with ops.backend("reference"):
        plain = Composer(model, adapters)
        for coeffs, got in found:
            plain.switch(coeffs, method=method)
            assert all(torch.equal(p, got[n]) for n, p in model.named_parameters()), coeffs
        plain.revert()


def test_a_switch_takes_no_memory_of_the_models_size():
    model = Weights(torch.float32, "cuda")
    adapters = {f"x{i}": random_adapter(i, 0.01) for i in range(2)}
    composer = Composer(model, adapters)
    size = sum(p.numel() * 4 for p in model.parameters())
    composer.switch(["x0", "x1"])
    composer.revert()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    composer.switch(["x0", "x1"])
    composer.switch({"x0": 0.5, "x1": 2})
    composer.revert()
    used = torch.cuda.max_memory_allocated() - before
    assert used < 0.06 * size, f"{used} of {size} bytes"


def test_a_captured_graph_switches_and_reverts():
    weights = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in SHAPES[:5]]
    before = [w.clone() for w in weights]
    indices, terms = [], []
    for i, w in enumerate(weights):
        lists = [torch.randint(w.numel(), (5000,), device="cuda").unique().int() for _ in range(2)]
        union, places = union_of(lists)
        indices.append(union)
        terms.append(
            [
                PackedTerm(k, torch.randn(len(x), device="cuda") + i, p)
                for k, (x, p) in enumerate(zip(lists, places, strict=True))
            ]
        )
    union = PackedUnion.pack(indices, terms, 2)
    saved, state = union.empty(torch.bfloat16), torch.zeros(2, dtype=torch.int32, device="cuda")

    def on():
        compose_many_(weights, union, [1.0, 0.5], Rule(), saved=saved, base=None, state=state)

    def off():
        restore_many_(weights, union, saved)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        on()
        composed = [w.clone() for w in weights]
        off()
    torch.cuda.current_stream().wait_stream(side)
    graphs = []
    for step in (on, off):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            step()
    for _ in range(2):
        graphs[0].replay()
        assert all(torch.equal(a, b) for a, b in zip(weights, composed, strict=True))
        graphs[1].replay()
        assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_gradients_of_coefficients_of_a_large_weight():
    """The same bits every time, and near the sum in fp64."""
    weight = torch.randn(3072, 768, device="cuda").requires_grad_()
    diffs = []
    for _ in range(8):
        at = torch.randint(weight.numel(), (100_000,), device="cuda").unique()
        pattern = SparsePattern.from_indices(at, weight.shape)
        diffs.append(SparseDiff.from_pattern(pattern, torch.randn(pattern.nnz, device="cuda")))
    packed, upstream = ops.pack_diffs(diffs), torch.randn_like(weight)
    grads = []
    for _ in range(2):
        coeffs = torch.ones(8, device="cuda", requires_grad=True)
        ops.compose_diffs(weight, diffs, coeffs, packed=packed).backward(upstream)
        grads.append(coeffs.grad)
    assert torch.equal(grads[0], grads[1])
    flat = upstream.double().view(-1)
    exact = torch.stack([(flat[d.indices.long()] * d.values.double()).sum() for d in diffs])
    size = torch.stack([(flat[d.indices.long()] * d.values.double()).norm() for d in diffs])
    assert ((grads[0] - exact).abs() < 1e-5 * size).all()
