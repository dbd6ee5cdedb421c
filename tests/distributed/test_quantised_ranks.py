"""Quantised bases in several processes: DistributedDataParallel reduces the leaves alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import sparseft

_spec = importlib.util.spec_from_file_location(
    "_quantised", Path(__file__).resolve().parent.parent / "_quantised.py"
)
q = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(q)

# Each process imports bitsandbytes anew, which takes longer than the rest.
SCHEMES = [
    q.SCHEMES[4],
    *(
        pytest.param(*q.SCHEMES[i].values, marks=[*q.SCHEMES[i].marks, pytest.mark.slow])
        for i in (1, 3)
    ),
]
X = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))


def train(rank, scheme, world_size):
    model = q.net(scheme).train()
    before = q.dense_twin(model).state_dict()
    sparse = sparseft.attach(model, q.draw_masks(model))
    optimizer = sparseft.SparseAdamW(sparse.parameters(), lr=1e-2)
    reduced, parallel = [], model
    if world_size > 1:
        # torchao's tensors cannot be broadcast; attach has compared the bases of all ranks.
        sync = not scheme.startswith("torchao")
        parallel = DistributedDataParallel(model, init_sync=sync)

        def count(state, bucket):
            reduced.append(bucket.buffer().nbytes)
            future = torch.futures.Future()
            torch.distributed.all_reduce(bucket.buffer().div_(world_size))
            future.set_result(bucket.buffer())
            return future

        parallel.register_comm_hook(None, count)
    for _ in range(3):
        parallel(X.chunk(world_size)[rank]).pow(3).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(reduced) == (4 * sparse.nnz * 3 if world_size > 1 else 0)
    leaves = {name: leaf.detach().clone() for name, leaf in sparse.leaves.items()}
    sparse.detach()
    after = q.dense_twin(model).state_dict()
    return leaves, all(torch.equal(t, after[n]) for n, t in before.items())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_processes_train_as_one(run_ranks, scheme):
    alone, _ = train(0, scheme, 1)
    for leaves, untouched in run_ranks(train, 2, scheme, 2):
        assert untouched
        for name, leaf in leaves.items():
            assert (leaf - alone[name]).norm() <= 1e-3 * alone[name].norm()


def attach_to(rank, schemes):
    model = q.net(schemes[rank])
    masks = q.draw_masks(model)
    try:
        sparseft.attach(model, masks)
    except sparseft.errors.AttachError as wrong:
        return str(wrong)
    return "attached"


@pytest.mark.slow
@q.needs("bitsandbytes")
def test_other_bases_are_refused(run_ranks):
    said = run_ranks(attach_to, 2, ["bnb.nf4", "bnb.fp4"])
    assert said[0] == said[1]
    assert "ranks disagree on the base weights at the mask of '0.weight'" in said[0]
