"""Masks chosen on a model whose weights `fully_shard` has cut: those of the whole model."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

import sparseft
from sparseft.modules import GradientScores

_spec = importlib.util.spec_from_file_location("_fsdp", Path(__file__).parent / "_fsdp.py")
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)
batches, loss_of, net, own_part, shard = (
    kit.batches, kit.loss_of, kit.net, kit.own_part, kit.shard
)  # fmt: skip

WAYS = {
    "random": {},
    "weight_magnitude": {},
    "low_rank": {"rank": 2, "exclude": ["words.*", "head.*"]},
    "magnitude": {"base": True},
    "movement": {"base": True},
    "deltas_svd": {"base": True, "rank": 2},
    "function": {"fn": lambda name, parameter: parameter.abs() + len(name)},
    "rows": {"score": "weight_magnitude"},
    "n:m": {"n": 1, "m": 5, "score": "weight_magnitude", "include": "layers.*.up.weight"},
}


def moved(model):
    """The model as if it had been trained, and its weights of before."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) / 10)
    return model, before


def chosen(model, before, method):
    options = dict(WAYS[method])
    if options.pop("base", False):
        options["base"] = before
    if method != "n:m":
        options["nnz"] = 60
    masks = sparseft.select(model, method, **options)
    return {name: pattern.indices for name, pattern in masks.items()}


def by_weights(rank):
    model, before = moved(net())
    whole, _ = moved(net())
    shard(model)
    with torch.no_grad():
        model(batches(1)[0][0])  # after an evaluation the root shows whole weights
    gathered = []
    plain = torch.distributed.tensor.DTensor.full_tensor

    def counted(tensor, **options):
        gathered.append(tuple(tensor.shape))
        return plain(tensor, **options)

    torch.distributed.tensor.DTensor.full_tensor = counted
    found = {}
    for method in WAYS:
        gathered.clear()
        mine = chosen(model, before, method)
        found[method] = mine, chosen(whole, before, method), len(gathered)
    # A base that is sharded itself, and a whole one of a sharded tuned model.
    sharded_base = shard(net())
    masks = sparseft.select(whole, "magnitude", base=sharded_base, nnz=60)
    mine = {name: pattern.indices for name, pattern in masks.items()}
    found["sharded base"] = mine, found["magnitude"][1], 0
    several = sparseft.select(model, "magnitude", base=before, nnz=[10, 60])
    mine = {name: pattern.indices for name, pattern in several[1].items()}
    found["several"] = mine, found["magnitude"][1], 0
    types = {type(p).__name__ for p in model.parameters()}
    return found, types


def test_masks_by_shapes_and_weights_are_the_whole_models(run_ranks):
    for found, types in run_ranks(by_weights, 2):
        for method, (sharded, whole, _) in found.items():
            assert sharded.keys() == whole.keys()
            for name, indices in whole.items():
                assert torch.equal(sharded[name], indices), (method, name)
        assert found["random"][2] == 0, "needs no values"
        tensors = len(found["weight_magnitude"][0])
        assert found["weight_magnitude"][2] == tensors, "each is gathered once"
        assert types == {"DTensor"}, "left as they were"


def by_gradients(rank, world):
    """Half of each batch on each process; the mean of a batch's halves is the whole batch's."""
    model, whole = net(), net()
    shard(model)
    data = batches(3)
    mine = [own_part(batch, rank, world) for batch in data]
    frozen = [name for name, p in model.named_parameters() if name.startswith("layers.0")]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    found = {}
    for method, options in (
        ("gradient", {"kind": "sum"}),
        ("gradient", {"kind": "snip", "shortlist": 2}),
        ("fisher", {}),
        ("fisher", {"shortlist": 3}),
    ):
        options = {"shortlist": None} | options | {"nnz": 50, "loss_fn": loss_of}
        masks = sparseft.select(model, method, batches=mine, **options)
        # One process sees the same parts one after the other: sums of squares are over parts.
        parts = [own_part(batch, r, world) for batch in data for r in range(world)]
        if options["shortlist"] is not None:
            parts = None  # its candidates are those of the first part alone
        alone = None
        if parts is not None:
            alone = sparseft.select(whole, method, batches=parts, group=False, **options)
        key = method + str(options.get("kind")) + str(options["shortlist"])
        found[key] = [
            None if m is None else {n: p.indices for n, p in m.items()} for m in (masks, alone)
        ]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    kept = [name for name, p in model.named_parameters() if p.grad is not None]
    classes = [type(m).__name__ for m in model.modules()]
    return found, flags, frozen, kept, classes


def test_masks_by_gradients_are_those_of_one_process(run_ranks):
    results = run_ranks(by_gradients, 2, 2)
    (first, *_), (second, *_) = results
    for key, (masks, alone) in first.items():
        for name, indices in masks.items():
            assert torch.equal(indices, second[key][0][name]), (key, name)
            if alone is not None:
                assert torch.equal(indices, alone[name]), (key, name)
    for _, flags, frozen, kept, classes in results:
        assert {name for name, flag in flags.items() if not flag} == set(frozen)
        assert not kept, "no weight got a gradient"
        assert classes == ["FSDPNet", "Embedding", "ModuleList", *(["FSDPBlock", "LayerNorm",
                           "Linear", "Linear"] * 2), "Linear", "Linear"]  # fmt: skip


def sums(rank, world):
    """Every kind of read: fused layers, a tied matrix, a norm's vectors, a bare parameter."""
    model, whole = net(), net()
    shard(model)
    names = [name for name, _ in whole.named_parameters()]
    batch = batches(1)[0]
    found = []
    for one, part, group in (
        (model, own_part(batch, rank, world), None),
        (whole, batch, False),
    ):
        with GradientScores(one, names, group=group) as scores:
            (loss_of(one, part) / (1 if one is whole else world)).backward()
            scores.step()
        found.append({name: total for name, (_, total) in scores.finish().items()})
        found[-1]["unreached"] = scores.unreached
    dense = copy.deepcopy(whole)
    loss_of(dense, batch).backward()
    found.append({name: p.grad.flatten() for name, p in dense.named_parameters()})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_sums_of_sharded_weights_are_their_dense_gradients(run_ranks, world):
    for sharded, whole, dense in run_ranks(sums, world, world):
        assert sharded.pop("unreached") == whole.pop("unreached") == []
        for name, gradient in dense.items():
            torch.testing.assert_close(whole[name], gradient, msg=name)
            torch.testing.assert_close(sharded[name], gradient, msg=name)
