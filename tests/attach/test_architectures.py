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
from sparseft import Adapter, attach, attachments_of
from sparseft.modules import ParameterIndex, experts, taps
from sparseft.ops import grouped_grad
from sparseft.profiling.allocations import Allocations

pytest.importorskip("transformers", reason="transformers is not installed")
# nn.Transformer's own, where batch_first is not set.
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


zoo = _load("_architectures")

ALL = {**zoo.ARCHITECTURES, **zoo.MORE}
PARAMS = [*zoo.ARCHITECTURES, *(pytest.param(name, marks=pytest.mark.slow) for name in zoo.MORE)]
# Whose memory is checked by default, and of which it is seen that a dense backward would not pass:
# Linear and Embedding, Conv1D, experts.
QUICK = ["bert", "deberta_v3", "t5_tied", "gpt2", "llama", "qwen3_moe", "vit", "transformer"]
TWINS = ["bert", "gpt2", "qwen3_moe"]


def wide(quick):
    """Return what to run the checks of memory on: ``quick`` by default."""
    return [
        pytest.param(name, marks=[] if name in quick else pytest.mark.slow)
        for name, architecture in ALL.items()
        if architecture.wide
    ]


WIDTH = 16
DENSITY = 0.15
STEPS = 20
RESUMED_AT = 17
DENSE_STEPS = 4
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
    """Train at the masks.

    Returns:
        Losses; the gradients of step 0; buffers after DENSE_STEPS; the state before RESUMED_AT.
    """
    seen = types.SimpleNamespace(losses=[], state=state)
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=LR, weight_decay=DECAY)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for step in steps:
        if step == RESUMED_AT and state is None:
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            seen.state = copy.deepcopy(parts)
        optimizer.zero_grad()
        loss = zoo.loss_of(model, inputs_at(architecture, step), step)
        loss.backward()
        if step == 0:
            seen.grads = {n: g if g is None else g.clone() for n, g in grads_of(sparse.leaves)}
        torch.nn.utils.clip_grad_norm_(sparse.parameters(), CLIP)
        optimizer.step()
        seen.losses.append(loss.detach())
        if step == DENSE_STEPS - 1:
            seen.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    seen.losses = torch.stack(seen.losses)
    return seen


def grads_of(parameters):
    return [(name, parameter.grad) for name, parameter in parameters.items()]


def train_dense(architecture, model, masks):
    """Train the stock model DENSE_STEPS with gradients and decay masked; the same, as far as."""
    seen = types.SimpleNamespace(losses=[])
    index = ParameterIndex(model)
    weights = {name: index.get(name) for name in masks}
    base = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=LR, weight_decay=0.0)
    for step in range(DENSE_STEPS):
        optimizer.zero_grad()
        loss = zoo.loss_of(model, inputs_at(architecture, step), step)
        loss.backward()
        if step == 0:
            seen.grads = {n: g if g is None else g[masks[n]] for n, g in grads_of(weights)}
        with torch.no_grad():
            for name, weight in weights.items():
                if weight.grad is not None:
                    weight.grad *= masks[name]
            torch.nn.utils.clip_grad_norm_(weights.values(), CLIP)
            for name, weight in weights.items():
                if weight.grad is not None:
                    weight.sub_((weight - base[name]) * masks[name], alpha=LR * DECAY)
        optimizer.step()
        seen.losses.append(loss.detach())
    seen.losses = torch.stack(seen.losses)
    seen.buffers = dict(model.named_buffers())
    return seen


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
    architecture = ALL[name]
    run = types.SimpleNamespace(architecture=architecture, model=made(architecture).train())
    run.stock = copy.deepcopy(run.model)
    run.base = tensors_of(run.model)
    chosen = sparseft.select(run.model, "random", density=DENSITY, scope="tensor")
    run.masks = {n: pattern.to_mask() for n, pattern in chosen.items()}
    run.dense = train_dense(architecture, run.stock, run.masks)
    run.sparse = attach(run.model, chosen)
    with pytest.MonkeyPatch.context() as patch:
        run.tiers = tiers_taken(patch)
        run.seen = train(architecture, run.model, run.sparse, range(STEPS))
    return run


@pytest.fixture(scope="module", autouse=True)
def freed_at_the_end():
    yield
    trained.cache_clear()


@pytest.fixture(params=PARAMS)
def run(request):
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
    assert set(run.seen.grads) == set(run.masks)
    for name, got in run.seen.grads.items():
        wanted = run.dense.grads[name]
        assert (got is None) == (wanted is None), name
        if wanted is not None:
            error = (got - wanted).norm()
            # Biases of keys have a gradient of rounding noise only, hence the floor.
            assert error <= 1e-5 * wanted.norm() + 1e-7, f"{name}: {error:.1e}, {wanted.norm():.1e}"


def test_losses_are_those_of_dense_training_under_the_mask(run):
    torch.testing.assert_close(
        run.seen.losses[:DENSE_STEPS], run.dense.losses, rtol=1e-4, atol=0, msg=str
    )
    assert run.seen.losses.isfinite().all()


def test_frozen_entries_keep_their_bits(run):
    index = ParameterIndex(run.model)
    for name, mask in run.masks.items():
        now = index.get(name).detach()
        assert torch.equal(now[~mask], run.base[name][~mask]), name
        assert not torch.equal(now[mask], run.base[name][mask]), name


def test_resuming_from_a_state_dict_gives_the_same_bits(run):
    model = made(run.architecture).train()
    sparse = attach(model, run.sparse.patterns)
    steps = range(RESUMED_AT, STEPS)
    resumed = train(run.architecture, model, sparse, steps, run.seen.state)
    assert torch.equal(resumed.losses, run.seen.losses[RESUMED_AT:])
    for name, leaf in sparse.leaves.items():
        assert torch.equal(leaf, run.sparse.leaves[name]), name


