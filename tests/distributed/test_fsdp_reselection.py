"""Masks that move on a base that ``fully_shard`` has cut; adapters in, trained values kept."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

import sparseft
from sparseft.modules.weight_storage import full_value


def beside(name):
    path = Path(__file__).resolve().parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kit = beside("_fsdp")


def same(got, wanted, near=1e-9):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            got[name], value, atol=near, rtol=near, msg=lambda m, n=name: f"{n}: {m}"
        )


def moved(model, rank, world, make):
    """Train, move all masks (some to other counts), train: the handle, its optimizer, weights."""
    sparse = sparseft.attach(model, kit.masks(model))
    rule = make(sparse.parameters())
    kit.train(model, [rule], 2, rank=rank, world=world)
    # A gradient that is there moves, too.
    kit.loss_of(model, kit.own_part(kit.batches(1)[0], rank, world)).backward()
    masks = kit.masks(model, seed=2)
    if rank:  # names may come in any order
        masks = dict(reversed(masks.items()))
    grown = sparse.reselect_(masks, optimizer=rule)
    rule.step()
    rule.zero_grad()
    kit.train(model, [rule], 2, rank=rank, world=world)
    return sparse, grown


RULES = (
    lambda p: torch.optim.AdamW(p, lr=0.05),
    lambda p: sparseft.SparseAdamW(p, lr=0.05),
    lambda p: sparseft.SparseAdamW(p, lr=0.05, moment_bits=8),
)

DTYPES = (torch.float64, torch.float64, torch.float32)


def reselects(rank, expected):
    for number, make in enumerate(RULES):
        weights, grown_alone = expected[number]
        model = kit.shard(kit.net(DTYPES[number]))
        before = kit.whole(model)
        sparse, grown = moved(model, rank, 2, make)
        assert grown == grown_alone > 0
        kit.check_weights(sparse, before)
        near = 0.1 if number == 2 else 1e-9  # codes of 8 bits: a rounding may fall another way
        same(kit.whole(model), weights, near)
        sparse.detach()
        same(kit.whole(model), before, near=0)


def test_masks_move_as_in_one_process(run_ranks):
    expected = []
    for dtype, make in zip(DTYPES, RULES, strict=True):
        model = kit.net(dtype)
        _, grown = moved(model, 0, 1, make)
        expected.append((kit.whole(model), grown))
    run_ranks(reselects, 2, expected)


def moves_and_keeps(rank):
    model = kit.shard(kit.net())
    before = kit.whole(model)
    sparse = sparseft.attach(model, kit.masks(model), full_params=["head.*"])
    rules = [torch.optim.AdamW(g["params"], lr=0.05) for g in sparse.param_groups()]
    kit.train(model, rules, 2, rank=rank, world=2)
    adapter = sparse.adapter("learned")
    trained = kit.whole(model)

    sparse.detach(restore=False)
    kept = kit.whole(model)
    same(kept, {n: trained[n] for n in kept}, near=0)
    # What was kept is the next base.
    again = sparseft.attach(model, kit.masks(model, seed=4))
    kit.train(model, [torch.optim.AdamW(again.parameters(), lr=0.05)], 1, rank=rank, world=2)
    kit.check_weights(again, kept)
    again.detach()
    same(kit.whole(model), kept, near=0)

    other = kit.shard(kit.net())
    third = sparseft.attach(other, kit.masks(other), full_params=["head.*"])
    third.load_adapter_(adapter)
    same({n: v for n, v in kit.whole(other).items()}, trained, near=0)
    with torch.no_grad():
        for leaf in third.leaves.values():
            leaf.mul_(2)
    third.sync_()
    kit.check_weights(third, {**before, **{n: full_value(p) for n, p in third.full_params.items()}})
    third.detach()
    same(kit.whole(other), before, near=0)

    fourth = kit.shard(kit.net())
    start = sparseft.attach(fourth, adapter)
    same(kit.whole(fourth), trained, near=0)
    start.detach()
    same(kit.whole(fourth), before, near=0)

    # An optimizer that was built from the sharded parameters gets the leaves in their place.
    fifth = kit.shard(kit.net())
    rule = torch.optim.AdamW(fifth.parameters(), lr=0.05)
    last = sparseft.attach(fifth, kit.masks(fifth), optimizer=rule)
    kit.train(fifth, [rule], 1, rank=rank, world=2)
    kit.check_weights(last, before)
    assert all((leaf != 0).any() for leaf in last.leaves.values())


def test_trained_values_stay_and_adapters_come_back(run_ranks):
    run_ranks(moves_and_keeps, 2)
