"""The harness itself: results by rank, and errors that name the rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist


def total(rank, by):
    tensor = torch.tensor([float(rank + by)])
    dist.all_reduce(tensor)
    return rank, tensor


def test_results_come_by_rank(run_ranks):
    results = run_ranks(total, 2, 10)
    assert [r for r, _ in results] == [0, 1]
    assert all(t.item() == 21 for _, t in results)


def fails_on_one(rank):
    if rank == 1:
        raise ValueError("nothing to do here")
    dist.barrier()


def test_an_error_names_its_rank(run_ranks):
    with pytest.raises(AssertionError, match="rank 1:[^$]*nothing to do here"):
        run_ranks(fails_on_one, 2)
