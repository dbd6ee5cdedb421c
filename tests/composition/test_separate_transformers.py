"""Separate mode on tiny transformers: rows of one batch against models with merged weights."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from sparseft import Composer, SeparateComposer
from sparseft.adapter import Adapter, AdapterMetadata
from sparseft.diff import SparseDiff, SparsePattern
from sparseft.errors import CompositionError
from sparseft.modules import ParameterIndex, fingerprint_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def _load(name: str):
    path = Path(__file__).resolve().parent.parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny_config = _load("_tiny").tiny_config


def make_model(kind: str):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=20,
            bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config).eval()
    if kind == "mlm":
        return transformers.AutoModelForMaskedLM.from_config(tiny_config()).eval()
    config = tiny_config(num_labels=3)
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def make_adapter(model, seed: int, density: float = 0.2) -> Adapter:
    """Entries in every parameter: Linear and Conv1D, embeddings, LayerNorm, biases."""
    generator = torch.Generator().manual_seed(seed)
    index = ParameterIndex(model)
    diffs = {}
    for name in index.names:
        mask = torch.rand(index.get(name).shape, generator=generator) < density
        values = 0.1 * torch.randn(int(mask.sum()), generator=generator)
        diffs[name] = SparseDiff.from_pattern(SparsePattern.from_mask(mask), values)
    return Adapter(
        diffs, name=f"a{seed}",
        metadata=AdapterMetadata(fingerprint=fingerprint_model(model, index.names)),
    )  # fmt: skip


def batch_of(kind: str):
    torch.manual_seed(1)
    ids = torch.randint(5, 45, (4, 7))
    mask = torch.ones_like(ids)
    if kind != "gpt2":
        ids[1, 5:], mask[1, 5:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


ROWS = [["sw", "nli"], "nli", None, {"sw": 0.5, "nli": -1.0}]


def merged(model, adapters, which):
    twin = copy.deepcopy(model)
    if which:
        Composer(twin, adapters).switch(which)
    return twin


@pytest.fixture(params=["gpt2", "mlm", "classifier"])
def case(request):
    model = make_model(request.param)
    adapters = {"sw": make_adapter(model, 0), "nli": make_adapter(model, 1)}
    return model, adapters, batch_of(request.param)


def test_rows_equal_merged_models(case):
    model, adapters, batch = case
    state = {n: p.clone() for n, p in model.named_parameters()}
    versions = [p._version for p in model.parameters()]
    with SeparateComposer(model, adapters) as handle, torch.no_grad():
        with handle.rows(ROWS):
            got = model(**batch).logits
        for row, which in enumerate(ROWS):
            expected = merged(model, adapters, which)(**batch).logits[row]
            torch.testing.assert_close(got[row], expected, rtol=1e-4, atol=1e-4)
            with handle.using(which or []):
                assert torch.equal(got[row], model(**batch).logits[row])
    assert [p._version for p in model.parameters()] == versions
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters())


def test_gradients_equal_merged_models(case):
    model, adapters, batch = case
    embed = model.get_input_embeddings()
    inputs = embed(batch["input_ids"]).detach()
    others = {"attention_mask": batch["attention_mask"]}
    leaf = inputs.clone().requires_grad_()
    with SeparateComposer(model, adapters) as handle, handle.rows(ROWS):
        model(inputs_embeds=leaf, **others).logits.square().sum().backward()
    for row, which in enumerate(ROWS):
        twin, alone = merged(model, adapters, which), inputs.clone().requires_grad_()
        twin(inputs_embeds=alone, **others).logits[row].square().sum().backward()
        torch.testing.assert_close(leaf.grad[row], alone.grad[row], rtol=1e-3, atol=1e-3)


def test_training_under_checkpointing(case):
    model, adapters, batch = case
    model.train()

    def gradients(checkpointing):
        model.zero_grad()
        torch.manual_seed(0)  # the same dropout in both, within attention, too
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch).logits.square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with SeparateComposer(model, adapters) as handle, handle.rows(ROWS):
        plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad)


def test_bf16_rows_are_as_close_as_merged_weights(case):
    model, adapters, batch = case
    low = copy.deepcopy(model).bfloat16()
    with SeparateComposer(low, adapters) as handle, handle.rows(ROWS), torch.no_grad():
        got = low(**batch).logits.float()
    mine = theirs = 0.0
    with torch.no_grad():
        for row, which in enumerate(ROWS):
            exact = merged(model, adapters, which)(**batch).logits[row]
            mine += (got[row] - exact).square().sum()
            theirs += (merged(low, adapters, which)(**batch).logits[row] - exact).square().sum()
    assert mine <= 4 * theirs


@pytest.mark.parametrize("beams", [1, 2])
def test_generation(beams):
    model = make_model("gpt2")
    adapters = {n: make_adapter(model, i, 0.5) for i, n in enumerate(("sw", "nli"))}
    ids = torch.randint(5, 45, (3, 4))
    rows = ["sw", None, "nli"]
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0,
               "eos_token_id": None, "attention_mask": torch.ones_like(ids)}  # fmt: skip
    with SeparateComposer(model, adapters) as handle, handle.rows(rows, repeat=beams):
        got = model.generate(ids, **options)
    for row, which in enumerate(rows):
        expected = merged(model, adapters, which).generate(ids, **options)[row]
        assert torch.equal(got[row], expected)


def test_an_adapter_of_the_bare_encoder_fits_under_a_head():
    """Names without the model's prefix, and a language-model head that a classifier lacks."""
    model = make_model("classifier")
    masked = make_model("mlm")
    language = make_adapter(masked, 3)
    language = Adapter(language.diffs, name="sw")
    batch = batch_of("classifier")
    with SeparateComposer(model, {"sw": language}) as handle:
        with handle.using("sw"), torch.no_grad():
            got = model(**batch).logits
        assert handle.skipped["sw"]
    with torch.no_grad():
        expected = merged(model, {"sw": language}, "sw")(**batch).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# Encoder-decoder models: `generate` runs the encoder on the prompts, the decoder on every beam.


