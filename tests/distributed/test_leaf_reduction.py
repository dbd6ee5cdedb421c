"""Leaf gradients as the mean over processes: equal to DDP's, in exactly so many bytes, whatever
the backward looks like.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import sparseft
from sparseft.errors import AttachError
from sparseft.modules.leaf_reduction import LeafReduction

_spec = importlib.util.spec_from_file_location("_fsdp", Path(__file__).parent / "_fsdp.py")
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)

NNZ = {"a.weight": 12, "b.weight": 30, "c.weight": 5}


class Net(nn.Module):
    """Three masked layers and a head; ``route`` leaves some out, ``block`` checkpoints ``b``."""

    def __init__(self, *, reentrant: bool | None = None, depth: int = 1) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.head = nn.Linear(4, 2)
        self.reentrant, self.depth = reentrant, depth

    def inner(self, x, depth):
        if depth:
            return checkpoint(self.inner, x, depth - 1, use_reentrant=self.reentrant)
        return self.b(x).relu()

    def forward(self, x, route="abc"):
        x = self.a(x).relu() if "a" in route else x.new_ones(len(x), 8, requires_grad=True)
        if "b" in route:
            x = self.inner(x, 0 if self.reentrant is None else self.depth)
        return self.head(self.c(x) if "c" in route else x[:, :4])


def attached(**options):
    torch.manual_seed(0)
    model = Net(**options)
    masks = {}
    for name, nnz in NNZ.items():
        weight = model.get_parameter(name)
        keep = torch.zeros(weight.numel(), dtype=torch.bool)
        keep[torch.randperm(weight.numel())[:nnz]] = True
        masks[name] = keep.view(weight.shape)
    return model, sparseft.attach(model, masks, full_params=["head.*"])


def batch(rank, step=0):
    torch.manual_seed(100 * step + rank)
    return torch.randn(5, 6)


def grads(sparse):
    found = {n: p.grad for n, p in sparse.named_parameters()}
    return {n: None if g is None else g.detach().clone() for n, g in found.items()}


def same_on_all(found):
    """Whether a dict of gradients has the same bits on every process."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {n: g for n, g in found.items()})
    first = everyone[0]
    return all(
        (g is None and other[n] is None) or torch.equal(g, other[n])
        for other in everyone
        for n, g in first.items()
    )


def against_ddp(rank, options, loss_of):
    """Gradients of a few backwards by DDP and by a LeafReduction, and the latter's bytes."""
    model, sparse = attached(**options)
    wrapped = DistributedDataParallel(model)
    other, others = attached(**options)
    reduction = LeafReduction(others.parameters(), model=other)
    sizes = []
    for step in range(2):  # the second accumulates
        for net in (wrapped, other):
            loss_of(net, batch(rank, step)).backward()
        sizes.append(reduction.bytes_reduced)
    return grads(sparse), grads(others), sizes, same_on_all(grads(others))


def plain_loss(net, x):
    return net(x).square().mean()


def ddp_plain(rank):
    return against_ddp(rank, {}, plain_loss)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_are_those_of_ddp_in_exactly_so_many_bytes(run_ranks, world_size):
    heads = 4 * 2 + 2
    tensors = len(NNZ) + 2
    for ddp, ours, sizes, same in run_ranks(ddp_plain, world_size):
        assert same
        assert sizes == [4 * (sum(NNZ.values()) + heads) + 4 * tensors] * 2
        for name, grad in ddp.items():
            if world_size == 2:  # one sum of two numbers, in either order
                assert torch.equal(ours[name], grad), name
            torch.testing.assert_close(ours[name], grad)


def in_one_process(rank, route_of):
    """Mean of the gradients that each rank alone would have, as the thing to compare with."""
    total = None
    for other in range(dist.get_world_size()):
        model, sparse = attached()
        model(batch(other), route_of[other]).square().mean().backward()
        mine = grads(sparse)
        zeros = {n: torch.zeros_like(p) for n, p in sparse.named_parameters()}
        filled = {n: zeros[n] if g is None else g for n, g in mine.items()}
        total = filled if total is None else {n: total[n] + g for n, g in filled.items()}
    return {n: g / dist.get_world_size() for n, g in total.items()}


