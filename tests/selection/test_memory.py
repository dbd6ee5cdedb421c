"""Peak extra memory of a selection does not grow with the model."""

from __future__ import annotations

import gc
import tracemalloc

import pytest
import torch
from torch import nn

from sparseft import select
from sparseft.selection import options_of


def peak_bytes(run) -> int:
    """Return the peak of live bytes in ``run``: torch's by the profiler, numpy's by tracemalloc."""
    gc.collect()
    tracemalloc.start()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = run()
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    del kept
    return peak + python


def dense(model, base, nnz):
    """What others do: all differences at once."""
    old = torch.cat([base[n].reshape(-1) for n, _ in model.named_parameters()])
    new = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return torch.topk((new - old).abs(), nnz).indices


NNZ = 50_000


@pytest.fixture(scope="module")
def models():
    """Models of 3 and 6 Mi entries (12 and 24 MiB), one large tensor in each."""
    made = {}
    for size in (3, 6):
        generator = torch.Generator().manual_seed(size)
        model = nn.ParameterDict(
            {
                "large": nn.Parameter(torch.randn(size * 1024 - 1024, 1024, generator=generator)),
                **{
                    f"small{i}": nn.Parameter(torch.randn(256, 1024, generator=generator))
                    for i in range(4)
                },
            }
        )
        base = {n: p.detach() + 0.01 for n, p in model.named_parameters()}
        made[size] = (model, base)
    return made


@pytest.mark.parametrize(
    ("method", "scope"),
    [
        ("magnitude", "global"),
        ("magnitude", "row"),
        ("random", "global"),
        ("rows", "global"),
        ("tiles", "global"),
        pytest.param("blocks", "global", marks=pytest.mark.slow),
        pytest.param("tiles", "tensor", marks=pytest.mark.slow),
        pytest.param("magnitude", "tensor", marks=pytest.mark.slow),
        pytest.param("random", "tensor", marks=pytest.mark.slow),
        pytest.param("random", "row", marks=pytest.mark.slow),
    ],
)
def test_the_same_extra_for_a_model_twice_the_size(models, method, scope):
    peaks = {}
    for size, (model, base) in models.items():
        given = {"base": base} if "base" in options_of(method) else {}
        peaks[size] = peak_bytes(
            lambda m=model, g=given: select(m, method, nnz=NNZ, scope=scope, **g)
        )
    small, large = models[3][0], models[6][0]
    grown = sum(p.numel() for p in large.parameters()) - sum(p.numel() for p in small.parameters())
    assert peaks[6] < 40 * 2**20, "a few pieces of a million entries, 8 bytes each, and the result"
    assert peaks[6] - peaks[3] < 0.25 * grown, "a byte per entry would be 1.0"


def test_the_measure_sees_a_dense_selection(models):
    """Else the test above could pass by measuring nothing."""
    peaks = {s: peak_bytes(lambda m=m, b=b: dense(m, b, NNZ)) for s, (m, b) in models.items()}
    assert peaks[6] > 44 * 2**20
    assert peaks[6] - peaks[3] > 8 * 3 * 2**20
