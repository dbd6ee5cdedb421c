"""P1 at allocator level: no op holds dW, and a dense implementation fails the same check."""

from __future__ import annotations

import pytest
import torch

from sparseft import ops
from sparseft.diff import SparsePattern
from sparseft.ops._layout import TILE
from sparseft.ops.sampled_grad import sampled_weight_grad_reference

TOKENS, ROWS, COLS = 8, 6000, 1500  # dW: 36 MB; activations: 0.24 MB


def peak_bytes(run) -> int:
    """Return the most bytes torch's allocator held beyond the start of ``run``."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = run()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    del kept
    return most


def budget(nnz: int) -> int:
    """The tile, the result and index arithmetic on it, activation-sized scratch."""
    return 4 * TILE + 40 * nnz + 8 * TOKENS * (ROWS + COLS) * 4


@pytest.mark.parametrize("density", [0.001, 0.05])
def test_no_dense_gradient(density):
    mask = torch.rand(ROWS, COLS) < density
    pattern = SparsePattern.from_mask(mask)
    dy, x = torch.randn(TOKENS, ROWS), torch.randn(TOKENS, COLS)
    limit = budget(pattern.nnz)
    assert limit < 0.9 * 4 * ROWS * COLS, "the check must be able to fail"
    assert peak_bytes(lambda: ops.sampled_weight_grad(dy, x, pattern)) < limit
    dense = peak_bytes(lambda: sampled_weight_grad_reference(dy, x, pattern.indices))
    assert dense > limit, "a dense implementation must not pass"


def test_embedding_forms_nothing_of_the_table_s_size():
    pattern = SparsePattern.from_mask(torch.rand(ROWS, COLS) < 0.01)
    ids, dy = torch.randint(0, ROWS, (TOKENS,)), torch.randn(TOKENS, COLS)
    assert peak_bytes(lambda: ops.sampled_embedding_grad(dy, ids, pattern)) < budget(pattern.nnz)

    def dense():
        return torch.zeros(ROWS, COLS).index_add(0, ids, dy).flatten()[pattern.indices]

    assert peak_bytes(dense) > budget(pattern.nnz)


def test_writing_entries_makes_no_int64_copy_of_all_indices():
    weight = torch.randn(3000, 1000)
    pattern = SparsePattern.from_mask(torch.rand(3000, 1000) < 0.5)
    values = torch.randn(pattern.nnz)
    limit = 4 * pattern.nnz
    assert peak_bytes(lambda: ops.write_entries_(weight, pattern.indices, values)) < limit
    assert peak_bytes(lambda: pattern.indices.long()) > limit


def test_a_step_allocates_chunks_not_vectors():
    n = 2_000_000
    weight = torch.zeros(n)
    pattern = SparsePattern.from_mask(torch.ones(n, dtype=torch.bool))
    vectors = [torch.zeros(n) for _ in range(5)]

    def step():
        values, grad, m, v, base = vectors
        ops.adamw_step_(
            values, grad, m, v, weight, base, pattern.indices,
            lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=1,
        )  # fmt: skip

    assert peak_bytes(step) < n  # a quarter of one vector
