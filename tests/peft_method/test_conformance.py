"""What PEFT expects of every method, over encoder, Conv1D, decoder and encoder-decoder."""

from __future__ import annotations

import copy
import json

import pytest
import torch

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'peft>=0.18,<0.22'")

from sparseft.peft import SparseFtConfig, SparseFtLayer  # noqa: E402

KINDS = ["bert", "gpt2", "llama", "t5"]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


@pytest.fixture(params=KINDS)
def case(request, tools):
    torch.manual_seed(0)
    made = tools.tiny(request.param)
    config = SparseFtConfig(target_modules=made.targets, density=0.1, biases=True)
    model = peft.get_peft_model(made.model, config)
    return made, model


def test_an_untrained_adapter_changes_nothing(case, tools):
    made, model = case
    plain = tools.tiny(next(k for k in KINDS if k in type(made.model).__name__.lower()))
    assert torch.equal(tools.logits(model, made.batch), tools.logits(plain.model, made.batch))


def test_only_values_train_and_they_are_counted(case):
    _, model = case
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("sparseft_values.default" in n or "sparseft_bias_values.default" in n
               for n in trainable)  # fmt: skip
    assert all(p.dtype == torch.float32 and p.ndim == 1 for p in trainable.values())
    layers = [m for m in model.modules() if isinstance(m, SparseFtLayer)]
    stock = [getattr(m.stock, attr, None) for m in layers for attr in ("weight", "bias")]
    numel = sum(t.numel() for t in stock if t is not None)
    got, every = model.get_nb_trainable_parameters()
    # Exactly the density of the targets, and PEFT's count of all is the base's plus those.
    assert got == round(0.1 * numel)
    base = sum(p.numel() for n, p in model.named_parameters() if "sparseft_" not in n)
    assert every == base + got


def test_gradients_reach_every_value_and_no_weight(case):
    made, model = case
    model.train()
    model(**made.batch).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "wpe" not in name and "word_embeddings" not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0 or parameter.numel() < 8, name
        elif not parameter.requires_grad:
            assert parameter.grad is None, name


def test_disabled_is_the_base_bit_for_bit(case, tools):
    made, model = case
    with model.disable_adapter():
        before = tools.logits(model, made.batch)
    tools.scramble(model)
    after = tools.logits(model, made.batch)
    assert not torch.equal(after, before)
    with model.disable_adapter():
        assert torch.equal(tools.logits(model, made.batch), before)
    assert torch.equal(tools.logits(model, made.batch), after)


def test_merged_equals_unmerged_and_comes_off_exactly(case, tools):
    made, model = case
    tools.scramble(model)
    separate, before = tools.logits(model, made.batch), state(model)
    model.merge_adapter()
    torch.testing.assert_close(tools.logits(model, made.batch), separate, rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(t, before[n]) for n, t in model.state_dict().items())
    model.unmerge_adapter()
    assert_same(state(model), before)
    assert torch.equal(tools.logits(model, made.batch), separate)


def test_merge_and_unload_gives_a_stock_model(case, tools):
    made, model = case
    tools.scramble(model)
    separate = tools.logits(model, made.batch)
    kind = type(made.model)
    stock = model.merge_and_unload(safe_merge=True)
    assert type(stock) is kind
    assert not any("sparseft" in n or "base_layer" in n for n in stock.state_dict())
    torch.testing.assert_close(tools.logits(stock, made.batch), separate, rtol=1e-5, atol=1e-5)


def test_unload_gives_back_the_base_also_from_merged(case, tools):
    made, model = case
    tools.scramble(model)
    with model.disable_adapter():
        before = tools.logits(model, made.batch)
    model.merge_adapter()
    assert torch.equal(tools.logits(model.unload(), made.batch), before)


@pytest.mark.parametrize("low", [False, True], ids=["copied", "assigned"])
def test_saved_and_loaded_equals(case, tools, tmp_path, low):
    made, model = case
    tools.scramble(model)
    wanted = tools.logits(model, made.batch)
    base = copy.deepcopy(made.model)
    base = copy.deepcopy(model).unload()
    model.save_pretrained(tmp_path / "one")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "one", low_cpu_mem_usage=low).eval()
    assert torch.equal(tools.logits(loaded, made.batch), wanted)
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded.save_pretrained(tmp_path / "two")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    size = (tmp_path / "one" / "adapter_model.safetensors").stat().st_size
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    nnz = sum(fact["nnz"] for fact in config["entries"].values())
    # 8 bytes an entry; the rest is the header of safetensors.
    assert size - 8 * nnz < 200 * 2 * len(config["entries"])


def test_the_state_dict_of_an_adapter_goes_out_and_in(case, tools):
    made, model = case
    tools.scramble(model)
    own = {n: t.clone() for n, t in peft.get_peft_model_state_dict(model).items()}
    assert {n.rpartition(".")[2] for n in own} <= {
        "sparseft_values", "sparseft_indices", "sparseft_bias_values", "sparseft_bias_indices",
    }  # fmt: skip
    wanted = tools.logits(model, made.batch)
    tools.scramble(model, seed=5)
    assert not torch.equal(tools.logits(model, made.batch), wanted)
    peft.set_peft_model_state_dict(model, own)
    assert torch.equal(tools.logits(model, made.batch), wanted)


def test_rows_of_a_mixed_batch(case, tools):
    made, model = case
    tools.scramble(model.eval())
    own = tools.logits(model, made.batch)
    with model.disable_adapter():
        base = tools.logits(model, made.batch)
    mixed = tools.logits(model, made.batch, adapter_names=["default", "__base__", "default"])
    for row, wanted in enumerate((own, base, own)):
        torch.testing.assert_close(mixed[row], wanted[row], rtol=1e-5, atol=1e-6)


def test_pefts_own_report_of_layers(case):
    _, model = case
    status = model.get_model_status()
    layers = sum(isinstance(m, SparseFtLayer) for m in model.modules())
    assert status.num_adapter_layers == layers
    assert (status.enabled, status.active_adapters) == (True, ["default"])
    assert (status.merged_adapters, status.available_adapters) == ([], ["default"])
    assert status.requires_grad == {"default": True}
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    assert all("default" in layer.available_adapters for layer in model.get_layer_status())
