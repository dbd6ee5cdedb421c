"""What one of N processes keeps of a sharded base with masks: 1/N of the base, all that is trained.

Measured as the bytes of every tensor storage alive, between two steps.
"""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import sparseft
from sparseft.modules.weight_storage import own_rows

WIDTH, LAYERS = 512, 4
KEPT = 1 / 50


def alive():
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # By type: what asks for __class__ may answer with a warning.
        if issubclass(type(thing), torch.Tensor) and not issubclass(type(thing), DTensor):
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def warm():
    """Have made what is made once: on CPUs the tile of a weight gradient that is used again."""
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    sparse = sparseft.attach(layer, {"weight": torch.rand(WIDTH, WIDTH) < KEPT}, group=False)
    layer(torch.ones(2, WIDTH)).sum().backward()
    sparse.detach()


def kept(rank, world):
    warm()
    start = alive()
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    base = alive() - start
    mesh = init_device_mesh("cpu", (world,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    shards = sum(own_rows(p).local.untyped_storage().nbytes() for p in model.parameters())
    cut = alive() - start

    masks = {f"{i}.weight": torch.rand(WIDTH, WIDTH) < KEPT for i in range(LAYERS)}
    sparse = sparseft.attach(model, masks)
    del masks
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, WIDTH)).sum().backward()
        optimizer.step()
    return base, shards, cut, alive() - start, sparse.nnz, sparse.reduction.bytes_reduced


@pytest.mark.slow
def test_a_process_keeps_its_share_of_the_base_and_all_that_is_trained(run_ranks):
    for base, shards, cut, total, nnz, reduced in run_ranks(kept, 2, 2):
        assert base == LAYERS * WIDTH * WIDTH * 4
        assert shards == base / 2
        assert 0 <= cut - shards < 1000
        # Index, base, diff, gradient and two moments an entry; places of the entries in own rows.
        trained = nnz * (4 + 4 + 4 + 4 + 8) + nnz / 2 * 4
        assert abs(total - shards - trained) < 0.05 * trained
        assert reduced == 4 * (nnz + LAYERS)
