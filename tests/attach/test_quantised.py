"""Masks on quantised weights: trained beside them, with the gradients of the dequantised model."""

from __future__ import annotations

import copy
import importlib.util
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import sparseft
from sparseft.attachment import attachments_of
from sparseft.errors import AttachError, BaseMismatchError, MaskError
from sparseft.modules.dequantise import dequantise, stored_tensors


def _load(name):
    path = Path(__file__).parent.parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


q, accuracy = _load("_quantised"), _load("_accuracy")
schemes = pytest.mark.parametrize("scheme", q.SCHEMES)
nf4 = q.needs("bitsandbytes")


def stored(model):
    return {
        f"{name}.{key}": tensor.clone()
        for name in q.quantised_names(model)
        for key, tensor in stored_tensors(model.get_submodule(name)).items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[k]) for k, t in a.items())


def fill(sparse, seed=0, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in sparse.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    sparse.sync_()


def step(model, x):
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.float().pow(3).sum().backward()
    return y.detach(), x.grad


@schemes
def test_output_and_gradients_are_those_of_the_dequantised_model(scheme):
    model = q.net(scheme)
    masks, before = q.draw_masks(model), stored(model)
    wide = q.dense_twin(model, torch.float64)
    twin = q.dense_twin(model)
    runs = []
    x = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(0))
    for net in (model, twin, wide):
        sparse = sparseft.attach(net, masks)
        fill(sparse)
        out = step(net, x.to(next(net.parameters()).dtype if net is wide else torch.float32))
        runs.append([*out, *(p.grad for p in sparse.parameters())])
    for mine, theirs, exact in zip(*runs, strict=True):
        accuracy.assert_as_accurate(mine, theirs, exact.double(), name=scheme)
    assert same(stored(model), before)


@schemes
def test_training_resuming_and_leaving(scheme):
    model = q.net(scheme)
    before, masks = stored(model), q.draw_masks(model)
    stock = {name: type(module) for name, module in model.named_modules()}
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        untouched = model.train()(x)
    sparse = sparseft.attach(model, masks)
    assert torch.equal(model(x), untouched)  # a diff of zeros changes no bit
    optimizer = sparseft.SparseAdamW(sparse.parameters(), lr=1e-2)
    twin = sparseft.attach(other := q.net(scheme), masks)
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2, foreach=False)
    for _ in range(3):
        for net, opt in ((model, optimizer), (other, plain)):
            step(net, x)
            opt.step()
            opt.zero_grad()
    assert all(
        torch.equal(a, b) for a, b in zip(sparse.parameters(), twin.parameters(), strict=True)
    )
    assert same(stored(model), before)

    row = sparse.report()[0]
    assert row.dtype.startswith(scheme.split(".")[0])
    assert (row.shape, row.rounded_away, row.changed) == ((128, 64), 0, row.nnz)

    # A strict load into a fresh model of the same base; the library's own layer refuses its own.
    state = model.state_dict()
    fresh = q.net(scheme)
    resumed = sparseft.attach(fresh, masks)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), model(x))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    fill(attachments_of(copied)[-1])
    assert not torch.equal(copied(x), model(x))
    assert same(stored(copied), before)

    adapter = sparse.adapter()
    resumed.detach()
    loaded = sparseft.attach(q.net(scheme), adapter)
    assert torch.equal(loaded.model(x), model(x))
    trained = model(x)
    with pytest.raises(AttachError, match=r"restore=False.*merged_state_dict.*save_merged"):
        sparse.detach(restore=False)
    assert torch.equal(model(x), trained)
    sparse.detach()
    assert {name: type(module) for name, module in model.named_modules()} == stock
    assert not any(module._forward_hooks for module in model.modules())
    assert not any("diff" in name for name in model.state_dict())
    assert torch.equal(model(x), untouched)


@nf4
def test_another_base_is_refused_and_another_quantisation_said(caplog):
    model, masks = q.net("bnb.nf4"), q.draw_masks(q.net("bnb.nf4"))
    sparse = sparseft.attach(model, masks)
    fill(sparse)
    adapter, state = sparse.adapter(), model.state_dict()
    prints = adapter.metadata.fingerprint.tensors
    assert prints["0.weight"].dtype == "bnb.nf4"
    assert prints["3.weight"].dtype == "float32"

    with caplog.at_level(logging.WARNING, logger="sparseft"):
        sparseft.attach(q.net("bnb.nf4"), adapter)
    assert not caplog.records
    for other in (q.net("bnb.nf4.double"), q.net("bnb.int8"), q.stock_net()):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="sparseft"):
            sparseft.attach(other, adapter)
        assert "2 base tensors (0.weight and 1 more) are not the bytes" in caplog.text

    strange = q.stock_net()
    with torch.no_grad():
        strange[0].weight.mul_(1.3)
    strange[0] = q.quantise(strange[0], "bnb.nf4")
    with pytest.raises(BaseMismatchError, match="'0.weight' is not the base"):
        sparseft.attach(strange, adapter)
    attached = sparseft.attach(strange, {"0.weight": masks["0.weight"]})
    with pytest.raises(BaseMismatchError, match=r"'0.weight' is quantised .* '0.weight"):
        strange.load_state_dict(state, strict=False)
    with pytest.raises(BaseMismatchError):
        attached.load_adapter_(adapter)


