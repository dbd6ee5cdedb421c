"""Quantised models as ``from_pretrained`` makes them: trained, resumed, exported, recognised."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import sparseft
from sparseft.errors import BaseMismatchError
from sparseft.modules.dequantise import dequantise, stored_tensors
from sparseft.training import SparseCallback

transformers = pytest.importorskip("transformers", reason="pip install transformers")

_spec = importlib.util.spec_from_file_location(
    "_quantised", Path(__file__).parent.parent / "_quantised.py"
)
q = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(q)

BNB, AO = q.needs("bitsandbytes"), q.needs("torchao")
kinds = pytest.mark.parametrize(
    "kind",
    [
        pytest.param("nf4", marks=BNB),
        pytest.param("int8", marks=BNB),
        pytest.param("torchao", marks=AO),
    ],
)


def config_of(kind):
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models of random weights, saved: a Llama and a GPT-2 (Conv1D layers)."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    llama = transformers.LlamaConfig(
        **sizes, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    gpt2 = transformers.GPT2Config(
        **sizes, n_embd=64, n_layer=1, n_head=2, n_positions=32,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    made = {}
    for name, config in (("llama", llama), ("gpt2", gpt2)):
        made[name] = tmp_path_factory.mktemp(name)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
    return made


def load(folder, kind=None):
    extra = {} if kind is None else {"quantization_config": config_of(kind)}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **extra)


IDS = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))


def train(model, sparse, steps=3):
    optimizer = sparseft.SparseAdamW(sparse.parameters(), lr=1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@kinds
def test_from_pretrained_to_a_plain_checkpoint(folders, kind, tmp_path, caplog):
    model = load(folders["llama"], kind)
    names = q.quantised_names(model)
    assert len(names) == 7  # every linear layer of the block; not the head
    before = {n: stored_tensors(model.get_submodule(n)) for n in names}
    before = {n: {k: t.clone() for k, t in found.items()} for n, found in before.items()}
    masks = sparseft.select(model, "low_rank", density=0.05, rank=4, exclude=["*norm*", "*embed*"])
    assert {n for n, m in masks.items() if m.nnz} >= {f"{n}.weight" for n in names[:1]}
    sparse = sparseft.attach(model, masks)
    losses = train(model, sparse)
    assert losses[-1] < losses[0]
    for n, found in before.items():
        after = stored_tensors(model.get_submodule(n))
        assert all(torch.equal(t, after[k]) for k, t in found.items())
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    adapter = sparse.adapter()
    adapter.save(tmp_path / "adapter")
    adapter = sparseft.Adapter.load(tmp_path / "adapter")

    again = load(folders["llama"], kind).train()
    with caplog.at_level(logging.WARNING, logger="sparseft"):
        sparseft.attach(again, adapter)
    assert not [r for r in caplog.records if r.name.startswith("sparseft")]  # exactly the same base
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, logits)

    sparse.save_merged(tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.dtype == torch.bfloat16
    assert not hasattr(plain.config, "quantization_config")
    merged = sparse.merged_state_dict()
    assert merged.keys() == load(folders["llama"]).state_dict().keys()
    assert all(torch.equal(t, merged[n]) for n, t in plain.state_dict().items())
    with torch.no_grad():
        near = plain.train()(input_ids=IDS).logits.float()
    assert (near - logits.float()).norm() < 0.05 * logits.float().norm()
    sparse.detach()

    # Applied to the unquantised original: accepted, and said.
    with caplog.at_level(logging.WARNING, logger="sparseft"):
        sparseft.attach(load(folders["llama"]), adapter)
    assert "agree within a quantisation step" in caplog.text


@kinds
def test_a_checkpoint_saved_quantised_is_the_same_base(folders, kind, tmp_path, caplog):
    model = load(folders["llama"], kind)
    masks = sparseft.select(model, "random", density=0.02, include=["*_proj.weight"])
    sparse = sparseft.attach(model, masks)
    train(model, sparse, steps=1)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    adapter = sparse.adapter()
    sparse.detach()
    model.save_pretrained(tmp_path)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING, logger="sparseft"):
        sparseft.attach(saved.train(), adapter)
    assert not [r for r in caplog.records if r.name.startswith("sparseft")]
    with torch.no_grad():
        assert torch.equal(saved(input_ids=IDS).logits, logits)


@BNB
def test_conv1d_layers_become_linear_and_are_turned_back(folders, tmp_path):
    model = load(folders["gpt2"], "nf4")
    name = "transformer.h.0.attn.c_attn.weight"
    assert model.get_submodule(name.removesuffix(".weight")).source_cls.__name__ == "Conv1D"
    masks = sparseft.select(model, "random", density=0.05, include=["*c_attn.weight", "*c_fc.*"])
    assert masks[name].shape == (192, 64)
    sparse = sparseft.attach(model, masks)
    train(model, sparse)
    sparse.save_merged(tmp_path)
    plain = load(tmp_path)
    assert plain.get_parameter(name).shape == (64, 192)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits.float()
        near = plain.train()(input_ids=IDS).logits.float()
    assert (near - logits).norm() < 0.05 * logits.norm()
    dense = dequantise(model.get_submodule(name.removesuffix(".weight")))
    assert not torch.equal(plain.get_parameter(name).t().float(), dense.bfloat16().float())
    with pytest.raises(BaseMismatchError, match="192, 64"):  # its diffs have the linear shape
        sparseft.attach(load(folders["gpt2"]), sparse.adapter())


class Bare(nn.Module):
    """As docs/guide/quantised.md has it, for Trainer."""

    _keys_to_ignore_on_save = None

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels=None):
        return self.model(input_ids=input_ids, labels=labels)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("nf4", marks=BNB),
        pytest.param("int8", marks=[BNB, pytest.mark.slow]),
        pytest.param("torchao", marks=AO),
    ],
)
def test_trainer_refuses_it_and_takes_it_in_a_bare_module(folders, kind, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    options = {
        "output_dir": str(tmp_path), "max_steps": 4, "save_steps": 2, "report_to": [],
        "per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True,
        "label_names": ["labels"], "learning_rate": 1e-2,
    }  # fmt: skip

    def run(resume=None):
        model = load(folders["llama"], kind)
        masks = sparseft.select(model, "random", density=0.05, include=["*_proj.weight"])
        sparse = sparseft.attach(model, masks, compact_state_dict=True)
        arguments = transformers.TrainingArguments(**options)
        trainer = transformers.Trainer(
            Bare(model), arguments, train_dataset=rows, callbacks=[SparseCallback(sparse)]
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, sparse

    model, sparse = run()
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model, transformers.TrainingArguments(**options), train_dataset=rows)
    leaves = {name: leaf.detach().clone() for name, leaf in sparse.leaves.items()}
    assert all(leaf.any() for leaf in leaves.values())
    _, resumed = run(resume=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(leaf, leaves[name]) for name, leaf in resumed.leaves.items())
    assert sparseft.Adapter.load(tmp_path / "checkpoint-4" / "adapter").nnz == sparse.nnz


@pytest.mark.slow
@BNB
def test_the_real_encoder_in_four_bits(real_data, tmp_path):
    folder = real_data / "multilingual-e5-small-trimmed"
    config = config_of("nf4")
    model = transformers.AutoModel.from_pretrained(
        folder, quantization_config=config, add_pooling_layer=False
    )
    names = q.quantised_names(model)
    assert len(names) >= 70
    masks = sparseft.select(
        model, "weight_magnitude", density=0.01, include=[f"{n}.weight" for n in names]
    )
    sparse = sparseft.attach(model, masks)
    optimizer = sparseft.SparseAdamW(sparse.parameters(), lr=1e-3)
    ids = torch.randint(5, 1000, (4, 32), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(4):
        hidden = model.train()(input_ids=ids).last_hidden_state
        loss = hidden.float().mean((0, 1)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    sparse.save_merged(tmp_path)
    plain = transformers.AutoModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids).last_hidden_state.float()
        got = plain(input_ids=ids).last_hidden_state.float()
    assert (got - wanted).norm() < 0.05 * wanted.norm()
