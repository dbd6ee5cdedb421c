"""Masks that move under DistributedDataParallel: alike on all ranks, and as in one process."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from sparseft.errors import AttachError
from sparseft.training import Reselection

HERE = Path(__file__).resolve().parent


def beside(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kit = beside(HERE / "_ddp.py")
accuracy = beside(HERE.parent / "_accuracy.py")


def train(rank, optimizer="adamw", dtype=torch.float32, alone=False):
    """12 steps, three rounds; all rows in one process where alone."""
    model = kit.make("causal", dtype)
    base = kit.bits(model)
    sparse = kit.attached(model, group=False if alone else None)
    before = {name: p.indices for name, p in sparse.patterns.items()}
    opt = kit.OPTIMIZERS[optimizer](sparse.parameters())
    wrapped = model if alone else DistributedDataParallel(model)
    moving = Reselection(
        sparse, steps=12, every=3, accumulate=2, rate=0.3, group=False if alone else None
    )
    for step in range(12):
        opt.zero_grad()
        wrapped(*(kit.batch(step) if alone else kit.part_of(rank, step))).backward()
        moving.step(opt)
        opt.step()
    result = {
        "trained": {name: leaf.detach().clone() for name, leaf in sparse.leaves.items()},
        "patterns": {name: p.indices for name, p in sparse.patterns.items()},
        "model": kit.bits(model),
        "moved": moving.moved,
        "rounds": moving.rounds,
        "kept": all(torch.equal(before[n], p.indices) for n, p in sparse.patterns.items()),
    }
    sparse.detach()
    return result | {"restored": kit.same(kit.bits(model), base)}


@pytest.mark.parametrize(
    ("world_size", "optimizer"),
    [(2, "sparse_adamw"), pytest.param(4, "adamw", marks=pytest.mark.slow)],
)
def test_masks_move_alike_and_as_in_one_process(world_size, optimizer, run_ranks):
    first, *others = run_ranks(train, world_size, optimizer)
    one = train(0, optimizer, alone=True)
    exact = train(0, optimizer, torch.float64, alone=True)
    for other in others:
        for key in ("trained", "patterns", "model"):
            assert kit.same(first[key], other[key]), f"bits of {key}"
    assert kit.same(first["patterns"], one["patterns"])
    assert kit.same(one["patterns"], exact["patterns"])
    assert (first["rounds"], first["moved"]) == (one["rounds"], one["moved"])
    assert first["rounds"] == 3
    assert not first["kept"]
    assert first["restored"]
    flat = [
        torch.cat([leaf.flatten() for leaf in run["trained"].values()])
        for run in (first, one, exact)
    ]
    accuracy.assert_as_accurate(*flat)


def apart(rank):
    """What is said where masks would not move alike, or to other counts."""
    model = kit.make("causal")
    sparse = kit.attached(model)
    opt = kit.OPTIMIZERS["adamw"](sparse.parameters())
    wrapped = DistributedDataParallel(model)
    said = {}

    def refused(name, call):
        try:
            call()
        except AttachError as error:
            said[name] = str(error)

    refused("scope", lambda: Reselection(sparse, steps=12, scope="global"))
    more = torch.ones_like(model.inputs.weight) > 0
    refused("count", lambda: sparse.reselect_({"inputs.weight": more}, optimizer=opt))
    with kit.attached(kit.make("causal"), group=False) as alone:
        said["alone"] = alone.reselect_({"inputs.weight": more}, optimizer=None)
    with torch.no_grad():  # as if rank 1 had gone its own way
        leaf = sparse.leaves["inputs.weight"]
        leaf.add_(rank * torch.randn(leaf.shape))
    moving = Reselection(sparse, steps=12, every=1, accumulate=1, rate=0.4)
    wrapped(*kit.part_of(rank, 0)).backward()
    indices = sparse.patterns["inputs.weight"].indices
    refused("moves", lambda: moving.step(opt))
    said["stay"] = torch.equal(indices, sparse.patterns["inputs.weight"].indices)
    return said


def test_ranks_apart_and_other_counts_are_named(run_ranks):
    for said in run_ranks(apart, 2):
        assert "scope='tensor'" in said["scope"]
        assert "'inputs.weight'" in said["count"]
        assert said["alone"] > 0, "of a process that trains alone counts may change"
        assert "disagree on the new mask of 'inputs.weight'" in said["moves"]
        assert "rank 1 against rank 0" in said["moves"]
        assert said["stay"], "refused before anything moved"