@schemes
def test_masks_move_as_in_the_dequantised_model(scheme):
    model = q.net(scheme)
    twin = q.dense_twin(model)
    pairs = []
    for net in (model, twin):
        sparse = sparseft.attach(net, q.draw_masks(model))
        pairs.append((net, sparse, sparseft.SparseAdamW(sparse.parameters(), lr=1e-2)))
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    moved = q.draw_masks(model, density=0.1, seed=2)
    moved["0.weight"] |= q.draw_masks(model)["0.weight"]
    before = stored(model)
    grown = []
    for net, sparse, optimizer in pairs:
        step(net, x)
        optimizer.step()
        grown.append(sparse.reselect_(moved, optimizer=optimizer))
        optimizer.zero_grad()
        step(net, x)
        optimizer.step()
    assert grown[0] == grown[1] > 0
    (_, mine, opt), (_, theirs, _) = pairs
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert a.shape == b.shape == opt.state[a]["exp_avg"].shape
        assert (a - b).abs().max() < 1e-4
    assert same(stored(model), before)
    with pytest.raises(MaskError, match=r"shape"):
        mine.reselect_({"0.weight": torch.ones(4096, 1, dtype=torch.bool)}, optimizer=opt)


@schemes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, None], ids=str)
def test_merged_export_is_dequantised_plus_diff_rounded_once(scheme, dtype):
    model = q.net(scheme)
    sparse = sparseft.attach(model, q.draw_masks(model))
    fill(sparse)
    merged = sparse.merged_state_dict(dtype)
    plain = q.stock_net()
    assert merged.keys() == plain.state_dict().keys()
    for name in ("0", "2"):
        wanted = dequantise(model.get_submodule(name)).reshape(-1).clone()
        leaf = sparse.leaves[f"{name}.weight"].detach()
        wanted[sparse.patterns[f"{name}.weight"].indices.long()] += leaf
        got = merged[f"{name}.weight"]
        assert torch.equal(got.reshape(-1), wanted.to(dtype or torch.float32))
    assert torch.equal(merged["3.weight"], model[3].weight.detach().to(dtype or torch.float32))
    plain.load_state_dict(merged)
    x = torch.randn(4, 64)
    model.train()
    assert (plain(x) - model(x)).abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-4)
    with pytest.raises(AttachError, match=r"save_merged: a Sequential has no save_pretrained"):
        sparse.save_merged("/nowhere")


@schemes
def test_compact_state_dict_holds_what_was_trained(scheme):
    model = q.net(scheme)
    masks = q.draw_masks(model)
    sparse = sparseft.attach(model, masks, compact_state_dict=True)
    fill(sparse)
    state = model.state_dict()
    assert set(state) == {f"{i}.diff_weight{end}" for i in (0, 2, 3) for end in ("", "_base")}
    fresh = q.net(scheme)
    sparseft.attach(fresh, masks, compact_state_dict=True)
    missing, unexpected = fresh.load_state_dict(state, strict=False)
    assert not missing
    assert not unexpected
    x = torch.randn(4, 64)
    assert torch.equal(fresh(x), model(x))
    strange = q.stock_net()
    with torch.no_grad():
        strange[0].weight.mul_(1.3)
    for i in (0, 2):
        strange[i] = q.quantise(strange[i], scheme)
    sparseft.attach(strange, masks, compact_state_dict=True)
    with pytest.raises(BaseMismatchError, match="another mask or base of '0.weight'"):
        strange.load_state_dict(state, strict=False)


@nf4
def test_refused_where_no_diff_can_be_added(monkeypatch):
    from bitsandbytes.nn import Embedding4bit, Linear4bit

    table = Embedding4bit(64, 64).to("cpu")
    with pytest.raises(AttachError, match=r"'weight' is quantised \(bnb.fp4\) .*Embedding4bit"):
        sparseft.attach(table, {"weight": torch.ones(64, 64, dtype=torch.bool)})
    with pytest.raises(AttachError, match=r"Params4bit of torch.float32.*moves to a device"):
        sparseft.attach(Linear4bit(64, 128), {"weight": torch.ones(128, 64, dtype=torch.bool)})
    model = q.net("bnb.nf4")
    with pytest.raises(MaskError, match=r"\(4096, 1\).*\(128, 64\)"):
        sparseft.attach(model, {"0.weight": torch.ones(4096, 1, dtype=torch.bool)})
    sparse = sparseft.attach(model, q.draw_masks(model))
    with pytest.raises(AttachError, match="has a mask attached"):
        model[0].weight = nn.Parameter(torch.zeros(128, 64))
    with pytest.raises(AttachError, match="has a mask attached already"):
        sparseft.attach(model, q.draw_masks(model))
    sparse.detach()
