"""`Attachment.reselect_`: masks of every tier move, under any optimizer, compiler or wrapper."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparseft import Composer, SparseAdamW, attach
from sparseft.adapter import Adapter
from sparseft.diff import SparseDiff
from sparseft.errors import AttachError, BaseMismatchError, MaskError, UnknownNameError


def train(model, optimizer, ids, kit, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        kit.loss(model, ids).backward()
        optimizer.step()


def optimizers():
    return {
        "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        "foreach": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, foreach=True),
        "ours": lambda p: SparseAdamW(p, lr=1e-2, moment_bits=8),
    }


@pytest.mark.parametrize("kind", optimizers())
def test_frozen_is_frozen_through_many_moves_of_every_tier(kind, tiny, ids, kit):
    base = kit.snapshot(tiny)
    sparse = attach(tiny, kit.masks(tiny))
    leaves = sparse.leaves
    optimizer = optimizers()[kind](sparse.parameters())
    for round_ in range(4):
        train(tiny, optimizer, ids, kit)
        masks = kit.masks(tiny, density=0.25, seed=round_ + 1)
        masks = {n: m for n, m in masks.items() if "diff_" not in n and n in sparse.names}
        assert sparse.reselect_(masks, optimizer=optimizer) > 0
        assert kit.agrees(sparse)
        for name, mask in masks.items():
            weight = sparse._masked[name].weight
            assert torch.equal(weight[~mask], base[name][~mask]), name
            assert sparse.patterns[name].to_mask().equal(mask)
    assert all(sparse.leaves[n] is leaf for n, leaf in leaves.items())
    train(tiny, optimizer, ids, kit)
    assert kit.agrees(sparse)
    adapter = sparse.adapter()
    assert all(d.pattern.equals(sparse.patterns[n]) for n, d in adapter.diffs.items())
    sparse.detach()
    assert all(torch.equal(t, base[n]) for n, t in kit.snapshot(tiny).items())


def test_gradients_after_a_move_are_those_of_masks_attached_there(tiny, ids, kit):
    before, after = kit.masks(tiny), kit.masks(tiny, seed=7)
    moved, fresh = copy.deepcopy(tiny), copy.deepcopy(tiny)
    one, two = attach(moved, before), attach(fresh, after)
    kit.loss(moved, ids).backward()
    one.reselect_(after, optimizer=None)
    for leaf in one.leaves.values():
        leaf.grad = None
    for model in (moved, fresh):
        kit.loss(model, ids).backward()
    for name, leaf in one.leaves.items():
        assert torch.equal(leaf.grad, two.leaves[name].grad), name


def test_a_compiled_model_follows(tiny, ids, kit):
    masks = {"up.weight": kit.masks(tiny)["up.weight"]}
    sparse = attach(tiny, masks)
    compiled = torch.compile(tiny, backend="eager")
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    train(compiled, optimizer, ids, kit)
    for new in (masks["up.weight"].flip(0), kit.masks(tiny, density=0.5)["up.weight"]):
        sparse.reselect_({"up.weight": new}, optimizer=optimizer)
        optimizer.zero_grad()
        kit.loss(compiled, ids).backward()
        got = sparse.leaves["up.weight"].grad.clone()
        optimizer.zero_grad()
        kit.loss(tiny, ids).backward()
        assert torch.equal(got, sparse.leaves["up.weight"].grad)
        assert got.numel() == int(new.sum())


def test_names_of_tied_weights_and_refusals(tiny, kit):
    sparse = attach(tiny, {"emb.weight": kit.masks(tiny)["emb.weight"]})
    new = kit.masks(tiny, seed=3)["emb.weight"]
    assert sparse.reselect_({"head.weight": new}, optimizer=None) > 0
    assert sparse.patterns["emb.weight"].to_mask().equal(new)
    assert sparse.reselect_({"head.weight": new}, optimizer=None) == 0
    with pytest.raises(UnknownNameError, match="'up.weight' has no mask to move"):
        sparse.reselect_({"up.weight": torch.ones(24, 8, dtype=torch.bool)}, optimizer=None)
    with pytest.raises(MaskError, match=r"'head.weight' has shape \(8, 23\)"):
        sparse.reselect_({"head.weight": new.t()}, optimizer=None)
    other = torch.optim.SGD(tiny.norm.parameters(), lr=0.1)
    with pytest.raises(AttachError, match="in no group of the optimizer given"):
        sparse.reselect_({"emb.weight": ~new}, optimizer=other)
    sparse.detach()
    with pytest.raises(AttachError, match="reselect_: these masks were detached"):
        sparse.reselect_({"emb.weight": new}, optimizer=None)


def test_above_a_composition_its_values_come_back(tiny, ids, kit):
    base = kit.snapshot(tiny)
    numel = tiny.up.weight.numel()
    diff = SparseDiff.from_dense(torch.randn(24, 8))
    composer = Composer(tiny, {"sw": Adapter({"up.weight": diff}, name="sw")})
    composer.switch(["sw"])
    composed = kit.snapshot(tiny)
    sparse = attach(tiny, {"up.weight": kit.masks(tiny)["up.weight"]})
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
    for seed in range(3):
        train(tiny, optimizer, ids, kit)
        new = kit.masks(tiny, seed=seed + 1)["up.weight"]
        sparse.reselect_({"up.weight": new}, optimizer=optimizer)
    sparse.detach()
    assert numel == diff.nnz
    assert all(torch.equal(t, composed[n]) for n, t in kit.snapshot(tiny).items())
    composer.revert()
    assert all(torch.equal(t, base[n]) for n, t in kit.snapshot(tiny).items())


def test_two_optimizers_each_move_their_own(tiny, ids, kit):
    sparse = attach(tiny, {n: kit.masks(tiny)[n] for n in ("up.weight", "down.weight")})
    leaves = sparse.leaves
    both = [
        torch.optim.AdamW([leaves["up.weight"]], lr=1e-2),
        torch.optim.SGD([leaves["down.weight"]], lr=1e-2, momentum=0.9),
    ]
    kit.loss(tiny, ids).backward()
    for optimizer in both:
        optimizer.step()
    new = {n: kit.masks(tiny, density=0.6, seed=4)[n] for n in sparse.names}
    with pytest.raises(AttachError, match="leaf of 'down.weight' is in no group"):
        sparse.reselect_(new, optimizer=both[0])
    sparse.reselect_(new, optimizer=both)
    up, down = both[0].state[leaves["up.weight"]], both[1].state[leaves["down.weight"]]
    assert up["exp_avg"].shape == leaves["up.weight"].shape == (int(new["up.weight"].sum()),)
    assert down["momentum_buffer"].shape == leaves["down.weight"].shape


def test_optimizers_that_are_not_passed_follow_where_they_have_stepped(tiny, ids, kit):
    weights = []
    for passed in (True, False):
        model = copy.deepcopy(tiny)
        sparse = attach(model, {n: kit.masks(tiny)[n] for n in ("up.weight", "down.weight")})
        optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
        train(model, optimizer, ids, kit, steps=2)
        new = {n: kit.masks(tiny, density=0.6, seed=4)[n] for n in sparse.names}
        sparse.reselect_(new, optimizer=optimizer if passed else None)
        train(model, optimizer, ids, kit, steps=2)
        weights.append(kit.snapshot(model))
    assert all(torch.equal(t, weights[1][n]) for n, t in weights[0].items())
    for given, message in (("adam", "got 'adam'"), ([], "names none"), (3, "got int")):
        with pytest.raises(AttachError, match=message):
            sparse.reselect_(new, optimizer=given)


def test_an_accelerated_optimizer_and_wrapper(tiny, ids, kit):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    sparse = attach(tiny, kit.masks(tiny))
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(tiny, torch.optim.AdamW(sparse.parameters(), lr=1e-2))
    for round_ in range(3):
        accelerator.backward(kit.loss(model, ids))
        optimizer.step()
        optimizer.zero_grad()
        masks = kit.masks(tiny, density=0.2, seed=round_ + 1)
        masks = {n: masks[n] for n in sparse.names}
        sparse.reselect_(masks, optimizer=optimizer)
        for leaf in sparse.leaves.values():
            assert optimizer.state[leaf]["exp_avg_sq"].shape == leaf.shape
    accelerator.backward(kit.loss(model, ids))
    optimizer.step()
    assert kit.agrees(sparse)


def test_compact_checkpoints_name_the_mask_of_their_time(ids, kit):
    models = []
    for _ in range(2):
        model = kit.make()
        masks = {"up.weight": kit.masks(model)["up.weight"]}
        models.append((model, attach(model, masks, compact_state_dict=True)))
    (model, sparse), (fresh, again) = models
    new = {"up.weight": kit.masks(model, seed=5)["up.weight"]}
    sparse.reselect_(new, optimizer=None)
    with torch.no_grad():
        sparse.leaves["up.weight"].normal_()
    sparse.sync_()
    state = model.state_dict()
    with pytest.raises((BaseMismatchError, RuntimeError), match="another mask or base|size mism"):
        fresh.load_state_dict(state, strict=False)
    again.reselect_(new, optimizer=None)
    fresh.load_state_dict(state, strict=False)
    assert torch.equal(model.up.weight, fresh.up.weight)


def test_a_copy_moves_on_its_own(tiny, ids, kit):
    sparse = attach(tiny, {"up.weight": kit.masks(tiny)["up.weight"]})
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
    train(tiny, optimizer, ids, kit)
    twin = copy.deepcopy(tiny)
    pattern, weight = sparse.patterns["up.weight"], tiny.up.weight.detach().clone()
    from sparseft import attachments_of

    attachments_of(twin)[-1].reselect_(
        {"up.weight": kit.masks(tiny, seed=5)["up.weight"]}, optimizer=None
    )
    assert sparse.patterns["up.weight"] is pattern
    assert torch.equal(tiny.up.weight, weight)
    assert not torch.equal(twin.up.weight, weight)
    assert isinstance(twin.up, nn.Linear)
