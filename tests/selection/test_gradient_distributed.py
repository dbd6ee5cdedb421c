"""Two processes with other batches choose the same entries, those of all batches together."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import datetime, os, sys
import torch
import torch.nn.functional as F
from torch import nn
from sparseft import select
from sparseft.errors import SparseFtError
from sparseft.modules import GradientScores

store, out = sys.argv[1:]
other = os.fork()  # torch is imported once for both
rank = int(other == 0)
torch.distributed.init_process_group(
    "gloo", init_method="file://" + store, rank=rank, world_size=2,
    timeout=datetime.timedelta(seconds=60),
)
torch.manual_seed(0)
class Net(nn.Sequential):
    def forward(self, ids):
        x = self[2](self[1](self[0](ids)))
        return F.cross_entropy(self[3](x).flatten(0, 1), ids.roll(1, 1).flatten())

model = Net(nn.Embedding(11, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 11))
model[3].weight = model[0].weight
model.add_module("other", nn.Linear(8, 8))
data = torch.randint(0, 11, (5, 4, 6))

def loss_fn(model, ids):
    return model(ids)

def through_other(model, ids):
    return model.other(model[0](ids)).square().sum()

mine = list(data[rank::2])  # three batches here, two there
found = {}
ways = (("fisher", {}), ("gradient", {"kind": "sum"}), ("gradient", {"kind": "snip"}))
for method, options in ways:
    for shortlist in (None, 2):
        masks = select(model, method, nnz=40, batches=mine, loss_fn=loss_fn, exclude="other.*",
                       shortlist=shortlist, **options)
        key = method + options.get("kind", "") + str(shortlist)
        found[key] = {n: p.indices for n, p in masks.items()}
        if shortlist is None:
            alone = select(model, method, nnz=40, batches=list(data), loss_fn=loss_fn,
                           exclude="other.*", shortlist=None, group=False, **options)
            found["alone " + key] = {n: p.indices for n, p in alone.items()}

# Wrapped for training: the wrapper has no part in it.
ddp = nn.parallel.DistributedDataParallel(model)
masks = select(ddp, "fisher", nnz=40, batches=mine, loss_fn=loss_fn, exclude="other.*",
               shortlist=None)
found["fisherNone"] = {n: p.indices for n, p in masks.items()}

# Candidates are the best of both first batches together, though neither has that sum.
for statistic in ("sum", "square"):
    with GradientScores(model, ["0.weight", "1.weight"], statistic=statistic,
                        candidates={"0.weight": 9, "1.weight": 9}) as scores:
        for ids in mine:
            loss_fn(model, ids).backward()
            scores.step()
    found[statistic] = scores.finish()
    assert scores.batches == 5
    parts = [torch.autograd.grad(loss_fn(model, ids), [model[0].weight, model[1].weight])
             for ids in data]
    for i, name in enumerate(("0.weight", "1.weight")):
        grads = torch.stack([p[i].flatten() for p in parts])
        grads = grads.square() if statistic == "square" else grads
        best = grads[:2].sum(0).abs().topk(9).indices.sort().values
        indices, sums = found[statistic][name]
        assert torch.equal(indices.long(), best), (statistic, name)
        assert torch.allclose(sums, grads.sum(0)[best], rtol=1e-4, atol=1e-6), (statistic, name)

def refused(message, **options):
    try:
        select(model, "fisher", nnz=5, **options)
    except SparseFtError as error:
        assert message in str(error), error
    else:
        raise AssertionError("no error: " + message)

# First batches through other layers: said on both sides, nobody waits for ever.
refused("this one is at", batches=mine, loss_fn=(loss_fn, through_other)[rank], shortlist=1)
refused("this one is at", batches=mine if rank else [], loss_fn=loss_fn, shortlist=1)
refused("there are no batches", batches=[], loss_fn=loss_fn)
# Without a shortlist no agreement is needed before the end.
masks = select(model, "fisher", nnz=150, scope="tensor", batches=mine,
               loss_fn=(loss_fn, through_other)[rank])
found["apart"] = {n: p.indices for n, p in masks.items()}
torch.save(found, f"{out}/{rank}.pt")
torch.distributed.destroy_process_group()
if other:
    assert os.waitpid(other, 0)[1] == 0, "the other rank failed"
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo here")
def test_two_ranks_choose_as_one(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(tmp_path / "store"), str(tmp_path)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    zero, one = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for key, tensors in zero.items():
        for name, value in tensors.items():
            pairs = (
                zip(value, one[key][name], strict=True)
                if isinstance(value, tuple)
                else ((value, one[key][name]),)
            )
            for mine, theirs in pairs:
                assert torch.equal(mine, theirs), (key, name)
        alone = zero.get(f"alone {key}")
        if alone is not None:
            assert all(torch.equal(value, alone[name]) for name, value in tensors.items()), key
    for name in ("other.weight", "1.weight"):  # each seen by one rank only
        kept = zero["apart"][name]
        assert not torch.equal(kept, torch.arange(kept.numel()).to(kept)), name