def eval_logits(architecture, model):
    """Return logits in evaluation mode, where torch's own layers take their fast paths."""
    was = model.training
    with torch.no_grad():
        logits = zoo.logits_of(model.eval(), inputs_at(architecture, STEPS))
    model.train(was)
    return logits


def test_a_saved_adapter_gives_the_same_logits_on_a_fresh_base(run, tmp_path):
    run.sparse.adapter().save(tmp_path / "adapter")
    wanted = eval_logits(run.architecture, run.model)
    model = made(run.architecture)
    before = eval_logits(run.architecture, model)
    sparse = attach(model, Adapter.load(tmp_path / "adapter"))
    # Statistics of batch norms are no parameters: they go the way of the state dict.
    statistics = {n: b for n, b in run.model.state_dict().items() if running(n)}
    model.load_state_dict(statistics, strict=False)
    assert torch.equal(eval_logits(run.architecture, model), wanted)
    assert not torch.equal(before, wanted)
    sparse.detach(restore=False)
    # With another flag torch may take another product of the same numbers (`should_fold`).
    model.requires_grad_(False)
    assert torch.equal(eval_logits(run.architecture, model), wanted)


def test_save_pretrained_of_the_attached_model(run, tmp_path):
    if not hasattr(run.model, "save_pretrained"):
        pytest.skip("save_pretrained: this model is of torch alone")
    run.model.save_pretrained(tmp_path)
    again = type(run.model).from_pretrained(tmp_path)
    how = getattr(run.model.config, "_experts_implementation", None)  # which is not saved
    again.config._experts_implementation = how
    assert ParameterIndex(again).names == ParameterIndex(run.model).names
    assert torch.equal(
        eval_logits(run.architecture, again), eval_logits(run.architecture, run.model)
    )


def test_statistics_that_an_adapter_lacks_are_told(caplog):
    run = trained("cnn")
    run.sparse.adapter()
    assert "2 norm layers moved" in caplog.text
    assert "norm, norm2" in caplog.text
    caplog.clear()
    trained("vit").sparse.adapter()
    assert not caplog.records


def test_buffers_are_those_of_stock_training(run):
    assert list(run.seen.buffers) == list(run.dense.buffers)
    for name, buffer in run.seen.buffers.items():
        assert running(name) == (not torch.equal(buffer, run.base[name])), name
        torch.testing.assert_close(buffer, run.dense.buffers[name], rtol=1e-4, atol=1e-6, msg=name)


def test_detach_brings_every_tensor_back(run):
    model = copy.deepcopy(run.model)
    attachments_of(model)[-1].detach(restore=True)
    now = tensors_of(model)
    assert list(now) == list(run.base)
    for name, tensor in now.items():
        assert torch.equal(tensor, run.base[name]), name
    assert type(model) is type(run.stock)
    assert {type(m) for m in model.modules()} == {type(m) for m in run.stock.modules()}


# P1: what a backward allocates.


class Largest(Allocations):
    """The largest single allocation, besides."""

    largest = 0

    def _replay(self, events):
        cpu = torch._C._autograd.DeviceType.CPU
        sizes = (e.nbytes() for e in events if e.name() == "[memory]" and e.device_type() == cpu)
        self.largest = max(sizes, default=0)
        super()._replay(events)


def largest_in_backward(architecture):
    """Return the bytes of a backward's largest allocation, of the smallest weight that has a fused
    tier and is larger than the activations, and how many such weights there are.
    """
    model = made(architecture, architecture.wide).train()
    index = ParameterIndex(model)
    fused = {
        name: weight[0].numel() if weight.ndim == 3 else weight.numel()  # of one expert
        for name, weight in index.items()
        if architecture.tier(name, weight) != zoo.GENERIC
    }
    large = {name: 4 * size for name, size in fused.items() if size >= architecture.wide**2 // 2}
    masks = sparseft.select(model, "random", density=0.002, scope="tensor", include=list(large))
    attach(model, masks)
    inputs = inputs_at(architecture, 0)
    for _ in range(2):  # what is made once is there at the second
        loss = zoo.loss_of(model, inputs, 0)
        for _ in range(6):
            with Largest() as memory:
                loss.backward(retain_graph=True)
            if memory.complete:
                break
    return memory.largest, min(large.values()), len(large)


@pytest.mark.parametrize("name", wide(QUICK))
def test_no_backward_allocates_what_a_dense_gradient_takes(name):
    largest, dense, count = largest_in_backward(ALL[name])
    assert count >= 4
    assert 0 < largest < dense, f"{largest:,} bytes at once; the smallest gradient has {dense:,}"


@pytest.mark.parametrize("name", wide(TWINS))
def test_dense_implementations_would_not_pass(name, monkeypatch):

    def dense_weight(grad, x, indices, transposed=False, backend=""):
        return (x.t() @ grad if transposed else grad.t() @ x).flatten()[indices.long()]

    def dense_table(grad, ids, indices, vocab, *_):
        table = grad.new_zeros(vocab, grad.shape[-1])
        return table.index_add_(0, ids.flatten(), grad.flatten(0, -2)).flatten()[indices.long()]

    monkeypatch.setattr(taps, "weight_grad_at", dense_weight)
    monkeypatch.setattr(taps, "embedding_grad_at", dense_table)
    monkeypatch.setattr(grouped_grad, "weight_grad_at", dense_weight)
    monkeypatch.setattr(grouped_grad, "_AT_ONCE", 0)  # or it would go through the reused tile
    largest, dense, _ = largest_in_backward(ALL[name])
    assert largest >= dense