def routes(rank, route_of):
    model, sparse = attached()
    reduction = LeafReduction(sparse.parameters(), model=model)
    model(batch(rank), route_of[rank]).square().mean().backward()
    found = grads(sparse)
    return found, in_one_process(rank, route_of), reduction.reductions, same_on_all(found)


def test_leaves_that_some_or_all_processes_leave_out(run_ranks):
    for found, wanted, reductions, same in run_ranks(routes, 2, ["ab", "a"]):
        assert same
        assert reductions == 1
        assert found["c.diff_weight"] is None, "reached by nobody"
        for name, grad in found.items():
            if grad is not None:
                torch.testing.assert_close(grad, wanted[name], msg=name)
        assert found["b.diff_weight"].abs().sum() > 0, "reached by rank 0 alone"


def reaches_nothing(rank):
    """Rank 1's loss depends on no trained parameter; rank 0's on one leaf."""
    model, sparse = attached()
    for parameter in model.head.parameters():
        parameter.requires_grad_(False)
    reduction = LeafReduction(sparse.parameters(), model=model)
    model(batch(rank), "b" if rank == 0 else "").square().mean().backward()
    return grads(sparse), reduction.bytes_reduced


def test_a_process_that_reaches_nothing_takes_part(run_ranks):
    one, two = run_ranks(reaches_nothing, 2)
    assert one[0]["b.diff_weight"].abs().sum() > 0
    assert torch.equal(one[0]["b.diff_weight"], two[0]["b.diff_weight"])
    assert two[0]["a.diff_weight"] is None
    assert one[1] == two[1] == 4 * sum(NNZ.values()) + 4 * len(NNZ), "frozen heads are not sent"


def unsynced(rank):
    """Three micro-batches, reduced after the last; its route leaves out what the first reached."""
    model, sparse = attached()
    reduction = LeafReduction(sparse.parameters(), model=model)
    with reduction.no_sync():
        model(batch(rank, 0)).square().mean().backward()
        model(batch(rank, 1)).square().mean().backward()
        early = grads(sparse), reduction.reductions
    model(batch(rank, 2), "a").square().mean().backward()
    late = grads(sparse)

    model, sparse = attached()
    every = LeafReduction(sparse.parameters(), model=model)
    for step, route in enumerate(["abc", "abc", "a"]):
        model(batch(rank, step), route).square().mean().backward()
    return early, late, grads(sparse), (reduction.reductions, every.reductions), same_on_all(late)


def test_no_sync_leaves_all_to_the_next_backward(run_ranks):
    results = run_ranks(unsynced, 2)
    for (_, reductions_inside), late, every, counts, same in results:
        assert same
        assert reductions_inside == 0
        assert counts == (1, 3)
        for name, grad in late.items():
            torch.testing.assert_close(grad, every[name], msg=name)
    local = [early[0]["b.diff_weight"] for early, *_ in results]
    assert not torch.equal(*local), "each has its own until then"


def ddp_reentrant(rank, depth):
    # DDP itself needs non-reentrant checkpoints here: the same numbers.
    model, sparse = attached(reentrant=False, depth=depth)
    wrapped = DistributedDataParallel(model)
    other, others = attached(reentrant=True, depth=depth)
    seen = []
    for outputs in (other, None):  # with and without a hook on the model's outputs
        others = sparseft.attachments_of(other)[0]
        for parameter in others.parameters():
            parameter.grad = None
        reduction = LeafReduction(others.parameters(), model=outputs)
        plain_loss(other, batch(rank)).backward()
        seen.append((grads(others), reduction.reductions, reduction.bytes_reduced))
        reduction.close()
    plain_loss(wrapped, batch(rank)).backward()
    non_reentrant, third = attached(reentrant=False, depth=depth)
    reduction = LeafReduction(third.parameters())
    plain_loss(non_reentrant, batch(rank)).backward()
    seen.append((grads(third), reduction.reductions, reduction.bytes_reduced))
    return grads(sparse), seen


