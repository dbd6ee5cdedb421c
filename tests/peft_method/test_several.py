"""Several adapters in one model: sums, rows of a batch with their own, weighted by our rules."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'peft>=0.18,<0.22'")

import sparseft  # noqa: E402
from sparseft.errors import (  # noqa: E402
    CompositionError,
    OptionError,
    UnknownNameError,
)
from sparseft.peft import SparseFtConfig, SparseFtLayer, adapter_of  # noqa: E402


@pytest.fixture
def pair(tools):
    """A Llama with adapters "a" (attention) and "b" (all linear layers), both with values."""
    made = tools.tiny("llama")
    config = SparseFtConfig(target_modules=["q_proj", "v_proj"], density=0.3)
    model = peft.get_peft_model(made.model, config, adapter_name="a")
    tools.scramble(model, 1)
    model.add_adapter("b", SparseFtConfig(target_modules="all-linear", density=0.2, seed=4))
    model.set_adapter("b")
    tools.scramble(model, 2)
    model.set_adapter("a")
    return model.eval(), made.batch


def outputs(model, batch, tools):
    found = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        found[name] = tools.logits(model, batch)
    with model.disable_adapter():
        found["base"] = tools.logits(model, batch)
    return found


def through_attach(model, tools, *names):
    """The same sum of adapters written into a plain model by sparseft itself."""
    plain = tools.tiny("llama").model
    composer = sparseft.Composer(plain, {n: adapter_of(model, n) for n in names})
    composer.apply(dict.fromkeys(names, 1.0))
    return plain


def test_the_active_one_alone_counts(pair, tools):
    model, batch = pair
    found = outputs(model, batch, tools)
    for name in ("a", "b"):
        wanted = tools.logits(through_attach(model, tools, name), batch)
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found["a"], found["b"], atol=1e-3)


def test_only_the_active_one_trains(pair):
    model, batch = pair
    model.set_adapter("b")
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"b"}
    model.base_model.set_adapter(["a", "b"])
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {
        "a", "b",
    }  # fmt: skip
    model.train()
    model(**batch).logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_two_active_at_once_add_up_in_any_order(pair, tools):
    model, batch = pair
    model.base_model.set_adapter(["a", "b"])
    together = tools.logits(model, batch)
    wanted = tools.logits(through_attach(model, tools, "a", "b"), batch)
    torch.testing.assert_close(together, wanted, rtol=1e-5, atol=1e-5)
    model.base_model.set_adapter(["b", "a"])
    assert torch.equal(tools.logits(model, batch), together)


def test_merging_two_is_one_rounding_in_any_order_and_comes_off(pair, tools):
    model, _ = pair
    model.to(torch.bfloat16)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    merged = []
    for steps in ([["a", "b"]], [["b"], ["a"]], [["a"], ["b"]]):
        for names in steps:
            model.merge_adapter(adapter_names=names)
        merged.append({n: t.clone() for n, t in model.state_dict().items()})
        model.unmerge_adapter()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
    for other in merged[1:]:
        assert all(torch.equal(t, merged[0][n]) for n, t in other.items())
    assert any(not torch.equal(t, before[n]) for n, t in merged[0].items())


def test_deleting_leaves_the_others(pair, tools):
    model, batch = pair
    found = outputs(model, batch, tools)
    model.set_adapter("a")
    model.delete_adapter("b")
    assert not any(n.endswith(".b") for n in model.state_dict())
    assert torch.equal(tools.logits(model, batch), found["a"])
    with model.disable_adapter():
        assert torch.equal(tools.logits(model, batch), found["base"])


def test_a_folder_each_and_loaded_under_other_names(pair, tools, tmp_path):
    model, batch = pair
    found = outputs(model, batch, tools)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(
        tools.tiny("llama").model, tmp_path, subfolder="a", adapter_name="one"
    )
    loaded.load_adapter(tmp_path / "b", "two", ephemeral_gpu_offload=False)
    for name, of in (("one", "a"), ("two", "b")):
        loaded.set_adapter(name)
        assert torch.equal(tools.logits(loaded, batch), found[of])


def test_rows_of_a_batch_have_their_own(pair, tools):
    model, batch = pair
    found = outputs(model, batch, tools)
    for names in (["a", "__base__", "b"], ["b", "b", "a"], ["__base__"] * 3):
        mixed = tools.logits(model, batch, adapter_names=names)
        for row, name in enumerate(names):
            wanted = found["base" if name == "__base__" else name][row]
            torch.testing.assert_close(mixed[row], wanted, rtol=1e-5, atol=1e-6)
    # Nothing stays behind.
    model.set_adapter("a")
    assert torch.equal(tools.logits(model, batch), found["a"])


def test_rows_with_beams(pair):
    model, batch = pair
    options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    ids = batch["input_ids"]
    mixed = model.generate(input_ids=ids, adapter_names=["a", "b", "__base__"], **options)
    for row, name in enumerate(["a", "b"]):
        model.set_adapter(name)
        alone = model.generate(input_ids=ids[row : row + 1], **options)
        assert torch.equal(mixed[row, : alone.shape[1]], alone[0])


def test_rows_are_refused_where_they_would_be_wrong(pair):
    model, batch = pair
    with pytest.raises(UnknownNameError, match="no adapter 'c'"):
        model(**batch, adapter_names=["a", "c", "b"])
    model.train()
    with pytest.raises(CompositionError, match="training mode"):
        model(**batch, adapter_names=["a", "a", "b"])
    model.eval()
    with pytest.raises(CompositionError, match="2 names and the batch 3 rows"):
        model(**batch, adapter_names=["a", "b"])
    model.merge_adapter()
    with pytest.raises(CompositionError, match="unmerge_adapter"):
        model(**batch, adapter_names=["a", "a", "b"])
    model.unmerge_adapter()
    # No hook of a forward that failed is left.
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, SparseFtLayer))


@pytest.mark.parametrize(
    ("rule", "options"), [("linear", {}), ("ties", {"density": 0.5}), ("magnitude_max", {})]
)
def test_weighted_adapters_follow_sparsefts_rules(pair, tools, rule, options):
    model, batch = pair
    model.add_weighted_adapter(["a", "b"], [0.5, 1.5], "ab", combination_type=rule, **options)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith(".ab"))
    parts = {n: adapter_of(model, n) for n in ("a", "b")}
    wanted = sparseft.compose_adapters(parts, {"a": 0.5, "b": 1.5}, method=rule, **options)
    got = adapter_of(model, "ab")
    for name in wanted:
        if wanted[name].nnz:
            assert got[name].equals(wanted[name]), name
    model.set_adapter("ab")
    plain = tools.tiny("llama").model
    sparseft.Composer(plain, {"x": wanted}).apply(["x"])
    torch.testing.assert_close(
        tools.logits(model, batch), tools.logits(plain, batch), rtol=1e-5, atol=1e-5
    )


def test_weighted_adapters_that_cannot_be(pair):
    model, _ = pair
    with pytest.raises(OptionError, match="2 adapters and 1 weights"):
        model.add_weighted_adapter(["a", "b"], [1.0], "c")
    with pytest.raises(OptionError, match="'b' exists already"):
        model.add_weighted_adapter(["a"], [1.0], "b")
    with pytest.raises(UnknownNameError, match="no adapter 'z'"):
        model.add_weighted_adapter(["a", "z"], [1.0, 1.0], "c")
    with pytest.raises(UnknownNameError, match="tie.*Did you mean"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", combination_type="tie")
    assert set(model.peft_config) == {"a", "b"}


def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing(pair):
    model, _ = pair
    layers = [m for m in model.modules() if isinstance(m, SparseFtLayer)]
    with torch.no_grad():
        layers[0].sparseft_values["a"][2] = float("nan")
    before = {n: t.clone() for n, t in layers[0].state_dict().items()}
    with pytest.raises(CompositionError, match="q_proj.weight merged with a is not finite"):
        model.merge_adapter(safe_merge=True)
    for name, tensor in layers[0].state_dict().items():
        assert torch.equal(tensor, before[name]) or name == "sparseft_values.a"
    assert not layers[0].merged


def test_unmerging_twice_and_merging_twice_warn(pair):
    model, _ = pair
    model.merge_adapter()
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    layer = next(m for m in model.modules() if isinstance(m, SparseFtLayer))
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_disabling_a_merged_model_gives_the_base(pair, tools):
    model, batch = pair
    base = outputs(model, batch, tools)["base"]
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(tools.logits(model, batch), base)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_a_model_of_its_own(pair, tools, how):
    model, batch = pair
    wanted = tools.logits(model, batch)  # and caches are filled
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(tools.logits(twin, batch), wanted)
    tools.scramble(twin, 9)
    assert not torch.equal(tools.logits(twin, batch), wanted)
    assert torch.equal(tools.logits(model, batch), wanted)


def test_files_are_checked_before_anything_uses_them(tools, tmp_path):
    from safetensors.torch import load_file, save_file

    made = tools.tiny("bert")
    model = peft.get_peft_model(made.model, SparseFtConfig(target_modules=["query"], density=0.2))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    held = load_file(file)
    key = next(n for n in held if n.endswith("indices"))
    for fault, said in (
        (held[key].flip(0), "must ascend"),
        (held[key] + 10_000, "in range"),
        (torch.full_like(held[key], -1), "holds no positions"),
        (held[key].float(), "indices is torch.float32"),
    ):
        save_file({**held, key: fault}, file)
        with pytest.raises(sparseft.errors.AdapterFormatError, match=said):
            peft.PeftModel.from_pretrained(tools.tiny("bert").model, tmp_path)
    values = key.replace("indices", "values")
    save_file({**held, values: torch.full_like(held[values], torch.nan)}, file)
    with pytest.raises(sparseft.errors.AdapterFormatError, match="must be finite"):
        peft.PeftModel.from_pretrained(tools.tiny("bert").model, tmp_path)
    del held[values]
    save_file(held, file)
    with pytest.raises(sparseft.errors.AdapterFormatError, match="no sparseft_values: the file is"):
        peft.PeftModel.from_pretrained(tools.tiny("bert").model, tmp_path)


def test_a_name_with_a_dot_is_refused_and_changes_nothing(pair, tools):
    model, batch = pair[:2]
    wanted = tools.logits(model, batch)
    with pytest.raises(sparseft.errors.OptionError, match=r"'v1\.0' has a dot.*'v1_0'"):
        model.add_adapter("v1.0", SparseFtConfig(target_modules=["query"], nnz=5))
    assert "v1.0" not in model.peft_config
    assert torch.equal(tools.logits(model, batch), wanted)


def test_inference_mode_before_training(pair):
    model, batch = pair
    model.base_model.set_adapter(["a", "b"])
    with torch.inference_mode():
        model(**batch)
    model.train()
    model(**batch).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_heads_that_differ_are_not_added_up(tools):
    made = tools.tiny("bert")
    config = {"target_modules": ["query"], "density": 0.2, "task_type": "SEQ_CLS"}
    model = peft.get_peft_model(made.model, SparseFtConfig(**config), adapter_name="a")
    model.add_adapter("b", SparseFtConfig(**config))
    for name in ("a", "b"):
        model.set_adapter(name)
        tools.scramble(model, seed=ord(name))
    with pytest.raises(CompositionError, match="classifier"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "ab")
    assert set(model.peft_config) == {"a", "b"}
    model.add_weighted_adapter(["a"], [0.5], "a2")  # one head: it comes along
    head = adapter_of(model, "a2").dense["classifier.weight"]
    assert torch.equal(head, adapter_of(model, "a").dense["classifier.weight"])


def test_data_parallel_is_refused(pair):
    model, _ = pair
    layer = next(m for m in model.modules() if isinstance(m, SparseFtLayer))
    with pytest.raises(sparseft.errors.AttachError, match="DistributedDataParallel"):
        layer._replicate_for_data_parallel()
