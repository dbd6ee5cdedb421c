"""Moving a mask: weights, bases, leaves, gradients and optimizer state, entry by entry."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn

from sparseft import SparseAdamW, SparseLion, SparsePattern, SparseSGD, attach
from sparseft.errors import AttachError, MaskError, StackOrderError
from sparseft.modules.repattern import repattern_
from sparseft.modules.storage_stack import Holder, bottom_value, push
from sparseft.modules.transplant import Moves, stepped
from sparseft.ops._moments import decode_moment

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "sparse_adamw": lambda p: SparseAdamW(p, lr=1e-2, weight_decay=0.1),
    "capturable": lambda p: SparseAdamW(p, lr=1e-2, capturable=True),
    "eight_bit": lambda p: SparseAdamW(p, lr=1e-2, moment_bits=8),
    "lion": lambda p: SparseLion(p, lr=1e-3),
    "sparse_sgd": lambda p: SparseSGD(p, lr=1e-2, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


def pattern_of(shape, nnz, seed):
    chosen = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))
    return SparsePattern.from_indices(chosen[:nnz], shape, sort=True)


def attached(dtype=torch.float32, shape=(40, 30), nnz=600):
    torch.manual_seed(0)
    model = nn.Linear(shape[1], shape[0], bias=False).to(dtype)
    base = model.weight.detach().clone()
    sparse = attach(model, {"weight": pattern_of(shape, nnz, 1)})
    return model, base, sparse, sparse._masked["weight"]


def train(model, optimizer, steps=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = model.in_features
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(5, width, generator=generator).to(model.weight.dtype)
        model(x).float().pow(2).sum().backward()
        optimizer.step()


def by_entry(masked, vector):
    """Flat index -> value of one vector in the order of the mask."""
    return dict(zip(masked.indices.tolist(), vector.tolist(), strict=True))


def per_entry_state(optimizer, leaf):
    """Per-entry tensors of the leaf's state, 8-bit moments decoded."""
    state = optimizer.state[leaf]
    found = {}
    for key, value in state.items():
        if key.endswith("_code"):
            found[key] = decode_moment(value, state[key.replace("_code", "_scale")])
        elif isinstance(value, torch.Tensor) and value.shape == leaf.shape:
            found[key] = value.clone()
    return found


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("count", [600, 450], ids=["same_count", "fewer"])
def test_kept_entries_keep_everything_and_new_ones_start_at_zero(kind, count):
    model, base, sparse, masked = attached()
    leaf = masked.leaf
    optimizer = OPTIMIZERS[kind]([leaf])
    train(model, optimizer)
    before = {k: by_entry(masked, v) for k, v in per_entry_state(optimizer, leaf).items()}
    values, weight = by_entry(masked, leaf.detach()), model.weight.detach().clone()
    grads = by_entry(masked, leaf.grad)
    step = optimizer.state[leaf].get("step")
    step = None if step is None else float(step)
    old, new = masked.pattern, pattern_of(base.shape, count, 2)
    kept = set(old.indices.tolist()) & set(new.indices.tolist())
    grown = set(new.indices.tolist()) - kept
    assert kept
    assert grown
    where = leaf.data_ptr()
    assert repattern_([(masked, new)], [optimizer]) == len(grown)

    assert sparse.leaves["weight"] is leaf
    assert (leaf.data_ptr() == where) == (count == 600)
    assert masked.pattern.equals(new)
    flat, now = base.flatten(), model.weight.detach().flatten()
    for vector, was in ((leaf.detach(), values), (leaf.grad, grads)):
        assert by_entry(masked, vector) == {i: was.get(i, 0.0) for i in new.indices.tolist()}
    tolerance = 0.0
    for key, vector in per_entry_state(optimizer, leaf).items():
        assert vector.shape == leaf.shape
        if kind == "eight_bit":  # blocks of 256 are mixed: one more rounding
            tolerance = 0.02 * max(map(abs, before[key].values()))
        for i, value in by_entry(masked, vector).items():
            assert abs(value - before[key].get(i, 0.0)) <= tolerance * (i in kept), (key, i)
    assert step is None or float(optimizer.state[leaf]["step"]) == step
    assert torch.equal(masked.base, flat[new.indices.long()])
    inside = new.to_mask().flatten()
    assert torch.equal(now[~inside], flat[~inside]), "dropped entries have the base's bits"
    assert all(now[i] == weight.flatten()[i] for i in kept)
    assert all(now[i] == flat[i] for i in grown)

    train(model, optimizer, seed=1)
    now = model.weight.detach().flatten()
    assert torch.equal(now[~inside], flat[~inside])
    assert torch.equal(now[inside], (flat[inside] + leaf.detach()))
    moved = by_entry(masked, leaf.detach())
    assert all(moved[i] != 0 for i in grown)
    sparse.detach()
    assert torch.equal(model.weight, base)


