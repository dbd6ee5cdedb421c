"""Pre-training: a resumed run has the uninterrupted one's bits, and its stream is what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from sparseft.demo.corpus import BLOCK, Corpus, mask_batch
from sparseft.demo.encoder import file_digest, load_classifier, load_masked_lm, load_tokenizer
from sparseft.demo.names import CATEGORIES
from sparseft.demo.pretrain import build_parser, learning_rate, masked_lm_loss, pretrain
from sparseft.demo.tokenizer import (
    BOS_ID,
    EOS_ID,
    MASK_ID,
    PAD_ID,
    SPECIAL_TOKENS,
    UNK_ID,
    train_tokenizer,
)
from sparseft.errors import NonFiniteLossError

LOCALES = ["en", "nl", "se"]
MICRO = ["--steps", "5", "--batch-size", "8", "--hidden", "16", "--layers", "1", "--heads", "2"]
MICRO += ["--vocab-size", "600", "--checkpoint-every", "2", "--locales", *LOCALES]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(LOCALES, vocab_size=600).save(str(path))
    return path


def _arguments(folder: Path, tokenizer_file: Path, *extra: str):
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    (work / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    return build_parser().parse_args(
        [*MICRO, "--work-dir", str(work), "--output", str(folder / "assets"), *extra]
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    pretrain(_arguments(folder, tokenizer_file))
    return folder / "assets"


@pytest.mark.parametrize("stop", [2, 3])
def test_resumed_run_has_the_same_bits(finished, tokenizer_file, tmp_path, stop):
    pretrain(_arguments(tmp_path, tokenizer_file, "--stop-after", str(stop)))
    arguments = _arguments(tmp_path, tokenizer_file)
    assert not arguments.output.exists()
    pretrain(arguments)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert file_digest(arguments.output / name) == file_digest(finished / name)
    mine, theirs = (
        json.loads((d / "provenance.json").read_text()) for d in (arguments.output, finished)
    )
    assert mine["loss"] == theirs["loss"]
    assert mine["arguments"] == theirs["arguments"]
    assert mine["schedule"] == [{"from_step": 0, "steps": 5}]


def test_a_changed_length_is_recorded(tokenizer_file, tmp_path):
    pretrain(_arguments(tmp_path, tokenizer_file, "--stop-after", "2"))
    arguments = _arguments(tmp_path, tokenizer_file, "--steps", "4")
    pretrain(arguments)
    record = json.loads((arguments.output / "provenance.json").read_text())
    assert record["schedule"] == [{"from_step": 0, "steps": 5}, {"from_step": 2, "steps": 4}]
    assert record["steps_done"] == 4


def test_another_seed_gives_other_weights(finished, tokenizer_file, tmp_path):
    arguments = _arguments(tmp_path, tokenizer_file, "--seed", "1")
    pretrain(arguments)
    assert file_digest(arguments.output / "model.safetensors") != file_digest(
        finished / "model.safetensors"
    )


def test_assets_load_through_the_stock_classes(finished):
    masked_lm, classifier = load_masked_lm(finished), load_classifier(finished, seed=3)
    tokenizer = load_tokenizer(finished)
    encoded = tokenizer(["Finland", "Norwegian krone"], padding=True, return_tensors="pt")
    inputs = {k: encoded[k] for k in ("input_ids", "attention_mask")}
    assert classifier(**inputs).logits.shape == (2, len(CATEGORIES))
    assert masked_lm(**inputs).logits.shape[-1] == len(tokenizer)
    # the tied output projection is the embedding
    embedding = masked_lm.get_input_embeddings().weight
    assert masked_lm.get_output_embeddings().weight.data_ptr() == embedding.data_ptr()
    for name, parameter in classifier.roberta.named_parameters():
        assert torch.equal(parameter, masked_lm.roberta.get_parameter(name))
    again = load_classifier(finished, seed=3)
    assert torch.equal(again.classifier.dense.weight, classifier.classifier.dense.weight)


def test_nan_loss_stops_and_keeps_the_checkpoint(tokenizer_file, tmp_path):
    arguments = _arguments(tmp_path, tokenizer_file, "--lr", "1e30")
    with pytest.raises(NonFiniteLossError, match="step 1"):
        pretrain(arguments)


def test_loss_at_masked_positions_is_the_full_loss(finished):
    model = load_masked_lm(finished)
    rng = np.random.default_rng(0)
    batch = mask_batch([[0, 20, 30, 40, 2], [0, 50, 2]], rate=0.5, vocab_size=600, rng=rng)
    labels = torch.full(batch.input_ids.shape, -100)
    labels.view(-1)[batch.positions] = batch.targets
    full = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
    torch.testing.assert_close(masked_lm_loss(model, batch), full)


def test_masking():
    rng = np.random.default_rng(0)
    rows = [[BOS_ID, *range(10, 10 + n), EOS_ID] for n in (1, 7, 30)] * 40
    batch = mask_batch(rows, rate=0.3, vocab_size=600, rng=rng)
    original = batch.input_ids.clone()
    original.view(-1)[batch.positions] = batch.targets
    for row, kept in zip(rows, original.tolist(), strict=True):
        assert kept == row + [PAD_ID] * (len(kept) - len(row))
    assert int(batch.targets.min()) >= len(SPECIAL_TOKENS)
    per_row = torch.bincount(batch.positions // batch.input_ids.shape[1], minlength=len(rows))
    assert int(per_row.min()) >= 1
    became = batch.input_ids.view(-1)[batch.positions]
    assert 0.7 < (became == MASK_ID).double().mean() < 0.9
    assert 0.05 < (became == batch.targets).double().mean() < 0.17
    assert 0.25 < len(batch.positions) / (38 * 40) < 0.37


def test_blocks_depend_on_seed_and_number_alone(tokenizer_file):
    corpus = Corpus.build(LOCALES, Tokenizer.from_file(str(tokenizer_file)))
    first = corpus.block(0, 3, 8)
    corpus.block(0, 4, 8)
    assert corpus.block(0, 3, 8) == first
    assert corpus.block(0, 4, 8) != first
    assert corpus.block(1, 3, 8) != first
    assert len(first) == BLOCK
    assert all(len(batch) == 8 for batch in first)
    assert all(row[0] == BOS_ID and row[-1] == EOS_ID for batch in first for row in batch)
    # a batch holds rows of nearly one length
    widths = [max(map(len, b)) - min(map(len, b)) for b in first]
    assert sorted(widths)[BLOCK // 2] <= 2


def test_learning_rate_rises_then_falls():
    rates = [learning_rate(s, steps=100, peak=1.0, warmup=0.1) for s in range(100)]
    assert max(rates) == rates[9] == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3


def test_tokenizer_spells_letters_it_was_not_trained_on(tokenizer_file):
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    for text in ("Orílẹ́ède Finland", "Tiếng Việt", "ƙasar Ɗanmark", "O‘zbekiston"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert UNK_ID not in ids
