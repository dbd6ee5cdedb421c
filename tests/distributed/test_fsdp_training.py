"""Masks on a base that ``fully_shard`` has cut: training equals one process, to rounding."""

from __future__ import annotations

import importlib.util
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import sparseft
from sparseft.modules.weight_storage import OwnEntries, full_value


def beside(name):
    path = Path(__file__).resolve().parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kit = beside("_fsdp")

RULES = {
    "for loop": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "SparseAdamW": lambda p: sparseft.SparseAdamW(p, lr=0.05),
    "SparseLion": lambda p: sparseft.SparseLion(p, lr=0.01, weight_decay=0.1),
    "SparseSGD": lambda p: sparseft.SparseSGD(p, lr=0.1, momentum=0.9),
}


def alone(rule):
    """Train in this process alone, on whole batches: losses and weights."""
    model = kit.net(torch.float64)
    sparse = sparseft.attach(model, kit.masks(model), full_params=["head.*"], group=False)
    losses = kit.train(model, optimizers(sparse, rule), 3)
    return losses, kit.whole(model)


def optimizers(sparse, rule):
    # Leaves are plain tensors, the head's parameters DTensors: foreach takes one kind at a time.
    return [rule(sparse.leaves.values()), rule(sparse.full_params.values())]


def compare(got, wanted, near=1e-9):
    for name, value in wanted.items():
        torch.testing.assert_close(
            got[name], value, atol=near, rtol=near, msg=lambda m, n=name: f"{n}: {m}"
        )


def as_alone(model, rule, rank, world):
    """Train a sharded float64 model and compare with this process alone, bit for bit undone."""
    before = kit.whole(model)
    rows = {n: p.to_local().clone() for n, p in model.named_parameters()}
    sparse = sparseft.attach(model, kit.masks(model), full_params=["head.*"])
    losses = kit.train(model, optimizers(sparse, rule), 3, rank=rank, world=world)
    kit.check_weights(sparse, before)
    expected, weights = alone(rule)
    mean = torch.tensor(losses, dtype=torch.float64)
    torch.distributed.all_reduce(mean)
    mean /= torch.distributed.get_world_size()
    torch.testing.assert_close(mean, torch.tensor(expected, dtype=torch.float64))
    compare(kit.whole(model), weights)
    changed = 0
    for name, pattern in sparse.patterns.items():
        weight = model.get_parameter(name)
        trained = OwnEntries(weight, pattern.indices).positions.numel() > 0
        assert torch.equal(weight.to_local(), rows[name]) is not trained, name
        changed += trained
    assert changed > 3
    sparse.detach()
    for name, p in model.named_parameters():
        assert torch.equal(p.to_local(), rows[name]), name
        assert p.requires_grad
    assert sorted(rows) == sorted(n for n, _ in model.named_parameters())


def every_rule(rank):
    for rule in RULES.values():
        as_alone(kit.shard(kit.net(torch.float64)), rule, rank, 2)


def test_two_processes_train_as_one_with_every_optimizer(run_ranks):
    run_ranks(every_rule, 2)