@pytest.mark.parametrize("depth", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_checkpointing_reduces_once_at_the_end_of_the_outermost_backward(run_ranks, depth):
    for ddp, seen in run_ranks(ddp_reentrant, 2, depth):
        for found, reductions, size in seen:
            assert reductions == 1, "not at the end of the backward of each checkpoint"
            assert size == 4 * (sum(NNZ.values()) + 10) + 4 * 5
            for name, grad in ddp.items():
                torch.testing.assert_close(found[name], grad, msg=name)


def graph_kept(rank):
    model, sparse = attached()
    reduction = LeafReduction(sparse.parameters(), model=model)
    loss = model(batch(rank)).square().mean()
    loss.backward(retain_graph=True)
    once = grads(sparse)
    loss.backward()
    twice = grads(sparse)
    # autograd.grad fills no .grad, so there is nothing to reduce, as under DDP.
    loss = model(batch(rank)).square().mean()
    torch.autograd.grad(loss, list(sparse.parameters()))
    return once, twice, reduction.reductions


def test_a_graph_kept_and_run_again(run_ranks):
    for once, twice, reductions in run_ranks(graph_kept, 2):
        assert reductions == 2
        for name, grad in once.items():
            torch.testing.assert_close(twice[name], 2 * grad, msg=name)


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ValueError("out of luck")


def failed(rank):
    """A backward that raises after some leaves have their gradient, on every rank."""
    model, sparse = attached()
    reduction = LeafReduction(sparse.parameters(), model=model)
    hidden = model.a(batch(rank))
    loss = model.head(model.c(model.b(_Fails.apply(hidden)))).square().mean()
    with pytest.raises(ValueError, match="out of luck"):
        loss.backward()
    half, reductions = grads(sparse), reduction.reductions
    for parameter in sparse.parameters():
        parameter.grad = None
    model(batch(rank), "a").square().mean().backward()
    return half, reductions, grads(sparse), in_one_process(rank, ["a", "a"])


def test_a_backward_that_raises_leaves_nothing_behind(run_ranks):
    for half, reductions, after, wanted in run_ranks(failed, 2):
        assert half["c.diff_weight"] is not None
        assert reductions == 0
        assert after["c.diff_weight"] is None, "its gradient was thrown away"
        torch.testing.assert_close(after["a.diff_weight"], wanted["a.diff_weight"])


def moved(rank):
    model, sparse = attached()
    reduction = LeafReduction(sparse.parameters(), model=model)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    plain_loss(model, batch(rank)).backward()
    optimizer.step()
    optimizer.zero_grad()
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask.view(-1)[-NNZ["b.weight"] :] = True
    sparse.reselect_({"b.weight": mask}, optimizer=optimizer)
    plain_loss(model, batch(rank, 1)).backward()
    with pytest.raises(AttachError):
        sparse.reselect_({"b.weight": mask.logical_not()}, optimizer=optimizer)
    return grads(sparse), reduction.bytes_reduced, same_on_all(grads(sparse))


def test_a_mask_that_moved(run_ranks):
    one, two = run_ranks(moved, 2)
    assert one[2]
    assert one[1] == 4 * (sum(NNZ.values()) + 10) + 4 * 5
    assert one[0]["b.diff_weight"].abs().sum() > 0
    assert torch.equal(one[0]["b.diff_weight"], two[0]["b.diff_weight"])


def with_graph(rank):
    model, sparse = attached()
    reduction = LeafReduction(model.head.parameters())
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("sparseft.modules.leaf_reduction").addHandler(handler)
    for _ in range(2):
        model(batch(rank)).square().mean().backward(create_graph=True)
    head = model.head.weight.grad
    return reduction.reductions, head.requires_grad, head.detach(), said


def test_gradients_with_a_graph_lose_it_with_one_warning(run_ranks):
    one, two = run_ranks(with_graph, 2)
    assert one[:2] == two[:2] == (2, False)
    assert torch.equal(one[2], two[2])
    assert len(one[3]) == 1
    assert "create_graph=True" in one[3][0]


def closed(rank):
    model, sparse = attached()
    reduction = LeafReduction(sparse.parameters(), model=model)
    reduction.close()
    alone, others = attached()
    none = LeafReduction(others.parameters(), False, model=alone)
    for net in (model, alone):
        plain_loss(net, batch(rank)).backward()
    hooks = len(model._forward_hooks) + len(alone._forward_hooks)
    return grads(sparse), grads(others), (reduction.reductions, none.reductions, hooks)


def test_closed_or_alone_there_is_nothing(run_ranks):
    one, two = run_ranks(closed, 2)
    assert one[2] == two[2] == (0, 0, 0)
    assert not torch.equal(one[0]["a.diff_weight"], two[0]["a.diff_weight"])
    assert torch.equal(one[0]["a.diff_weight"], one[1]["a.diff_weight"])


def mixed(rank):
    """Leaves in two dtypes, and one that begins frozen: a bucket each dtype."""
    torch.manual_seed(0)
    parameters = [
        nn.Parameter(torch.ones(n, dtype=d))
        for n, d in ((3, torch.float32), (5, torch.float64), (4, torch.float32), (2, torch.float32))
    ]
    parameters[2].requires_grad_(False)
    reduction = LeafReduction(parameters)
    sum((p * (rank + 1)).sum() for p in parameters if p.requires_grad).backward()
    first = reduction.bytes_reduced, parameters[2].grad
    parameters[2].requires_grad_(True)
    (parameters[2] * (rank + 1)).sum().backward()
    return first, reduction.bytes_reduced, [p.grad for p in parameters]


def test_dtypes_and_parameters_that_begin_frozen(run_ranks):
    for first, later, found in run_ranks(mixed, 2):
        assert first == ((3 + 2 + 2) * 4 + (5 + 1) * 8, None)
        assert later == first[0] + (4 + 1) * 4
        assert all(torch.equal(grad, torch.full_like(grad, 1.5)) for grad in found)
        assert [g.dtype for g in found] == [
            torch.float32,
            torch.float64,
            torch.float32,
            torch.float32,
        ]


def under_fsdp(rank):
    """FSDP2's own switches decide for leaves, too; and what they do not say, this does."""
    model = kit.shard(kit.net())
    sparse = sparseft.attach(model, kit.masks(kit.net(), 0.1), full_params=["head.*"])
    reduction = sparse.reduction
    micro = [kit.own_part(batch, rank, 2) for batch in kit.batches(3)]
    counts = []
    model.set_requires_gradient_sync(False)
    model.set_is_last_backward(False)
    for batch in micro[:2]:
        kit.loss_of(model, batch).backward()
        counts.append(reduction.reductions)
    model.set_requires_gradient_sync(True)
    model.set_is_last_backward(True)
    kit.loss_of(model, micro[2]).backward()
    counts.append(reduction.reductions)
    leaves = {name: leaf.grad.clone() for name, leaf in sparse.leaves.items()}

    whole = kit.net()
    alone = sparseft.attach(whole, kit.masks(kit.net(), 0.1), full_params=["head.*"], group=False)
    for batch in kit.batches(3):
        kit.loss_of(whole, batch).backward()
    wanted = {name: leaf.grad for name, leaf in alone.leaves.items()}
    # Heads are FSDP2's to reduce: leaves alone are counted.
    expected = 4 * sparse.nnz + 4 * len(sparse.names)
    return counts, leaves, wanted, reduction.bytes_reduced == expected, same_on_all(leaves)


def test_the_switches_of_fsdp_are_obeyed(run_ranks):
    for counts, leaves, wanted, counted, same in run_ranks(under_fsdp, 2):
        assert counts == [0, 0, 1]
        assert counted
        assert same
        for name, grad in wanted.items():
            torch.testing.assert_close(leaves[name], grad, msg=name)


def zero(rank):
    """Moments of leaves cut over ranks by tensor, those of the sharded head where its rows are."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    found = []
    for cut in (False, True):
        model = kit.shard(kit.net())
        sparse = sparseft.attach(model, kit.masks(kit.net(), 0.1), full_params=["head.*"])
        heads = torch.optim.AdamW(sparse.full_params.values(), lr=1e-2)
        kind = torch.optim.AdamW
        leaves = list(sparse.leaves.values())
        opt = ZeroRedundancyOptimizer(leaves, kind, lr=1e-2) if cut else kind(leaves, lr=1e-2)
        before = kit.whole(model)
        kit.train(model, [opt, heads], 3, rank=rank, world=2)
        kit.check_weights(sparse, before)
        inner = opt.optim if cut else opt
        entries = sum(state["exp_avg"].numel() for state in inner.state.values())
        found.append((sparse.adapter("x").digest, entries, sparse.nnz))
    return found


@pytest.mark.slow
def test_zero_redundancy_cuts_the_moments_of_leaves(run_ranks):
    results = run_ranks(zero, 2)
    held = 0
    for (plain, every, nnz), (digest, entries, _) in results:
        assert plain == digest
        assert every == nnz
        held += entries
    assert held == results[0][0][2], "each moment is on one process"
