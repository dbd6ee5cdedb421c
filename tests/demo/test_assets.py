"""The shipped encoder: its files are those its record speaks of, small enough, and loadable."""

from __future__ import annotations

import unicodedata

import pytest
import torch

from sparseft.demo.encoder import (
    ASSETS,
    CONFIG,
    TOKENIZER,
    WEIGHTS,
    file_digest,
    load_classifier,
    load_masked_lm,
    load_provenance,
    load_tokenizer,
)
from sparseft.demo.names import (
    DEV,
    HELD_OUT,
    SHOWN,
    SOURCE,
    babel_version,
    names,
    names_digest,
    pretraining_locales,
)
from sparseft.demo.tokenizer import UNK_ID
from sparseft.errors import DataError


def test_record_speaks_of_these_files():
    record = load_provenance()
    assert set(record["files"]) == {WEIGHTS, CONFIG, TOKENIZER}
    for name, about in record["files"].items():
        assert file_digest(ASSETS / name) == about["blake2b_128"]
        assert (ASSETS / name).stat().st_size == about["bytes"]


def test_weights_are_small():
    assert (ASSETS / WEIGHTS).stat().st_size <= 8_000_000
    assert 2_500_000 < load_provenance()["parameters"] < 4_000_000


def test_record_holds_no_held_out_language():
    data = load_provenance()["data"]
    assert not {locale.split("_")[0] for locale in data["pretraining_locales"]} & HELD_OUT
    assert data["held_out_shown"] == list(SHOWN)
    assert data["held_out_dev"] == list(DEV)


def test_record_fits_the_installed_names():
    record = load_provenance()
    if babel_version() != record["versions"]["babel"]:
        pytest.skip(f"made with Babel {record['versions']['babel']}, here {babel_version()}")
    data = record["data"]
    assert tuple(data["pretraining_locales"]) == pretraining_locales()
    assert names_digest([SOURCE, *SHOWN]) == data["names_digest_source_and_shown"]
    everything = {*data["pretraining_locales"], *SHOWN, *DEV}
    assert names_digest(everything) == data["names_digest"]


@pytest.mark.parametrize("language", [SOURCE, *SHOWN])
def test_tokenizer_round_trip(language):
    tokenizer = load_tokenizer()
    texts = list(names(language).values())
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    unknown = sum(ids.count(UNK_ID) for ids in encoded)
    assert unknown <= 0.001 * sum(map(len, encoded))
    for text, ids in zip(texts, encoded, strict=True):
        if UNK_ID not in ids:
            back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            want = unicodedata.normalize("NFKC", text)
            assert " ".join(unicodedata.normalize("NFC", back).split()) == " ".join(want.split())


def test_loads_in_fp32_and_runs():
    tokenizer = load_tokenizer()
    batch = tokenizer(["Sveitsi", "Kiswahili"], padding=True, return_tensors="pt")
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        for model in (load_masked_lm(), load_classifier()):
            assert {p.dtype for p in model.parameters()} == {torch.float32}
            assert torch.isfinite(model(**inputs).logits).all()


def test_weights_of_another_shape_are_refused(tmp_path):
    for name in (WEIGHTS, CONFIG):
        (tmp_path / name).write_bytes((ASSETS / name).read_bytes())
    text = (
        (tmp_path / CONFIG).read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 5')
    )
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(DataError, match="does not fit its config"):
        load_masked_lm(tmp_path)
