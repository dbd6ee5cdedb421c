"""Every family of models trains, saves and comes back under masks on each of its weights.

20 steps of AdamW with weight decay and clipping, beside dense training whose gradients and decay
are masked. ``_architectures.py`` has the models and the tier that each weight has to take.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

import sparseft
from sparseft import attach
from sparseft.modules import ParameterIndex, experts, taps

pytest.importorskip("transformers", reason="transformers is not installed")


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


zoo = _load("_architectures")

WIDTH = 16
DENSITY = 0.3
STEPS = 20
RESUMED_AT = 15
DENSE_STEPS = 6
LR, DECAY, CLIP = 3e-3, 0.1, 1.0


def made(architecture, width=WIDTH, seed=0):
    torch.manual_seed(seed)
    return architecture.build(width)


def inputs_at(architecture, step):
    return architecture.inputs(torch.Generator().manual_seed(step))


def tensors_of(model):
    """Return copies of all parameters and buffers of a stock model, those never saved too."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def running(name):
    """Whether a buffer is a batch norm's statistic, which forwards in training mode update."""
    return name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")


def train(architecture, model, sparse, steps, state=None):
    """Train at the masks; return losses and the state before step RESUMED_AT."""
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=LR, weight_decay=DECAY)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    losses = []
    for step in steps:
        if step == RESUMED_AT and state is None:
            state = copy.deepcopy(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            )
        optimizer.zero_grad()
        loss = zoo.loss_of(model, inputs_at(architecture, step), step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sparse.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), state


def train_dense(architecture, model, masks, steps):
    """Train the stock model with gradients and decay masked; return losses and first gradients."""
    index = ParameterIndex(model)
    weights = {name: index.get(name) for name in masks}
    base = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=LR, weight_decay=0.0)
    losses, first = [], {}
    for step in steps:
        optimizer.zero_grad()
        loss = zoo.loss_of(model, inputs_at(architecture, step), step)
        loss.backward()
        with torch.no_grad():
            for name, weight in weights.items():
                if weight.grad is not None:
                    if step == 0:
                        first[name] = weight.grad.clone()
                    weight.grad *= masks[name]
            torch.nn.utils.clip_grad_norm_(weights.values(), CLIP)
            for name, weight in weights.items():
                if weight.grad is not None:
                    weight.sub_((weight - base[name]) * masks[name], alpha=LR * DECAY)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), first


def tiers_taken(monkeypatch):
    """Record, by parameter name, which Functions run a backward."""
    taken = {}
    for function, tier in (
        (taps._LinearAtMask, None),
        (taps._EmbeddingAtMask, zoo.EMBEDDING),
        (taps._AliasAtMask, zoo.GENERIC),
        (experts._ExpertsAtMask, zoo.EXPERT),
    ):

        def backward(ctx, *grads, inner=function.backward, tier=tier):
            name = tier or (zoo.CONV1D if ctx.transposed else zoo.LINEAR)
            taken.setdefault(ctx.name, set()).add(name)
            return inner(ctx, *grads)

        monkeypatch.setattr(function, "backward", staticmethod(backward))
    return taken


@functools.cache
def trained(name):
    """Return everything the tests below look at, of one family."""
    architecture = zoo.ARCHITECTURES[name]
    run = types.SimpleNamespace(architecture=architecture, model=made(architecture).train())
    run.stock = copy.deepcopy(run.model)
    run.base = tensors_of(run.model)
    chosen = sparseft.select(run.model, "random", density=DENSITY, scope="tensor")
    run.masks = {n: pattern.to_mask() for n, pattern in chosen.items()}
    run.dense_losses, run.dense_grads = train_dense(
        architecture, run.stock, run.masks, range(DENSE_STEPS)
    )
    run.sparse = attach(run.model, chosen)
    with pytest.MonkeyPatch.context() as patch:
        run.tiers = tiers_taken(patch)
        zoo.loss_of(run.model, inputs_at(architecture, 0), 0).backward()
    run.grads = {n: leaf.grad for n, leaf in run.sparse.leaves.items()}
    run.model.load_state_dict(
        run.model.state_dict() | {n: run.base[n] for n in run.base if running(n)}
    )
    run.losses, run.state = train(architecture, run.model, run.sparse, range(STEPS))
    return run


@pytest.fixture(params=zoo.ARCHITECTURES)
def run(request):
    if not zoo.ARCHITECTURES[request.param].exists():
        pytest.skip(f"this transformers has no {zoo.ARCHITECTURES[request.param].config}")
    return trained(request.param)


def test_every_weight_takes_its_tier(run):
    index = ParameterIndex(run.model)
    assert set(run.sparse.names) == set(index.names), "some weight has no mask"
    wrong = {}
    for name in run.sparse.names:
        expected = run.architecture.tier(name, index.get(name))
        got = "+".join(sorted(run.tiers.get(name, ()))) or None
        if got != expected:
            wrong[name] = (expected, got)
    assert not wrong, f"(expected, got): {wrong}"


def test_gradients_are_the_dense_ones_at_the_mask(run):
    assert set(run.dense_grads) == {n for n, g in run.grads.items() if g is not None}
    for name, dense in run.dense_grads.items():
        wanted = dense[run.masks[name]]
        error = (run.grads[name] - wanted).norm()
        # Biases of keys have a gradient of rounding noise only, hence the floor.
        assert error <= 1e-5 * wanted.norm() + 1e-7, f"{name}: {error:.1e} of {wanted.norm():.1e}"


def test_losses_are_those_of_dense_training_under_the_mask(run):
    torch.testing.assert_close(
        run.losses[:DENSE_STEPS], run.dense_losses, rtol=1e-4, atol=0, msg=str
    )
    assert run.losses.isfinite().all()


def test_frozen_entries_keep_their_bits(run):
    index = ParameterIndex(run.model)
    for name, mask in run.masks.items():
        now = index.get(name).detach()
        assert torch.equal(now[~mask], run.base[name][~mask]), name
        assert not torch.equal(now[mask], run.base[name][mask]), name


def test_resuming_from_a_state_dict_gives_the_same_bits(run):
    model = made(run.architecture).train()
    sparse = attach(model, run.sparse.patterns)
    losses, _ = train(run.architecture, model, sparse, range(RESUMED_AT, STEPS), run.state)
    assert torch.equal(losses, run.losses[RESUMED_AT:])
    for name, leaf in sparse.leaves.items():
        assert torch.equal(leaf, run.sparse.leaves[name]), name
