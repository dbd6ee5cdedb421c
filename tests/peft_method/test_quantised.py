"""Quantised bases: trained beside, never merged into; merged into a dense copy instead."""

from __future__ import annotations

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'peft>=0.18,<0.22'")

from sparseft.errors import CompositionError, UnknownNameError  # noqa: E402
from sparseft.modules.dequantise import dequantise  # noqa: E402
from sparseft.peft import SparseFtConfig, adapter_of, merged_state_dict  # noqa: E402


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def bnb(make):
    def swap(net):
        for name, layer in list(net.named_children()):
            other = make(layer.in_features, layer.out_features, bias=layer.bias is not None)
            other.load_state_dict(layer.state_dict())
            setattr(net, name, other.to("cpu"))
        return net

    return swap


def nf4(net):
    bits = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    return bnb(lambda i, o, bias: bits.nn.Linear4bit(i, o, bias, torch.float32, quant_type="nf4"))(
        net
    )


def int8(net):
    bits = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    return bnb(lambda i, o, bias: bits.nn.Linear8bitLt(i, o, bias, has_fp16_weights=False))(net)


def ao8(net):
    quantisation = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    quantisation.quantize_(net, quantisation.Int8WeightOnlyConfig())
    return net


@pytest.fixture(params=[nf4, int8, ao8], ids=["bnb-nf4", "bnb-int8", "torchao-int8"])
def net(request):
    torch.manual_seed(0)
    made = Net().requires_grad_(False)
    return request.param(made)


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("selection", ["random", "weight_magnitude"])
def test_trained_beside_saved_and_loaded(net, tools, tmp_path, selection):
    before = net(X)
    config = SparseFtConfig(target_modules=["first", "second"], density=0.1, selection=selection)
    model = peft.get_peft_model(net, config)
    torch.testing.assert_close(model(X), before, rtol=0, atol=0)
    assert adapter_of(model).nnz == round(0.1 * 2 * 64 * 64)
    tools.scramble(model)
    model(X).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    wanted = model(X)
    assert not torch.allclose(wanted, before)
    model.save_pretrained(tmp_path)
    # In training mode like the first: in eval mode bitsandbytes computes in another way.
    loaded = peft.PeftModel.from_pretrained(model.unload(), tmp_path).train()
    assert torch.equal(loaded(X), wanted)
    with loaded.disable_adapter():
        assert torch.equal(loaded(X), before)


def test_evaluation_between_steps_leaves_it_trainable():
    made = nf4(Net().requires_grad_(False))
    for layer in (made.first, made.second):
        layer.support_avx512bf16_for_cpu |= layer is made.first  # whatever this CPU is
    before = [layer.support_avx512bf16_for_cpu for layer in (made.first, made.second)]
    model = peft.get_peft_model(made, SparseFtConfig(target_modules=["first"], nnz=50))
    (values,) = (p for p in model.parameters() if p.requires_grad)
    found = []
    for _ in range(2):
        values.grad = None
        model.train()(X).square().sum().backward()
        found.append(values.grad)
        with torch.no_grad():  # bitsandbytes repacks layers here, and has no backward then
            model.eval()(X)
    assert found[0].any()
    assert torch.equal(*found)
    base = model.unload()
    assert [layer.support_avx512bf16_for_cpu for layer in (base.first, base.second)] == before


def test_loaded_for_inference_it_may_be_repacked_until_it_trains(tmp_path):
    def flags(model):
        return [m.support_avx512bf16_for_cpu for m in model.modules() if hasattr(m, "quant_state")]

    config = SparseFtConfig(target_modules=["first"], nnz=50)
    peft.get_peft_model(Net(), config).save_pretrained(tmp_path)
    made = nf4(Net().requires_grad_(False))
    for layer in (made.first, made.second):
        layer.support_avx512bf16_for_cpu = True
    model = peft.PeftModel.from_pretrained(made, tmp_path)
    assert flags(model) == [True, True]
    model.set_adapter("default")
    assert flags(model) == [False, False]
    assert flags(model.unload()) == [True, True]


def test_nothing_is_merged_into_quantised_storage_and_nothing_changes(net, tools):
    model = peft.get_peft_model(net, SparseFtConfig(target_modules=["first", "second"], nnz=99))
    tools.scramble(model)
    wanted = model(X)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(CompositionError, match=r"first.weight is quantised.*merged_state_dict"):
            merge()
    assert torch.equal(model(X), wanted)


def test_merged_into_a_dense_copy(net, tools):
    config = SparseFtConfig(target_modules=["first"], nnz=99, modules_to_save=None)
    model = peft.get_peft_model(net, config)
    tools.scramble(model)
    dense = {n: dequantise(getattr(net, n).get_base_layer() if n == "first" else getattr(net, n))
             for n in ("first", "second")}  # fmt: skip
    state = merged_state_dict(model, dtype=torch.float32)
    diff = adapter_of(model)["first.weight"].to_dense()
    assert torch.equal(state["first.weight"], dense["first"].float() + diff)
    plain = Net()
    plain.load_state_dict(state)
    # The library's own product with the quantised weight rounds; the sum is the same function.
    torch.testing.assert_close(plain(X), model(X).float(), rtol=0.05, atol=0.05)
    assert merged_state_dict(model)["second.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["float64", "transposed"])
def test_dense_copies_of_odd_weights(kind, tools):
    made = Net()
    if kind == "float64":
        made.double().first.weight.data.add_(1e-11)  # no fp32 value has these bits
    else:
        made.first.weight.data = made.first.weight.data.t().contiguous().t()
    dtype = made.first.weight.dtype
    model = peft.get_peft_model(made, SparseFtConfig(target_modules=["first"], nnz=99))
    tools.scramble(model)
    state = merged_state_dict(model, dtype=dtype)
    for name, tensor in model.merge_and_unload().state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_a_dense_copy_of_an_unknown_adapter_is_refused():
    model = peft.get_peft_model(Net(), SparseFtConfig(target_modules=["first"], nnz=99))
    with pytest.raises(UnknownNameError, match=r"no adapter 'defalt'. Did you mean 'default'\?"):
        merged_state_dict(model, ["defalt"])


def test_a_dense_model_merged_that_way_is_merge_and_unload(tools):
    made = tools.tiny("bert")
    config = SparseFtConfig(target_modules=["query"], nnz=99, task_type="SEQ_CLS", biases=True)
    model = peft.get_peft_model(made.model, config)
    tools.scramble(model)
    state = merged_state_dict(model, dtype=torch.float32)
    stock = model.merge_and_unload().state_dict()
    assert state.keys() == stock.keys()
    for name, tensor in stock.items():
        assert torch.equal(state[name], tensor), name
