"""DistributedDataParallel: several processes train as one, and reduce nnz numbers and the heads.

What "as one" means: the mean of the ranks' gradients is the batch's but for the order of sums, so
against a run in float64 several processes may be off by as much as one process is.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

HERE = Path(__file__).resolve().parent


def beside(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kit = beside(HERE / "_ddp.py")
accuracy = beside(HERE.parent / "_accuracy.py")

CASES = [
    ("classifier", "adamw"),
    ("classifier", "sgd"),
    ("masked_lm", "sparse_adamw"),
    ("masked_lm", "fused"),
    ("causal", "adamw"),
    ("causal", "sparse_adamw"),
]


def train(rank, cases, steps):
    results = []
    for kind, optimizer in cases:
        model = kit.make(kind)
        base = kit.bits(model)
        sparse = kit.attached(model)
        opt = kit.OPTIMIZERS[optimizer](sparse.parameters())
        wrapped = DistributedDataParallel(model)
        sizes = kit.counted(wrapped)
        for step in range(steps):
            opt.zero_grad()
            wrapped(*kit.part_of(rank, step)).backward()
            opt.step()
        result = {
            "trained": {name: p.detach().clone() for name, p in sparse.named_parameters()},
            "model": kit.bits(model),
            "bytes": sum(sizes) / steps,
            "wanted": 4 * sparse.nnz + 4 * sum(p.numel() for p in sparse.full_params.values()),
            "dense": 4 * sum(p.numel() for p in model.parameters()),
            "adapter": sparse.adapter().digest,
        }
        sparse.detach(restore=True)
        results.append(result | {"restored": kit.same(kit.bits(model), base)})
    return results


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [(2, CASES[::2]), (4, CASES[3:4]), pytest.param(4, CASES, marks=pytest.mark.slow)],
)
def test_several_processes_train_as_one(world_size, cases, run_ranks):
    ranks = run_ranks(train, world_size, cases, 3)
    for i, (kind, optimizer) in enumerate(cases):
        first, *others = (results[i] for results in ranks)
        for other in others:
            assert kit.same(other["trained"], first["trained"]), "bits of the diffs"
            assert kit.same(other["model"], first["model"]), "bits of the weights"
            assert other["adapter"] == first["adapter"]
        for results in ranks:
            assert results[i]["restored"]
            assert results[i]["bytes"] == results[i]["wanted"], "4 nnz, and the head's"
            assert results[i]["bytes"] < results[i]["dense"] / 4
        one = kit.single(kind, optimizer)
        exact = kit.single(kind, optimizer, torch.float64)
        every = [
            torch.cat([v.flatten() for v in trained.values()])
            for trained in (first["trained"], one.trained, exact.trained)
        ]
        accuracy.assert_as_accurate(*every, name=f"{kind} {optimizer}")
        assert any(value.abs().max() > 0.01 for value in first["trained"].values())