def make_translator(kind: str):
    torch.manual_seed(0)
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config).eval()
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 24, "max_position_embeddings": 20, "pad_token_id": 0}  # fmt: skip
    bert = transformers.BertConfig
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        bert(**small), bert(**small, is_decoder=True, add_cross_attention=True)
    )
    model = transformers.EncoderDecoderModel(config).eval()
    for each in (model.config, model.generation_config):
        each.decoder_start_token_id, each.pad_token_id, each.eos_token_id = 2, 0, 1
    return model


def translating(model, seed: int) -> Adapter:
    made = make_adapter(model, seed, 0.5)
    known = (".relative_attention_bias.", "layer_norm.weight")  # T5's norms are of its own
    t5 = type(model).__name__.startswith("T5")
    kept = {n: d for n, d in made.diffs.items() if not (t5 and any(k in n for k in known))}
    return Adapter(kept, name=made.name)


@pytest.mark.parametrize("kind", ["t5", "bert"])
@pytest.mark.parametrize(("beams", "returned"), [(1, 1), (3, 1), (3, 3)])
def test_generation_with_an_encoder(kind, beams, returned):
    model = make_translator(kind)
    adapters = {n: translating(model, i) for i, n in enumerate(("sw", "nli"))}
    ids, rows = torch.randint(5, 45, (3, 4)), ["sw", None, "nli"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams,
               "num_return_sequences": returned,
               "attention_mask": torch.ones_like(ids)}  # fmt: skip
    with SeparateComposer(model, adapters) as handle, handle.rows(rows, repeat=beams):
        got = model.generate(ids, **options).view(3, returned, -1)
    for row, which in enumerate(rows):
        expected = merged(model, adapters, which).generate(ids, **options).view(3, returned, -1)
        assert torch.equal(got[row], expected[row])
    # tokens of a random model may be the same all the same: that rows differ is seen in its scores
    step = {"input_ids": ids, "decoder_input_ids": ids[:, :1]}
    with torch.no_grad():
        base = model(**step).logits
        with SeparateComposer(model, adapters) as handle, handle.rows(rows):
            moved = (model(**step).logits - base).abs().amax(dim=(1, 2))
    assert (moved > 0.01).tolist() == [True, False, True]


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_forward_with_an_encoder(kind):
    model = make_translator(kind)
    adapters = {n: translating(model, i) for i, n in enumerate(("sw", "nli"))}
    ids, labels, rows = torch.randint(5, 45, (4, 6)), torch.randint(5, 45, (4, 3)), ["sw", "nli"]
    with SeparateComposer(model, adapters) as handle, torch.no_grad():
        with handle.rows(rows, repeat=2):
            got = model(input_ids=ids, labels=labels).logits
            with pytest.raises(CompositionError, match=r"2 compositions \(repeat=2\).*of 3 rows"):
                model(input_ids=ids[:3], labels=labels[:3])
        for row in range(4):
            expected = merged(model, adapters, rows[row // 2])(input_ids=ids, labels=labels)
            torch.testing.assert_close(got[row], expected.logits[row], rtol=1e-4, atol=1e-4)
