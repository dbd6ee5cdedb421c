"""What masks on a sharded base refuse, by name and with the way out, and what they notice."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import sparseft
from sparseft.errors import AttachError, CompositionError


def beside(name):
    path = Path(__file__).resolve().parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kit = beside("_fsdp")


def refused(action, *words):
    with pytest.raises(AttachError) as caught:
        action()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"


def layer():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))


MASK = {"0.weight": torch.ones(6, 4, dtype=torch.bool)}


def placements(rank):
    mesh = init_device_mesh("cpu", (2,))
    columns = layer()
    fully_shard(columns, mesh=mesh, shard_placement_fn=lambda p: Shard(p.ndim - 1))
    refused(lambda: sparseft.attach(columns, MASK), "'0.weight'", "Shard(dim=1)", "shard_placement")

    parallel = parallelize_module(layer(), mesh, {"0": ColwiseParallel()})
    refused(lambda: sparseft.attach(parallel, MASK), "'0.weight'", "tensor parallel", "fully_shard")

    offloaded = layer()
    fully_shard(offloaded, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    refused(lambda: sparseft.attach(offloaded, MASK), "'0.weight'", "CPUOffloadPolicy", "Leave out")

    cut = layer()
    fully_shard(cut, mesh=mesh)
    refused(lambda: sparseft.attach(cut, MASK, group=False), "group=False", "Leave group out")

    flat = FullyShardedDataParallel(layer(), device_id=torch.device("cpu"), use_orig_params=True)
    refused(lambda: sparseft.attach(flat, MASK), "FSDP1", "fully_shard", "fsdp_version: 2")

    # A part of a sharded model whose records lie above it.
    whole = nn.Sequential(layer())
    fully_shard(whole, mesh=mesh)
    refused(lambda: sparseft.attach(whole[0], MASK), "'0.weight'", "attach to the model")
    for model in (columns, parallel, offloaded, whole[0]):
        assert not sparseft.attachments_of(model)
        assert sorted(n for n, _ in model.named_parameters()) == sorted(
            f"{i}.{k}" for i in (0, 1) for k in ("weight", "bias")
        )
        assert type(model[0]) is nn.Linear


def changes(rank):
    model = kit.shard(kit.net())
    before = kit.whole(model)
    sparse = sparseft.attach(model, kit.masks(model), full_params=["head.*"])
    up = model.layers[0].up
    assert isinstance(up.weight, DTensor)
    assert up.weight is up._parameters["weight"]

    def replace():
        up.weight = nn.Parameter(torch.zeros(7, kit.WIDTH))

    refused(replace, "cannot replace 'weight'", "'layers.0.up.weight'")
    refused(lambda: setattr(up, "diff_weight", nn.Parameter(torch.zeros(1))), "cannot replace")
    refused(lambda: model.layers[0].up.to(torch.bfloat16), "is sharded", "MixedPrecisionPolicy")
    model.to("cpu")  # what it is already
    assert not rank or sparse.report().total.changed == 0  # nothing waits for the others
    assert up.weight is up._parameters["weight"]

    rule = torch.optim.AdamW(sparse.param_groups(), lr=0.05)
    kit.train(model, [rule], 1, rank=rank, world=2)
    mixed = torch.optim.AdamW(sparse.parameters(), lr=0.05, foreach=True)
    refused(mixed.step, "DTensors", "sparse.param_groups()", "ignored_params")
    eight = sparseft.SparseAdamW(sparse.param_groups(), lr=0.05, moment_bits=8)
    kit.loss_of(model, kit.own_part(kit.batches(1)[0], rank, 2)).backward()
    with pytest.raises(ValueError, match="sharded, and blocks of 8-bit moments"):
        eight.step()
    kit.check_weights(sparse, before)

    # Around the module, which only the next step can notice.
    weight = up._parameters["weight"]
    up._parameters["weight"] = nn.Parameter(torch.zeros(7, kit.WIDTH))
    refused(rule.step, "'layers.0.up.weight' has changed since attach", "attach again")
    up._parameters["weight"] = weight
    rule.step()

    # An optimizer of before holds the rows and no leaf.
    refused(torch.optim.SGD([weight], lr=0.1).step, "was built before attach")

    # A step in the middle of a forward would be lost: the layer's weight is whole then.
    def step_inside(module, args):
        refused(sparse.sync_, "while a forward of its module runs")

    hook = model.layers[0].register_forward_pre_hook(step_inside)
    kit.loss_of(model, kit.own_part(kit.batches(1)[0], rank, 2)).backward()
    hook.remove()
    adapter = sparse.adapter("learned")
    sparse.detach()
    model.to("cpu")
    with pytest.raises(CompositionError, match="is sharded.*attach\\(model, adapter\\)"):
        sparseft.Composer(model, {"learned": adapter}).apply(["learned"])
    compare = kit.whole(model)
    assert all(torch.equal(compare[n], v) for n, v in before.items())


def ranks_apart(rank):
    model = kit.net()
    torch.manual_seed(rank)
    model.head = nn.Linear(kit.WORDS, 3)
    masks = kit.masks(model)
    fully_shard(
        model, mesh=init_device_mesh("cpu", (2,)), ignored_params={*model.head.parameters()}
    )
    heads = lambda: sparseft.attach(model, masks, full_params=["head.*"])  # noqa: E731
    refused(heads, "disagree on the full parameter of 'head.weight' (and 1 more)", "rank 1")
    for p in model.head.parameters():
        torch.distributed.broadcast(p.data, 0)
    adapter = heads().adapter()
    sparseft.attachments_of(model)[-1].detach()
    # One rank verifies a fingerprint, which is a collective, the other has none.
    start = adapter if rank else masks
    refused(lambda: sparseft.attach(model, start), "is there on rank 1 and not on rank 0")
    assert not sparseft.attachments_of(model)
    # Copies, here of one shard each.
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards"))
    torch.manual_seed(0)
    model, head = nn.Linear(4, 6), nn.Linear(6, 4)
    with torch.no_grad():
        head.weight += rank
    model = fully_shard(nn.Sequential(model, head), mesh=mesh)
    heads = lambda: sparseft.attach(model, MASK, full_params=["1.*"])  # noqa: E731
    refused(heads, "disagree on the full parameter of '1.weight': rank 1", "copies of its shards")


def attached_first(rank):
    mesh = init_device_mesh("cpu", (2,))
    model = layer()
    sparse = sparseft.attach(model, MASK)
    refused(lambda: fully_shard(model, mesh=mesh), "cannot shard", "'0.weight'", "first")
    sparse.detach()


@pytest.mark.parametrize("function", [placements, changes, ranks_apart, attached_first])
def test_what_cannot_be(run_ranks, function):
    run_ranks(function, 2)
