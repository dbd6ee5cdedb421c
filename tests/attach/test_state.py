"""State dicts, copies, pickles, devices and dtypes of an attached model."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from sparseft import Adapter, SparseAdamW, attach
from sparseft.attachment import attachments_of
from sparseft.errors import AttachError, BaseMismatchError, MaskError, UnknownNameError
from sparseft.modules.leaves import leaf_attribute
from sparseft.modules.storage_stack import Holder, bottom_value, push


def trained(model, ids, kit, steps=2, **options):
    sparse = attach(model, kit.masks(model), **options)
    optimizer = SparseAdamW(sparse.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        kit.loss(model, ids).backward()
        optimizer.step()
    return sparse, optimizer


def equal_leaves(a, b):
    return all(torch.equal(leaf, b.leaves[n]) for n, leaf in a.leaves.items())


def test_names_are_those_of_the_stock_model_plus_leaves(tiny, kit):
    names = list(tiny.state_dict())
    stock = dict(tiny.named_parameters())
    sparse = attach(tiny, kit.masks(tiny))
    after = list(tiny.state_dict())
    assert [n for n in after if "diff_" not in n] == names
    assert [n for n in after if "diff_" in n] == [leaf_attribute(n) for n in stock]
    assert after.index("up.diff_weight") > after.index("up.weight")
    assert "head.diff_weight" not in after, "a tied group has one leaf, on the canonical module"
    assert all(dict(tiny.named_parameters())[n] is p for n, p in stock.items())
    assert type(tiny.up).__name__ == "Linear"
    assert isinstance(tiny.up, nn.Linear)
    assert isinstance(tiny.up.weight, nn.Parameter)
    assert repr(tiny.up) == repr(nn.Linear(8, 24))
    assert dict(sparse.named_parameters()) == {
        n: p for n, p in tiny.named_parameters() if p.requires_grad
    }


def test_a_shared_module_saves_its_leaf_once(ids, kit):
    def build():
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.Linear(4, 4)})
        model["b"] = model["a"]
        return model, attach(model, {"b.weight": torch.eye(4) > 0})

    model, sparse = build()
    assert sparse.names == ["a.weight"]
    with torch.no_grad():
        sparse.leaves["a.weight"].fill_(0.5)
    sparse.sync_()
    state = model.state_dict()
    assert [n for n in state if "diff" in n] == ["a.diff_weight"]
    assert "diff_weight" in model["b"].state_dict()
    fresh, again = build()
    fresh.load_state_dict(state)
    assert equal_leaves(sparse, again)
    assert kit.agrees(again)
    del state["a.diff_weight"]
    assert fresh.load_state_dict(state, strict=False).missing_keys == ["a.diff_weight"]


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_resumes_bit_for_bit(strict, ids, kit):
    model = kit.make()
    sparse, optimizer = trained(model, ids, kit)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    fresh = kit.make()
    again = attach(fresh, kit.masks(fresh))
    second = SparseAdamW(again.parameters(), lr=1e-2)
    content = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    fresh.load_state_dict(content["model"], strict=strict)
    second.load_state_dict(content["optimizer"])
    assert kit.agrees(again)
    for net, opt in ((model, optimizer), (fresh, second)):
        for _ in range(2):
            opt.zero_grad()
            kit.loss(net, ids).backward()
            opt.step()
    assert equal_leaves(sparse, again)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True)
    )
    again.detach()
    base = kit.snapshot(kit.make())
    assert all(torch.equal(t, base[n]) for n, t in kit.snapshot(fresh).items())


@pytest.mark.parametrize("kept", ["both", "emb.weight", "head.weight", "neither"])
def test_stochastically_rounded_weights_load_as_saved(kept, ids, kit):
    """Tied ones under each of their names, under the one that save_pretrained leaves, and from a
    compact state dict, where no weight is but the rounded entries are.
    """

    def build():
        model = kit.make().bfloat16()
        sparse = attach(model, kit.masks(model), compact_state_dict=kept == "neither")
        return model, sparse, SparseAdamW(sparse.parameters(), lr=1e-2, stochastic_rounding=True)

    def train(model, optimizer):
        for _ in range(4):
            optimizer.zero_grad()
            kit.loss(model, ids).backward()
            optimizer.step()

    model, sparse, optimizer = build()
    train(model, optimizer)
    assert not kit.agrees(sparse)
    state = copy.deepcopy(model.state_dict())
    assert any(key.endswith("_rounded") for key in state) == (kept == "neither")
    if kept in ("emb.weight", "head.weight"):
        del state[{"emb.weight": "head.weight", "head.weight": "emb.weight"}[kept]]
    fresh, again, second = build()
    fresh.load_state_dict(state, strict=kept == "both")
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = kit.snapshot(model)
    assert all(torch.equal(t, before[n]) for n, t in kit.snapshot(fresh).items())
    train(model, optimizer)
    train(fresh, second)
    after = kit.snapshot(model)
    assert all(torch.equal(t, after[n]) for n, t in kit.snapshot(fresh).items())
    assert equal_leaves(sparse, again)


def test_the_plain_base_is_no_rounding_of_a_small_diff(kit):
    """In bf16 the base neighbours base + leaf: loading it still leaves the sum, also when tied."""
    model = kit.make().bfloat16()
    sparse = attach(model, {"emb.weight": kit.masks(model)["emb.weight"]})
    base = copy.deepcopy(kit.make().bfloat16().state_dict())
    masked = sparse._masked["emb.weight"]
    with torch.no_grad():
        sparse.leaves["emb.weight"].copy_(masked.base.float() * 0.75 * 2**-8)
    sparse.sync_()
    summed = masked.weight.detach().clone()
    assert not torch.equal(summed, base["emb.weight"])
    model.load_state_dict(base, strict=False)
    assert torch.equal(masked.weight, summed)


def test_compact_checkpoint_holds_leaves_and_full_parameters(ids, kit):
    model = kit.make()
    masks = {n: m for n, m in kit.masks(model).items() if "norm" not in n}
    model.register_buffer("seen", torch.zeros(3))
    sparse = attach(model, masks, full_params=["norm.*"], compact_state_dict=True)
    with torch.no_grad():
        for leaf in sparse.parameters():
            leaf.normal_()
    sparse.sync_()
    state = model.state_dict()
    kept = {n for n in state if not n.endswith("_base")}
    assert kept == {leaf_attribute(n) for n in masks} | {"norm.weight", "norm.bias", "seen"}
    size = sum(t.numel() * t.element_size() for t in state.values())
    assert size <= sparse.nnz * 4 + 32 * len(masks) + 200

    fresh = kit.make()
    fresh.register_buffer("seen", torch.zeros(3))
    again = attach(fresh, masks, full_params=["norm.*"], compact_state_dict=True)
    missing = fresh.load_state_dict(state, strict=False)
    assert missing.unexpected_keys == []
    assert equal_leaves(sparse, again)
    assert kit.agrees(again)
    assert torch.equal(model.norm.weight, fresh.norm.weight)
    again.detach()
    assert "up.weight" in fresh.state_dict()
    assert not any(n.endswith("_base") for n in fresh.state_dict())


@pytest.mark.parametrize("other", ["base", "mask"])
def test_compact_checkpoint_of_another_base_or_mask_is_refused(other, ids, kit):
    model = kit.make()
    masks = {"up.weight": kit.masks(model)["up.weight"]}
    attach(model, masks, compact_state_dict=True)
    state = model.state_dict()
    fresh = kit.make()
    if other == "base":
        with torch.no_grad():
            fresh.up.weight[masks["up.weight"]] += 1e-3
    else:
        masks = {"up.weight": masks["up.weight"].flip(0)}
    attach(fresh, masks, compact_state_dict=True)
    with pytest.raises(BaseMismatchError, match=r"another mask or base of 'up.weight'.*digest"):
        fresh.load_state_dict(state, strict=False)


def test_checkpoint_of_another_base_is_refused(ids, kit):
    model = kit.make()
    trained(model, ids, kit)
    fresh = kit.make()
    with torch.no_grad():
        fresh.down.weight.add_(0.25)
    attach(fresh, kit.masks(fresh))
    with pytest.raises(BaseMismatchError, match=r"'down.weight' is not this base plus its diff"):
        fresh.load_state_dict(model.state_dict())


def test_a_checkpoint_of_other_masks_names_both_causes(ids, kit):
    model = kit.make()
    trained(model, ids, kit)
    fresh = kit.make()
    attach(fresh, kit.masks(fresh, seed=1, density=0.3))
    state = {n: t for n, t in model.state_dict().items() if "diff_" not in n}
    with pytest.raises(BaseMismatchError, match="made with other masks or another base"):
        fresh.load_state_dict(state, strict=False)


def test_loading_the_plain_base_keeps_the_diff(ids, kit):
    model = kit.make()
    sparse, _ = trained(model, ids, kit)
    before = kit.snapshot(model)
    missing = model.load_state_dict(kit.make().state_dict(), strict=False)
    assert all("diff_" in n for n in missing.missing_keys)
    assert all(torch.equal(t, before[n]) for n, t in kit.snapshot(model).items())
    assert kit.agrees(sparse)


def test_assign_does_not_replace_the_driven_weight(ids, kit):
    model = kit.make()
    sparse, _ = trained(model, ids, kit)
    weight, leaf = model.up._parameters["weight"], sparse.leaves["up.weight"]
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert model.up._parameters["weight"] is weight
    assert model.up.diff_weight is leaf


def check_independent(model, sparse, clone, again, ids, kit):
    assert again is not sparse
    assert again.model is clone
    assert equal_leaves(sparse, again)
    before = kit.snapshot(model)
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    kit.loss(clone, ids).backward()
    optimizer.step()
    assert kit.agrees(again)
    assert not torch.equal(clone.up._parameters["weight"], before["up.weight"])
    assert all(torch.equal(t, before[n]) for n, t in kit.snapshot(model).items())
    assert clone.emb._parameters["weight"] is clone.head._parameters["weight"]
    base = kit.snapshot(kit.make())
    again.detach()
    assert type(clone.up) is nn.Linear
    assert all(torch.equal(t, base[n]) for n, t in kit.snapshot(clone).items())
    assert kit.agrees(sparse)


def test_deepcopy_drives_the_copy(ids, kit):
    model = kit.make()
    sparse, _ = trained(model, ids, kit)
    clone = copy.deepcopy(model)
    check_independent(model, sparse, clone, attachments_of(clone)[-1], ids, kit)


def test_deepcopy_through_the_handle(ids, kit):
    model = kit.make()
    sparse, _ = trained(model, ids, kit)
    again = copy.deepcopy(sparse)
    check_independent(model, sparse, again.model, again, ids, kit)


def test_a_copied_part_is_driven_by_its_own_leaf(ids, kit):
    model = kit.make()
    sparse, _ = trained(model, ids, kit)
    part = copy.deepcopy(model.up)
    optimizer = torch.optim.SGD([part.diff_weight], lr=0.1)
    before = sparse.leaves["up.weight"].detach().clone()
    part(torch.randn(4, 8)).pow(2).sum().backward()
    optimizer.step()
    assert torch.equal(sparse.leaves["up.weight"], before)
    assert not torch.equal(part._parameters["weight"], model.up._parameters["weight"])


@pytest.mark.parametrize("how", ["pickle", "torch_save"])
def test_whole_models_pickle(how, ids, kit):
    model = kit.make()
    # Only importable classes pickle; the fixture's model is not one.
    model = nn.Sequential(model.emb, model.up, model.act, model.down)
    sparse = attach(model, kit.masks(model), full_params=[])
    with torch.no_grad():
        sparse.leaves["1.weight"].normal_()
    sparse.sync_()
    if how == "pickle":
        clone = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        clone = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    (again,) = attachments_of(clone)
    assert equal_leaves(sparse, again)
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    clone(ids).pow(2).sum().backward()
    optimizer.step()
    assert kit.agrees(again)
    again.detach()
    assert type(clone[1]) is nn.Linear


def test_deepcopy_keeps_what_lies_beneath(kit):
    model = kit.make()
    bottom = model.up.weight.detach().clone()
    push(model.up.weight, Holder("Composer(sw)", None, bottom.clone(), ("cd" * 16,)))
    with torch.no_grad():
        model.up.weight.add_(1.0)
    attach(model, {"up.weight": kit.masks(model)["up.weight"]})
    clone = copy.deepcopy(model)
    assert torch.equal(bottom_value(clone.up._parameters["weight"]), bottom)
    assert attachments_of(clone)[-1].adapter().metadata.parents == ("cd" * 16,)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to"])
def test_casts_leave_the_leaf_and_round_the_base(cast, ids, kit):
    """W = rn(base + leaf) in the new dtype; restoring gives what casting the plain base gives."""

    def convert(m):
        return m.to(torch.bfloat16) if cast == "to" else getattr(m, cast)()

    model = kit.make()
    sparse, _ = trained(model, ids, kit)
    values = {n: leaf.detach().clone() for n, leaf in sparse.leaves.items()}
    convert(model)
    plain = convert(kit.make())
    for name, leaf in sparse.leaves.items():
        assert leaf.dtype == torch.float32
        assert torch.equal(leaf, values[name])
        assert sparse._masked[name].weight.dtype == next(plain.parameters()).dtype
        assert sparse._masked[name].base.dtype == next(plain.parameters()).dtype
    assert kit.agrees(sparse)
    optimizer = SparseAdamW(sparse.parameters(), lr=1e-2)
    kit.loss(model, ids).backward()
    optimizer.step()
    assert kit.agrees(sparse)
    convert(plain).float()
    model.float()
    sparse.detach()
    base = kit.snapshot(plain)
    assert all(torch.equal(t, base[n]) for n, t in kit.snapshot(model).items())


def test_cast_of_a_tied_alias_alone(kit):
    model = kit.make()
    sparse = attach(model, {"emb.weight": kit.masks(model)["emb.weight"]})
    model.head.half()
    assert kit.agrees(sparse)
    assert sparse._masked["emb.weight"].base.dtype == torch.float16


def test_gradients_survive_a_cast(ids, kit):
    model = kit.make()
    sparse = attach(model, kit.masks(model))
    kit.loss(model, ids).backward()
    grads = {n: leaf.grad.clone() for n, leaf in sparse.leaves.items()}
    model.bfloat16()
    assert all(torch.equal(leaf.grad, grads[n]) for n, leaf in sparse.leaves.items())


def test_wrapped_models_have_bare_names(kit, ids):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, ids):
            return self.module(ids)

    model = Wrapper(kit.make())
    masks = kit.masks(kit.make())
    sparse = attach(model, masks)
    assert sparse.names == list(masks)
    assert sparse.adapter().names == sorted(masks)


def test_adapter_round_trip_through_attach(ids, kit, tmp_path):
    model = kit.make()
    masks = {n: m for n, m in kit.masks(model).items() if "norm" not in n}
    sparse = attach(model, masks, full_params=["norm.*"])
    optimizer = SparseAdamW(sparse.parameters(), lr=1e-2)
    kit.loss(model, ids).backward()
    optimizer.step()
    adapter = sparse.adapter("sw", base_name="tiny", method="random", seed=3, extra={"steps": 1})
    assert adapter.metadata.base_name == "tiny"
    assert adapter.metadata.seed == 3
    adapter.save(tmp_path)
    sparse.sync_()  # the adapter is a copy: training on does not change it
    kept = {n: d.values.clone() for n, d in adapter.diffs.items()}
    with torch.no_grad():
        sparse.leaves["up.weight"].add_(1)
    assert torch.equal(adapter["up.weight"].values, kept["up.weight"])

    fresh = kit.make()
    again = attach(fresh, Adapter.load(tmp_path))
    assert set(again.full_params) == {"norm.weight", "norm.bias"}
    assert again.adapter("sw").digest == adapter.digest
    assert kit.agrees(again)
    again.load_adapter_(adapter)
    assert again.adapter().digest == adapter.digest
    again.detach()
    base = kit.snapshot(kit.make())
    assert all(torch.equal(t, base[n]) for n, t in kit.snapshot(fresh).items())


def test_load_adapter_takes_parts_and_refuses_strangers(ids, kit):
    model = kit.make()
    sparse, _ = trained(model, ids, kit)
    adapter = sparse.adapter()
    part = Adapter({"up.weight": adapter["up.weight"]})
    sparse.load_adapter_(part)
    assert torch.equal(sparse.leaves["up.weight"], adapter["up.weight"].values)
    assert not sparse.leaves["down.weight"].any()
    sparse.detach()
    inverse = attach(model, {"up.weight": ~kit.masks(model)["up.weight"]})
    with pytest.raises(MaskError, match=r"up.weight.*outside the mask"):
        inverse.load_adapter_(part)
    with pytest.raises(UnknownNameError, match=r"not masked here"):
        inverse.load_adapter_(Adapter({"down.weight": adapter["down.weight"]}))
    assert not inverse.leaves["up.weight"].any()


def test_set_mode_adapter_starts_at_its_values(kit):
    from sparseft import SparseDiff

    model = kit.make()
    mask = kit.masks(model)["up.weight"]
    wanted = torch.randn(24, 8)
    diff = SparseDiff.from_dense(wanted, mask, mode="set")
    attach(model, Adapter({"up.weight": diff}))
    now = model.up._parameters["weight"]
    assert torch.allclose(now[mask], wanted[mask], rtol=1e-6, atol=1e-7)


def test_attaching_an_adapter_to_another_base_is_refused(ids, kit):
    sparse, _ = trained(kit.make(), ids, kit)
    other = kit.make()
    with torch.no_grad():
        other.up.weight.add_(1.0)
    flags = [p.requires_grad for p in other.parameters()]
    with pytest.raises(BaseMismatchError, match=r"up.weight"):
        attach(other, sparse.adapter())
    assert [p.requires_grad for p in other.parameters()] == flags
    assert type(other.up) is nn.Linear


def test_requires_grad_flags_come_back(kit):
    model = kit.make()
    model.norm.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with attach(model, {"up.weight": kit.masks(model)["up.weight"]}, full_params=["head.bias"]):
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trainable == ["up.diff_weight", "head.bias"]
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_report_and_norm(ids, kit):
    model = kit.make()
    sparse, _ = trained(model, ids, kit)
    rows = {row.name: row for row in sparse.report()}
    assert list(rows) == sparse.names
    assert sum(r.nnz for r in rows.values()) == sparse.nnz
    row = rows["up.weight"]
    leaf = sparse.leaves["up.weight"].detach()
    assert row.shape == (24, 8)
    assert row.changed == int((leaf != 0).sum())
    assert row.max_abs == float(leaf.abs().max())
    total = sparse.l1_norm()
    assert float(total.detach()) == pytest.approx(sum(r.l1 for r in rows.values()), rel=1e-5)
    sparse.leaves["up.weight"].grad = None
    total.backward()
    assert torch.equal(sparse.leaves["up.weight"].grad, leaf.sign())


def test_a_detached_handle_says_so(kit):
    model = kit.make()
    sparse = attach(model, kit.masks(model))
    assert sparse.detach() is model
    sparse.detach()
    for use in (sparse.sync_, sparse.adapter):
        with pytest.raises(AttachError, match="were detached"):
            use()
