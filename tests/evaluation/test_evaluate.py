"""Predictions: the order of the file, the bits of a plain loop, the model left as it was."""

from __future__ import annotations

import json

import pytest
import torch

from sparseft.data import Example
from sparseft.errors import DataError
from sparseft.evaluation import evaluate_classifier, load_model, load_tokenizer, predict_logits


@pytest.fixture
def model(tiny):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(1)
    config = tiny.tiny_config(num_labels=3, initializer_range=1.0)
    return AutoModelForSequenceClassification.from_config(config)


@pytest.fixture
def examples(tiny):
    lengths = [3, 9, 1, 30, 4, 4, 12, 2, 7, 50, 5]
    return [
        Example(" ".join(tiny.WORDS[i : i + n]), label=i % 3, id=f"e{i}")
        for i, n in enumerate(lengths)
    ]


def one_by_one(model, tokenizer, examples):
    model.eval()
    with torch.no_grad():
        rows = [model(**tokenizer(e.text, e.pair, return_tensors="pt")).logits for e in examples]
    return torch.cat(rows)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batches_give_the_logits_of_single_examples_in_file_order(
    model, tokenizer, examples, batch_size
):
    wanted = one_by_one(model, tokenizer, examples)
    found = predict_logits(model, tokenizer, examples, batch_size=batch_size, max_length=64)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert found.argmax(-1).unique().numel() > 1, "a constant prediction would hide the order"


def test_pairs(model, tokenizer, examples):
    pairs = [Example(e.text, e.label, pair=f"za {i}") for i, e in enumerate(examples[:6])]
    wanted = one_by_one(model, tokenizer, pairs)
    found = predict_logits(model, tokenizer, pairs, batch_size=4, max_length=64)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_same_call_same_bits_and_nothing_changes(model, tokenizer, examples):
    model.train()
    model.classifier.eval()  # a mixture of modes must come back as it was
    modes = {name: module.training for name, module in model.named_modules()}
    state, rng = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    first = predict_logits(model, tokenizer, examples)
    assert torch.equal(first, predict_logits(model, tokenizer, examples))
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, rng[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not first.is_inference()
    assert not first.requires_grad


def test_modes_come_back_after_an_error(model, tokenizer, examples):
    model.train()
    with pytest.raises(RuntimeError, match="on purpose"):
        predict_logits(model, tokenizer, examples, progress=_fail)
    assert all(module.training for module in model.modules())


def _fail(done, of):
    raise RuntimeError("on purpose")


def nusax(root):
    file = root / "balinese" / "test.csv"
    file.parent.mkdir(parents=True)
    rows = ["1,ba be,negative", "2,bi,positive", "3,bo bu ba,neutral", "4,ca,positive"]
    file.write_text("id,text,label\n" + "\n".join(rows) + "\n")
    return root


def test_scores_and_jsonl(model, tokenizer, tmp_path):
    root = nusax(tmp_path)
    found = evaluate_classifier(model, tokenizer, "nusax_senti", "Balinese", root=root)
    targets = [0, 2, 1, 2]
    right = sum(t == p for t, p in zip(targets, found.predictions, strict=True))
    assert found["accuracy"] == right / 4
    assert set(found.metrics) == {"accuracy", "macro_f1"}
    found.write_jsonl(tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["id"] for r in rows] == ["1", "2", "3", "4"]
    assert [r["label"] for r in rows] == ["negative", "positive", "neutral", "positive"]
    assert [r["prediction"] for r in rows] == [found.labels[p] for p in found.predictions]
    assert len(evaluate_classifier(model, tokenizer, "nusax_senti", "ban", root=root, limit=2)) == 2


def test_outputs_are_read_by_their_names(model, tokenizer, tmp_path):
    root = nusax(tmp_path)
    plain = evaluate_classifier(model, tokenizer, "nusax_senti", "ban", root=root)
    model.config.id2label = {0: "Positive", 1: "Neutral", 2: "Negative"}
    named = evaluate_classifier(model, tokenizer, "nusax_senti", "ban", root=root)
    assert torch.equal(named.logits, plain.logits[:, [2, 1, 0]])


def test_wrong_number_of_outputs(model, tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"3 outputs but task paws_x has 2 labels.*num_labels=2"):
        evaluate_classifier(model, tokenizer, "paws_x", "en", root=tmp_path)


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        ({"examples": []}, "empty"),
        ({}, "give root"),
        ({"examples": [Example("ba", 0)], "max_length": 129}, "max_length=129"),
        ({"examples": [Example("ba", 0)], "batch_size": 0}, "batch_size"),
        ({"examples": [Example("ba", 0), Example("ba", 0, pair="be")]}, "mixed"),
    ],
)
def test_bad_input(model, tokenizer, options, needle):
    with pytest.raises(DataError, match=needle):
        evaluate_classifier(model, tokenizer, "nusax_senti", "ban", **options)


def test_base_from_a_folder_and_its_errors(tiny, tmp_path, monkeypatch):
    import huggingface_hub.constants

    folder = tiny.save_tiny(tmp_path / "base")
    new: list[str] = []
    model = load_model(folder, num_labels=3, missing=new)
    assert model.config.num_labels == 3
    assert new == [n for n in sorted(model.state_dict()) if n.startswith("classifier.")]
    assert load_tokenizer(folder).mask_token == "<mask>"
    with pytest.raises(DataError, match=r"no folder .*nothing"):
        load_model(tmp_path / "nothing")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=r"bare has no config\.json"):
        load_tokenizer(tmp_path / "bare")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"'nobody/nothing' cannot be loaded.*give the path"):
        load_model("nobody/nothing")
    with pytest.raises(DataError, match="kind='causal'"):
        load_model(folder, "causal")
