"""Moving masks in several processes: alike on all ranks, or an error that says why not."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparseft import attach
from sparseft.errors import AttachError
from sparseft.modules import repattern
from sparseft.training import Reselection, reselection

_spec = importlib.util.spec_from_file_location("_moving", Path(__file__).with_name("_moving.py"))
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)


SCRIPT = """
import sys
import torch
from torch import nn
from sparseft import attach
from sparseft.errors import AttachError
from sparseft.training.reselection import Reselection

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(31, 12), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 31))
model[3].weight.data.mul_(3)
base = {n: p.detach().clone() for n, p in model.named_parameters()}
masks = {n: torch.rand_like(p) < 0.2 for n, p in model.named_parameters() if p.ndim > 1}
sparse = attach(model, masks)
optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
ddp = nn.parallel.DistributedDataParallel(model)
try:
    Reselection(sparse, steps=12, scope="global")
    refused = ""
except AttachError as error:
    refused = str(error)
moving = Reselection(sparse, steps=12, every=4, accumulate=2, rate=0.4)
torch.manual_seed(rank)
for step in range(12):
    optimizer.zero_grad()
    data = torch.randint(0, 31, (8, 5))  # other data on each rank
    nn.functional.cross_entropy(ddp(data).flatten(0, 1), data.flatten()).backward()
    moving.step(optimizer)
    optimizer.step()
weights = {n: m.weight.detach().clone() for n, m in sparse._masked.items()}
patterns = {n: p.indices for n, p in sparse.patterns.items()}
changed = sum((~masks[n].flatten()[i.long()]).sum().item() for n, i in patterns.items())
try:
    sparse.reselect_({"1.weight": torch.ones(16, 12) > 0}, optimizer=optimizer)
    resized = ""
except AttachError as error:
    resized = str(error)
with torch.no_grad():  # as if rank 1 had gone its own way
    sparse.leaves["1.weight"].add_(rank * torch.randn(sparse.leaves["1.weight"].shape))
apart = ""
moving.close()
moving = Reselection(sparse, steps=12, every=2, accumulate=1, rate=0.4)
try:
    for step in range(2):
        nn.functional.cross_entropy(ddp(data).flatten(0, 1), data.flatten()).backward()
        moving.step(optimizer)
except AttachError as error:
    apart = str(error)
sparse.detach()
restored = all(torch.equal(p, base[n]) for n, p in model.named_parameters())
torch.save({"weights": weights, "patterns": patterns, "changed": changed, "refused": refused,
            "resized": resized, "apart": apart, "restored": restored}, f"{out}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_what_several_processes_cannot_do_is_named(monkeypatch):
    student, _, _, start = kit.teacher_and_student()
    sparse = attach(student, start)
    monkeypatch.setattr(reselection, "processes", lambda group=None: 2)
    with pytest.raises(AttachError, match=r"scope='global' .* 2 processes .* scope='tensor'"):
        Reselection(sparse, steps=10, scope="global")
    monkeypatch.setattr(repattern, "processes", lambda: 2)
    more = ~start["layer.weight"]
    with pytest.raises(AttachError, match=r"'layer.weight': 80 entries cannot become 688"):
        sparse.reselect_({"layer.weight": more}, optimizer=None)


@pytest.mark.slow  # two processes that import torch
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo here")
def test_two_ranks_move_their_masks_alike(tmp_path):
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
    assert zero["changed"] > 20
    for name, weight in zero["weights"].items():
        assert torch.equal(weight, one["weights"][name]), name
        assert torch.equal(zero["patterns"][name], one["patterns"][name]), name
    for result in (zero, one):
        assert "scope='tensor'" in result["refused"]
        assert "'1.weight'" in result["resized"]
        assert "ranks disagree on the new mask of '1.weight'" in result["apart"]
        assert result["restored"]
