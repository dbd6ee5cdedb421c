"""Masks on a base that ``fully_shard`` has cut: training equals one process, to rounding."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh

import sparseft
from sparseft.modules.weight_storage import OwnEntries


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
    torch.testing.assert_close(mean / world, torch.tensor(expected, dtype=torch.float64))
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


def test_four_processes_and_two_by_two(run_ranks):
    """Rows that are uneven, ranks without any; shards in pairs that are copies of each other."""
    run_ranks(four, 4)


def whole_copies(rank):
    """Steps while FSDP2 shows whole weights: every forward has to see what was written."""
    rule = RULES["momentum"]
    expected, weights = alone(rule)

    def run(prepare, each=None, **options):
        model = kit.shard(kit.net(torch.float64), **options)
        before = kit.whole(model)
        sparse = sparseft.attach(model, kit.masks(model), full_params=["head.*"])
        prepare(model)
        losses = kit.train(
            model, optimizers(sparse, rule), 3, rank=rank, world=2, each=each and each(model)
        )
        kit.check_weights(sparse, before)
        compare(kit.whole(model), weights)
        mean = torch.tensor(losses, dtype=torch.float64)
        torch.distributed.all_reduce(mean)
        torch.testing.assert_close(mean / 2, torch.tensor(expected, dtype=torch.float64))
        sparse.detach()
        compare(kit.whole(model), before, near=0)

    def nothing(model):
        pass

    def evaluate(model):
        @torch.no_grad()
        def forward(number=0):
            return kit.loss_of(model, kit.batches(1)[0])

        return forward

    def gather(model):
        return lambda number=0: [m.unshard() for m in (model, *model.layers)]

    def gather_without_waiting(model):
        return lambda number=0: [m.unshard(async_op=True) for m in (model, *model.layers)]

    run(nothing, reshard_after_forward=False)
    run(lambda m: m.set_reshard_after_backward(False))
    run(evaluate, evaluate)  # leaves the root's own weights whole
    run(lambda m: evaluate(m)(), evaluate)
    run(lambda m: gather(m)(), gather)
    run(lambda m: gather_without_waiting(m)(), gather_without_waiting)


def test_no_forward_reads_a_copy_from_before_the_step(run_ranks):
    run_ranks(whole_copies, 2)
