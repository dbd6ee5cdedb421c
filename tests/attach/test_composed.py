"""Training on top of a composition, and composing on top of training, with the real Composer."""

from __future__ import annotations

import pytest
import torch

from sparseft import Adapter, Composer, SparseAdamW, SparseDiff, attach
from sparseft.errors import StackOrderError


def language(model, masks, seed=7):
    generator = torch.Generator().manual_seed(seed)
    diffs = {
        name: SparseDiff.from_dense(torch.randn(mask.shape, generator=generator) * 0.1, mask)
        for name, mask in masks.items()
    }
    return Adapter(diffs, name="sw")


def step(model, sparse, ids, kit, count=5):
    optimizer = SparseAdamW(sparse.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(count):
        optimizer.zero_grad()
        kit.loss(model, ids).backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_task_diff_trained_above_a_source_language(dtype, ids, kit):
    model = kit.make(dtype)
    bottom = kit.snapshot(model)
    source = language(model, kit.masks(model, seed=3))
    composer = Composer(model, {"sw": source})
    composer.apply(["sw"])
    beneath = kit.snapshot(model)
    sparse = attach(model, kit.masks(model))
    step(model, sparse, ids, kit)
    task = sparse.adapter("task")
    assert task.metadata.parents == (source.digest,)
    with pytest.raises(StackOrderError, match="attach"):
        composer.revert()
    with pytest.raises(StackOrderError, match="attach"):
        composer.switch([])
    sparse.detach()
    assert all(torch.equal(t, beneath[n]) for n, t in kit.snapshot(model).items())
    composer.revert()
    assert all(torch.equal(t, bottom[n]) for n, t in kit.snapshot(model).items())
    # The fingerprint is of the bottom base, so the diff is accepted there and composes.
    composer.add("task", task)
    composer.apply(["sw", "task"])
    composer.revert()
    assert all(torch.equal(t, bottom[n]) for n, t in kit.snapshot(model).items())


def test_composing_for_evaluation_in_the_middle_of_training(ids, kit):
    model, plain = kit.make(), kit.make()
    source = language(plain, kit.masks(plain, seed=3))
    sparse, other = attach(model, kit.masks(model)), attach(plain, kit.masks(plain))
    composer = Composer(model, {"sw": source})
    step(model, sparse, ids, kit)
    with composer.composed(["sw"]):
        with torch.no_grad():
            model(ids)
        with pytest.raises(StackOrderError, match="Composer"):
            sparse.sync_()
    for leaf in sparse.parameters():
        leaf.grad = None
    step(model, sparse, ids, kit)
    step(plain, other, ids, kit)
    step(plain, other, ids, kit)
    assert all(torch.equal(leaf, other.leaves[n]) for n, leaf in sparse.leaves.items())