def test_growing_entries_and_dropping_them_again_leaves_no_trace():
    runs = []
    for move in (False, True):
        model, _, _, masked = attached(nnz=300)
        optimizer = torch.optim.AdamW([masked.leaf], lr=1e-2)
        train(model, optimizer)
        if move:
            start = masked.pattern
            union = torch.cat([start.indices, pattern_of(start.shape, 300, 5).indices]).unique()
            repattern_([(masked, SparsePattern.from_indices(union, start.shape))], [optimizer])
            repattern_([(masked, start)], [optimizer])
        train(model, optimizer, seed=1)
        runs.append((masked.leaf.detach().clone(), model.weight.detach().clone()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_many_moves_restore_the_base_in_every_dtype(dtype):
    model, base, sparse, masked = attached(dtype)
    optimizer = torch.optim.AdamW([masked.leaf], lr=1e-2)
    for round_ in range(8):
        train(model, optimizer, steps=1, seed=round_)
        repattern_([(masked, pattern_of(base.shape, 600 - 20 * round_, round_ + 2))], [optimizer])
        outside = ~masked.pattern.to_mask()
        assert torch.equal(model.weight[outside], base[outside])
        assert torch.equal(bottom_value(model._parameters["weight"]), base)
    sparse.detach()
    assert torch.equal(model.weight, base)


def test_stochastically_rounded_weights_keep_their_bits():
    model, _, _, masked = attached(torch.bfloat16)
    optimizer = SparseAdamW([masked.leaf], lr=1e-2, stochastic_rounding=True)
    train(model, optimizer)
    old, before = masked.pattern.to_mask(), model.weight.detach().clone()
    new = pattern_of(masked.pattern.shape, 600, 2)
    repattern_([(masked, new)], [optimizer])
    kept = old & new.to_mask()
    assert torch.equal(model.weight[kept], before[kept])


def test_strided_weights_and_negative_zeros():
    model, _, sparse, masked = attached(nnz=50)
    sparse.detach()
    weight = torch.randn(30, 40).t()
    weight[0, :5] = -0.0
    model.weight = nn.Parameter(weight)
    base = weight.contiguous().view(torch.int32).clone()
    sparse = attach(model, {"weight": pattern_of((40, 30), 600, 1)})
    masked = sparse._masked["weight"]
    optimizer = torch.optim.AdamW([masked.leaf], lr=1e-2)
    for round_ in range(3):
        train(model, optimizer, steps=1)
        repattern_([(masked, pattern_of((40, 30), 600, round_ + 2))], [optimizer])
    sparse.detach()
    assert torch.equal(model.weight.detach().contiguous().view(torch.int32), base)


def test_eight_bit_blocks_that_are_not_mixed_keep_their_codes():
    model, base, _, masked = attached()
    optimizer = SparseAdamW([masked.leaf], lr=1e-2, moment_bits=8)
    train(model, optimizer)
    state = optimizer.state[masked.leaf]
    before = {k: v.clone() for k, v in state.items()}
    indices = masked.indices.clone()
    indices[300] = indices[300] + 1 if indices[300] + 1 != indices[301] else indices[300] - 1
    if indices[300] == indices[299]:
        pytest.fail("choose another seed: no free neighbour")
    repattern_([(masked, SparsePattern.from_indices(indices, base.shape))], [optimizer])
    same = torch.arange(600) != 300
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[f"{name}_scale"], before[f"{name}_scale"])
        assert torch.equal(state[f"{name}_code"][same], before[f"{name}_code"][same])
        assert state[f"{name}_code"][300] == 0
    assert before["exp_avg_code"][300] != 0


def test_a_loss_that_is_still_alive_does_not_expect_the_old_size():
    model, _, _, masked = attached(nnz=600)
    optimizer = torch.optim.SGD([masked.leaf], lr=0.1)
    x = torch.randn(4, 30)
    loss = model(x).sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    repattern_([(masked, pattern_of((40, 30), 500, 2))], [optimizer])
    again = model(x).sum()  # `loss` still holds its graph
    again.backward()
    assert masked.leaf.grad.shape == (500,)
    del loss


@pytest.mark.parametrize("kind", ["foreach", "eight_bit", "momentum"])
@pytest.mark.parametrize("count", [600, 450], ids=["same_count", "fewer"])
def test_an_optimizer_that_was_not_passed_but_has_stepped_follows(kind, count):
    runs = []
    for passed in (True, False):
        model, base, _, masked = attached()
        optimizer = OPTIMIZERS[kind]([masked.leaf])
        train(model, optimizer)
        new = pattern_of(base.shape, count, 2)
        repattern_([(masked, new)], [optimizer] if passed else None)
        train(model, optimizer, seed=1)
        runs.append(model.weight.detach().clone())
    assert torch.equal(*runs)


def test_state_moves_once_and_only_of_optimizers_that_stepped():
    model, base, _, masked = attached()
    leaf = masked.leaf
    optimizer = torch.optim.AdamW([leaf], lr=1e-2)
    train(model, optimizer)

    class Wrapper:
        """What accelerate makes of one: not a step of its own, the same state."""

        param_groups, state = optimizer.param_groups, optimizer.state

    loaded = torch.optim.AdamW([leaf], lr=1e-2)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    as_loaded = loaded.state[leaf]["exp_avg"].clone()
    before = by_entry(masked, optimizer.state[leaf]["exp_avg"])
    new = pattern_of(base.shape, 600, 2)
    repattern_([(masked, new)], [Wrapper(), optimizer])
    wanted = {i: before.get(i, 0.0) for i in new.indices.tolist()}
    assert by_entry(masked, optimizer.state[leaf]["exp_avg"]) == wanted
    assert torch.equal(loaded.state[leaf]["exp_avg"], as_loaded)
    other = OPTIMIZERS["adamw"]([nn.Parameter(torch.zeros(2))])
    with pytest.raises(AttachError, match="in no group"):  # what is passed is still checked
        repattern_([(masked, pattern_of(base.shape, 600, 3))], other)


def test_optimizers_that_stepped_are_remembered_weakly():
    model, _, _, masked = attached()
    optimizer = torch.optim.SGD([masked.leaf], lr=1e-2)
    assert not any(known is optimizer for known in stepped())
    train(model, optimizer, steps=2)
    assert sum(known is optimizer for known in stepped()) == 1
    alive = weakref.ref(optimizer)
    del optimizer
    assert alive() is None


def test_refusals_come_before_any_change():
    model, base, _, masked = attached()
    optimizer = torch.optim.AdamW([masked.leaf], lr=1e-2)
    train(model, optimizer)
    weight, pattern = model.weight.detach().clone(), masked.pattern
    new = pattern_of(base.shape, 600, 2)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(AttachError, match=r"leaf of 'weight' is in no group .*SGD"):
        repattern_([(masked, new)], [other])
    for given, message in (("adam", "got 'adam'"), ([], "names none"), ([None], "got NoneType")):
        with pytest.raises(AttachError, match=message):
            repattern_([(masked, new)], given)
    optimizer.state[masked.leaf]["history"] = [torch.zeros(600)]
    with pytest.raises(AttachError, match=r"AdamW keeps 'history' .* as a list"):
        repattern_([(masked, new)], None)
    with pytest.raises(AttachError, match=r"AdamW keeps 'history' .* as a list"):
        repattern_([(masked, new)], [optimizer])
    optimizer.state[masked.leaf]["history"] = torch.zeros(600, dtype=torch.uint8)
    with pytest.raises(AttachError, match=r"'history' .* as torch.uint8 of shape \(600,\)"):
        repattern_([(masked, new)], [optimizer])
    del optimizer.state[masked.leaf]["history"]
    empty = SparsePattern.from_indices(torch.empty(0, dtype=torch.int64), base.shape)
    with pytest.raises(MaskError, match="'weight': the new pattern keeps no entry"):
        repattern_([(masked, empty)], [optimizer])
    parameter = model._parameters["weight"]
    push(parameter, Holder("Composer(sw)", None, parameter.detach().clone()))
    with pytest.raises(StackOrderError, match=r"move the mask of 'weight': Composer\(sw\)"):
        repattern_([(masked, new)], [optimizer])
    assert masked.pattern is pattern
    assert torch.equal(model.weight, weight)


def test_moves_between_patterns_without_common_entries():
    moves = Moves.between(torch.tensor([1, 5], dtype=torch.int32), torch.tensor([0, 2, 7]).int())
    assert moves.old.numel() == 0
    assert moves.apply(torch.ones(2)).tolist() == [0.0, 0.0, 0.0]
    moves = Moves.between(torch.empty(0).int(), torch.tensor([3]).int())
    assert moves.apply(torch.empty(0)).tolist() == [0.0]
