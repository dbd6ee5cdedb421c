"""Quantised bases under autocast, checkpointing, accumulation, evaluation, optimizers, compile."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparseft
from sparseft.modules import GradientScores
from sparseft.modules.dequantise import dequantise, stored_tensors

_spec = importlib.util.spec_from_file_location(
    "_quantised", Path(__file__).parent.parent / "_quantised.py"
)
q = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(q)
schemes = pytest.mark.parametrize("scheme", q.SCHEMES)
some = pytest.mark.parametrize("scheme", [q.SCHEMES[0], q.SCHEMES[3], q.SCHEMES[4]])


def make(scheme, dtype=torch.float32, fill=True):
    model = q.net(scheme, dtype)
    sparse = sparseft.attach(model, q.draw_masks(model))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in sparse.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.05 * fill)
    sparse.sync_()
    return model.train(), sparse


def grads(sparse):
    found = [p.grad.clone() for p in sparse.parameters()]
    for p in sparse.parameters():
        p.grad = None
    return found


def close(a, b, eps):
    return all((x - y).norm() <= eps * y.norm() for x, y in zip(a, b, strict=True))


X = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))


@schemes
def test_checkpointing_and_accumulation_give_the_same_gradients(scheme):
    model, sparse = make(scheme)
    model(X).pow(3).sum().backward()
    wanted = grads(sparse)
    for reentrant in (False, True):
        x = X.clone().requires_grad_(reentrant)
        checkpoint(model, x, use_reentrant=reentrant).pow(3).sum().backward()
        assert all(map(torch.equal, grads(sparse), wanted))
    for half in X.chunk(2):
        model(half).pow(3).sum().backward()
    assert close(grads(sparse), wanted, 1e-5)


@schemes
def test_low_precision_and_autocast(scheme):
    exact, wide = make(scheme)
    exact(X).pow(3).sum().backward()
    wanted = grads(wide)
    with torch.autocast("cpu", torch.bfloat16):
        exact(X).float().pow(3).sum().backward()
    assert close(grads(wide), wanted, 0.05)
    model, sparse = make(scheme, torch.bfloat16)
    out = model(X.bfloat16())
    assert out.dtype == torch.bfloat16
    out.float().pow(3).sum().backward()
    assert all(p.dtype == torch.float32 for p in sparse.parameters())
    assert close(grads(sparse), wanted, 0.1)


@some
@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
        lambda p: sparseft.SparseAdamW(p, lr=1e-2, moment_bits=8, stochastic_rounding=True),
        lambda p: sparseft.SparseLion(p, lr=1e-3),
    ],
    ids=["adamw", "sgd", "lbfgs", "sparse_adamw", "sparse_lion"],
)
def test_optimizers_lower_the_loss_and_leave_the_base(scheme, build):
    model, sparse = make(scheme, fill=False)
    before = {n: t.clone() for n, t in stored_tensors(model[0]).items()}
    optimizer = build(list(sparse.parameters()))

    def loss():
        optimizer.zero_grad()
        value = model(X).sub(1).square().mean()
        value.backward()
        return value

    first = loss().item()
    for _ in range(3):
        optimizer.step(loss)
    assert loss().item() < first
    assert all(bool(p.any()) for p in sparse.parameters())
    assert all(torch.equal(t, before[n]) for n, t in stored_tensors(model[0]).items())


@schemes
def test_evaluating_before_attach_or_between_steps_leaves_it_trainable(scheme):
    model = q.net(scheme).eval()
    with torch.no_grad():
        model(X)  # where the CPU has AVX512-BF16, bitsandbytes repacks 4-bit weights here
    sparse = sparseft.attach(model, q.draw_masks(model))
    dense = dequantise(model[0])
    for _ in range(2):
        model.train()(X).sum().backward()
        assert all(g.any() for g in grads(sparse)[:2])
        with torch.no_grad():
            model.eval()(X)
        assert torch.equal(dequantise(model[0]), dense)
    sparse.detach()
    with torch.no_grad():
        model(X)


@q.needs("bitsandbytes")
@pytest.mark.parametrize("by", ["attach", "scores"])
def test_evaluating_leaves_layers_without_a_mask_passable(by):
    model = q.net("bnb.nf4")
    model[2].support_avx512bf16_for_cpu |= by == "scores"  # whatever this CPU is
    repacks = [model[i].support_avx512bf16_for_cpu for i in (0, 2)]
    if by == "attach":
        block = sparseft.attach(model, {"0.weight": q.draw_masks(model)["0.weight"]})
    else:
        block = GradientScores(model, ["0.weight"])
    found = []
    with block:
        assert not model[0].support_avx512bf16_for_cpu
        assert not model[2].support_avx512bf16_for_cpu
        for _ in range(2):  # through a layer repacked for inference came zeros
            model.train()(X).square().sum().backward()
            found += grads(block) if by == "attach" else []
            with torch.no_grad():
                model.eval()(X)
    assert [model[i].support_avx512bf16_for_cpu for i in (0, 2)] == repacks
    assert by == "scores" or (found[0].any() and torch.equal(*found))


@q.needs("bitsandbytes")
@pytest.mark.parametrize("first", [0, 1])
def test_two_attachments_keep_each_others_layers_from_repacking(first):
    model = q.net("bnb.nf4")
    for i in (0, 2):
        model[i].support_avx512bf16_for_cpu = True
    names = ["0.weight", "2.weight"][:: -1 if first else 1]
    one, two = (sparseft.attach(model, {n: q.draw_masks(model)[n]}) for n in names)
    two.detach()
    assert not any(model[i].support_avx512bf16_for_cpu for i in (0, 2))
    other = copy.deepcopy(model)
    one.detach()
    assert all(model[i].support_avx512bf16_for_cpu for i in (0, 2))
    assert not any(other[i].support_avx512bf16_for_cpu for i in (0, 2))
    sparseft.attachments_of(other)[-1].detach()
    assert all(other[i].support_avx512bf16_for_cpu for i in (0, 2))


@schemes
def test_inputs_of_any_shape(scheme):
    model, _ = make(scheme)
    layer = model[0]
    whole = layer(X)
    assert torch.equal(layer(X.view(2, 4, 64)).view(8, 128), whole)
    assert layer(X[:0]).shape == (0, 128)
    assert layer(X[::2]).shape == (4, 128)
    assert torch.equal(layer(input=X) if scheme.startswith("torchao") else layer(x=X), whole)


@q.needs("bitsandbytes")
def test_a_forward_of_the_instance_is_no_way_past_the_mask():
    # As accelerate puts one there when it spreads a model over devices.
    model, sparse = make("bnb.nf4")
    wanted = model(X)
    other = q.net("bnb.nf4").train()
    for layer in (other[0], other[2]):
        layer._old_forward, layer.forward = layer.forward, lambda *a, m=layer: m._old_forward(*a)
    again = sparseft.attach(other, sparse.adapter())
    assert torch.equal(other(X), wanted)
    other(X).sum().backward()
    assert all(p.grad is not None for p in again.parameters())


@some
def test_a_mask_on_the_bias_beside_one_on_its_quantised_weight(scheme):
    model = q.net(scheme).train()
    before = model[0].bias.detach().clone()
    masks = {**q.draw_masks(model), "0.bias": torch.arange(128) % 2 == 0}
    sparse = sparseft.attach(model, masks)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=1e-2)
    model(X).pow(3).sum().backward()
    optimizer.step()
    moved = model[0]._parameters["bias"] != before
    assert moved[::2].all()
    assert not moved[1::2].any()
    sparse.detach()
    assert torch.equal(model[0].bias, before)
    assert type(model[0]) is type(q.net(scheme)[0])


@some
def test_selection_reads_the_dequantised_weights(scheme):
    model = q.net(scheme).train()
    twin = q.dense_twin(model)
    mine = lambda net, x: net(x).pow(3).sum()  # noqa: E731
    batches = [X, X * 2]
    for method, options in (
        ("weight_magnitude", {}),
        ("low_rank", {"rank": 4}),
        ("random", {"seed": 3}),
        ("gradient", {"batches": batches, "loss_fn": mine, "train": True}),
        ("fisher", {"batches": batches, "loss_fn": mine, "train": True, "shortlist": None}),
        ("function", {"fn": lambda name, p: p.detach().abs()}),
    ):
        a, b = (
            sparseft.select(m, method, density=0.05, include=["*.weight"], **options)
            for m in (model, twin)
        )
        assert a["0.weight"].shape == (128, 64)
        common = sum(len(set(a[n].indices.tolist()) & set(b[n].indices.tolist())) for n in a)
        assert common >= 0.99 * a.nnz == 0.99 * b.nnz, method
    of = [sparseft.select(m, "random", density=0.05, density_of="model").nnz for m in (model, twin)]
    assert of[0] == of[1]
    assert not any(module._forward_hooks for module in model.modules())


@q.needs("bitsandbytes")
def test_gradients_are_tapped_where_masks_are_in_training():
    from sparseft.modules import GradientScores

    model, sparse = make("bnb.nf4")
    with GradientScores(model, ["0.weight"], statistic="sum") as scores:
        model(X).pow(3).sum().backward()
        scores.step()
    _, sums = scores.finish()["0.weight"]
    leaf = grads(sparse)[0]
    at_mask = sums[sparse.patterns["0.weight"].indices.long()]
    assert (at_mask - leaf).abs().max() <= 1e-4 * leaf.abs().max()


@q.needs("torchao")
def test_int4_of_torchao_is_refused_by_the_library_without_its_kernels():
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    if importlib.util.find_spec("mslk") is not None:
        pytest.skip("mslk is installed, so torchao's int4 layout can be made")
    model = nn.Sequential(nn.Linear(64, 128, dtype=torch.bfloat16))
    with pytest.raises(ImportError, match="mslk"):
        quantize_(model, Int4WeightOnlyConfig(group_size=32))


@some
def test_masks_that_move_by_drop_and_grow(scheme):
    from sparseft.training.trained_state import trained_state

    model, sparse = make(scheme, fill=False)
    optimizer = sparseft.SparseAdamW(sparse.parameters(), lr=1e-2)
    moving = sparseft.Reselection(sparse, steps=6, every=2, accumulate=1)
    start = sparse.patterns["0.weight"].indices.clone()
    losses = []
    for _ in range(6):
        loss = (model(X) - 1).square().mean()
        loss.backward()
        moving.step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(sparse.patterns["0.weight"].indices, start)
    beside = sum(sparse.patterns[n].nnz for n in ("0.weight", "2.weight"))
    held = trained_state(sparse, optimizer)
    assert held.base == 4 * (sparse.nnz - beside)  # the norm's alone
    assert held.diff == 4 * sparse.nnz
    moving.close()


@q.needs("bitsandbytes")
@pytest.mark.slow
def test_a_compiled_model_gives_the_same():
    model, sparse = make("bnb.nf4")
    wanted = model(X)
    wanted.pow(3).sum().backward()
    before = grads(sparse)
    got = torch.compile(model, backend="aot_eager")(X)
    got.pow(3).sum().backward()
    assert torch.equal(got, wanted)
    assert close(grads(sparse), before, 1e-6)


@q.needs("torchao")
def test_stacks_of_experts_and_tables_of_torchao_are_refused_by_name():
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

    from sparseft.errors import AttachError

    model = nn.Sequential(nn.Embedding(64, 32))
    model.register_parameter("experts", nn.Parameter(torch.randn(2, 32, 32)))
    quantize_(model, FqnToConfig({"experts": Int8WeightOnlyConfig()}), filter_fn=None)
    quantize_(model, Int8WeightOnlyConfig(), lambda module, _: isinstance(module, nn.Embedding))
    for name in ("experts", "0.weight"):
        mask = torch.ones(model.get_parameter(name).shape, dtype=torch.bool)
        with pytest.raises(AttachError, match=rf"'{name}' is quantised \(torchao.Int8Tensor\)"):
            sparseft.attach(model, {name: mask})