def four(rank):
    as_alone(kit.shard(kit.net(torch.float64)), RULES["foreach"], rank, 4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    as_alone(kit.shard(kit.net(torch.float64), mesh), RULES["SparseAdamW"], rank, 4)
    pair = mesh["shards"]  # two models of two processes each
    as_alone(kit.shard(kit.net(torch.float64), pair), RULES["momentum"], rank % 2, 2)


def test_four_processes_and_two_by_two(run_ranks):
    """Rows that are uneven, ranks without any; shards in pairs that are copies of each other."""
    run_ranks(four, 4)


def whole_copies(rank):
    """Steps while FSDP2 shows whole weights: every forward has to see what was written."""
    rule = RULES["momentum"]
    expected, weights = alone(rule)

    def run(act=None, before_all=None, **options):
        model = kit.shard(kit.net(torch.float64), **options)
        before = kit.whole(model)
        sparse = sparseft.attach(model, kit.masks(model), full_params=["head.*"])
        if before_all is not None:
            before_all(model)
        between = None if act is None else partial(act, model)
        losses = kit.train(model, optimizers(sparse, rule), 3, rank=rank, world=2, between=between)
        kit.check_weights(sparse, before)
        compare(kit.whole(model), weights)
        mean = torch.tensor(losses, dtype=torch.float64)
        torch.distributed.all_reduce(mean)
        torch.testing.assert_close(mean / 2, torch.tensor(expected, dtype=torch.float64))
        sparse.detach()
        compare(kit.whole(model), before, near=0)

    @torch.no_grad()
    def evaluate(model):  # leaves the root's own weights whole
        model(kit.batches(1)[0][0])

    def gather(model):
        for module in (model, *model.layers):
            module.unshard()

    def gather_without_waiting(model):
        for module in (model, *model.layers):
            module.unshard(async_op=True)

    run(reshard_after_forward=False)
    run(before_all=lambda m: m.set_reshard_after_backward(False))
    for act in (evaluate, gather, gather_without_waiting):
        run(act, act)


def test_no_forward_reads_a_copy_from_before_the_step(run_ranks):
    run_ranks(whole_copies, 2)


def gradients(sparse):
    return {name: full_value(p.grad).clone() for name, p in sparse.named_parameters()}


def one_backward(model, rank, world, **options):
    """Attach, run one backward of this process's part; return handle and gradients."""
    sparse = sparseft.attach(model, kit.masks(model), full_params=["head.*"], **options)
    kit.loss_of(model, kit.own_part(kit.batches(1)[0], rank, world)).backward()
    return sparse, gradients(sparse)


def lower_precision(rank):
    wanted = one_backward(kit.net(), 0, 1, group=False)[1]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for dtype, options in ((torch.float32, {"mp_policy": policy}), (torch.bfloat16, {})):
        model = kit.shard(kit.net(dtype), **options)
        before = kit.whole(model)
        sparse, got = one_backward(model, rank, 2)
        for name, leaf in sparse.leaves.items():
            assert leaf.grad.dtype == leaf.dtype == torch.float32
            assert model.get_parameter(name).to_local().dtype == dtype
        compare({n: g.float() for n, g in got.items()}, wanted, near=0.1)
        for optimizer in optimizers(sparse, RULES["SparseAdamW"]):
            optimizer.step()
        kit.check_weights(sparse, before)
        sparse.detach()
        compare(kit.whole(model), before, near=0)

    model = kit.shard(kit.net())
    with torch.autocast("cpu", torch.bfloat16):
        got = one_backward(model, rank, 2)[1]
    compare(got, wanted, near=0.1)

    stochastic = [kit.net(torch.bfloat16), kit.shard(kit.net(torch.bfloat16))]
    results = []
    for model in stochastic:
        sparse = sparseft.attach(model, kit.masks(model))
        rule = sparseft.SparseAdamW(sparse.parameters(), lr=0.01, stochastic_rounding=True, seed=5)
        for leaf in sparse.parameters():
            leaf.grad = torch.ones_like(leaf)
        rule.step()
        results.append(kit.whole(model))
        nearest = {n: m.expected_entries(m.leaf) for n, m in sparse._masked.items()}
        assert any(
            not torch.equal(results[-1][n].view(-1)[sparse.patterns[n].indices.long()], entries)
            for n, entries in nearest.items()
        )
    compare(results[1], results[0], near=0)  # random words go by place in the whole weight


def test_mixed_precision_bf16_weights_autocast_and_stochastic_rounding(run_ranks):
    run_ranks(lower_precision, 2)


def several_backwards(rank):
    wanted = one_backward(kit.net(torch.float64), 0, 1, group=False)[1]
    parts = [kit.own_part(b, rank, 2) for b in (kit.batches(1)[0],) * 3]
    for how in ("each", "last", "held"):
        model = kit.shard(kit.net(torch.float64))
        sparse = sparseft.attach(model, kit.masks(model), full_params=["head.*"])
        for number, part in enumerate(parts):
            if how != "each":
                model.set_requires_gradient_sync(number == 2)
            held = sparse.reduction.no_sync() if how == "held" and number < 2 else nullcontext()
            with held:
                (kit.loss_of(model, part) / 3).backward()
        assert sparse.reduction.reductions == (3 if how == "each" else 1)
        compare(gradients(sparse), wanted, near=1e-6)  # the loss is taken in fp32
        sparse.detach()


def test_gradients_accumulate(run_ranks):
    run_ranks(several_backwards, 2)


def recomputed(rank):
    wanted = one_backward(kit.net(torch.float64), 0, 1, group=False)[1]
    for reentrant in (False, True):
        for outside in (False, True):  # of what fully_shard hooks
            model = kit.net(torch.float64)

            def wrap(model=model, reentrant=reentrant):
                for layer in model.layers:
                    layer.forward = partial(checkpoint, layer.forward, use_reentrant=reentrant)

            if outside:
                wrap()
            kit.shard(model)
            if not outside:
                wrap()
            got = one_backward(model, rank, 2, input_grads=True)[1]
            compare(got, wanted)


def test_activation_checkpointing(run_ranks):
    run_ranks(recomputed, 2)


def sharded_itself(rank):
    """fully_shard on the very layers whose class a mask swaps."""
    mesh = init_device_mesh("cpu", (2,))
    model = kit.net(torch.float64)
    for layer in model.layers:
        for part in (layer.up, layer.down, layer.norm):
            fully_shard(part, mesh=mesh)
    kit.shard(model, mesh)
    classes = [type(module) for module in model.modules()]
    before = kit.whole(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse, got = one_backward(model, rank, 2)
    compare(got, one_backward(kit.net(torch.float64), 0, 1, group=False)[1])
    for optimizer in optimizers(sparse, RULES["foreach"]):
        optimizer.step()
    kit.check_weights(sparse, before)
    sparse.detach()
    assert [type(module) for module in model.modules()] == classes
    compare(kit.whole(model), before, near=0)
    kit.loss_of(model, kit.own_part(kit.batches(1)[0], rank, 2)).backward()
    assert all(type(p.grad) is type(p) for p in model.parameters())


def heads(rank):
    """A head that fully_shard has cut, and one left whole; clipping, loss scaling."""
    alone, wanted = one_backward(kit.net(torch.float64), 0, 1, group=False)
    other = one_backward(kit.net(torch.float64), 0, 1, group=False)[0]
    norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.01)
    clipped = gradients(alone)
    assert torch.equal(other.clip_grad_norm_(0.01), norm)
    compare(gradients(other), clipped, near=0)
    for whole_head in (False, True):
        model = kit.net(torch.float64)
        ignored = set(model.head.parameters()) if whole_head else set()
        kit.shard(model, ignored_params=ignored)
        sparse, got = one_backward(model, rank, 2)
        compare(got, wanted)
        assert len(sparse.param_groups()) == (1 if whole_head else 2)
        torch.optim.AdamW(sparse.param_groups(), lr=0.0, foreach=True).step()
        if whole_head:
            torch.nn.utils.clip_grad_norm_(sparse.parameters(), 0.01)
        else:
            torch.testing.assert_close(sparse.clip_grad_norm_(0.01), norm)
        compare(gradients(sparse), clipped)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        rules = optimizers(sparse, RULES["SparseSGD"])
        scaler.scale(kit.loss_of(model, kit.own_part(kit.batches(1)[0], rank, 2))).backward()
        for rule in rules:
            scaler.step(rule)
        scaler.update()
        assert scaler.get_scale() == 4.0
        sparse.detach()


def test_layers_sharded_themselves_and_heads(run_ranks):
    run_ranks(both, 2)


def both(rank):
    sharded_itself(rank)
    heads(rank)
