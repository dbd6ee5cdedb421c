"""DistributedDataParallel over two processes: leaves are reduced, weights agree."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import sys
import torch
from torch import nn
from sparseft import attach

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 11))
model[3].weight = nn.Parameter(torch.randn(11, 6))
base = [p.detach().clone() for p in model.parameters()]
masks = {n: torch.rand_like(p) < 0.4 for n, p in model.named_parameters()}
sparse = attach(model, masks)
optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
ddp = nn.parallel.DistributedDataParallel(model)
data = torch.randint(0, 11, (8, 5))
for step in range(4):
    optimizer.zero_grad()
    part = data[rank::2]  # each rank its half
    nn.functional.cross_entropy(ddp(part).flatten(0, 1), part.flatten()).backward()
    optimizer.step()
weights = {n: m.weight.detach() for n, m in sparse._masked.items()}
torch.save({"leaves": dict(sparse.leaves), "weights": weights}, f"{out}/{rank}.pt")
if rank == 0:  # one process on the whole batch
    sparse.detach()
    sparse = attach(model, masks)
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
    for step in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data).flatten(0, 1), data.flatten()).backward()
        optimizer.step()
    torch.save(dict(sparse.leaves), f"{out}/single.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo here")
def test_two_ranks_train_as_one(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store"), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    zero, one = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    single = torch.load(tmp_path / "single.pt", weights_only=True)
    for name, leaf in zero["leaves"].items():
        assert torch.equal(leaf, one["leaves"][name]), name
        assert torch.equal(zero["weights"][name], one["weights"][name]), name
        # The mean over ranks is the mean over the batch, up to the order of summation.
        assert torch.allclose(leaf, single[name], rtol=1e-3, atol=1e-5), name
        assert leaf.abs().max() > 0, name
