"""Loading through `datasets`, offline: a local folder stands in for a name on the hub."""

from __future__ import annotations

import pytest

from sparseft.data import HubSource, load_hub_examples
from sparseft.errors import DataError

SOURCE = HubSource(path="someone/else", label_names=("positive", "neutral", "negative"))
LABELS = ("negative", "neutral", "positive")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def folder(tmp_path, rows):
    home = tmp_path / "set"
    home.mkdir()
    for split in ("train", "validation", "test"):
        (home / f"{split}.csv").write_text("text,label\n" + rows)
    return str(home)


def test_integer_labels_are_translated_by_name(tmp_path):
    path = folder(tmp_path, "good,0\nbad,2\nfair,1\n")
    found = load_hub_examples(SOURCE, LABELS, path=path, split="valid")
    assert [(e.text, e.label) for e in found] == [("good", 2), ("bad", 0), ("fair", 1)]


def test_label_outside_the_set_names_the_row(tmp_path):
    path = folder(tmp_path, "good,0\nbad,7\n")
    with pytest.raises(DataError, match=r"row 1: label '7' is not one of 'negative'"):
        load_hub_examples(SOURCE, LABELS, path=path)


def test_what_cannot_be_fetched_says_how_to_give_files(tmp_path):
    with pytest.raises(DataError, match=r"cannot be loaded.*--data FOLDER"):
        load_hub_examples(SOURCE, LABELS, path=str(tmp_path / "nothing"))
    with pytest.raises(DataError, match=r"someone/else.*cannot be loaded.*--data FOLDER"):
        load_hub_examples(SOURCE, LABELS)


def test_split_that_is_not_there(tmp_path):
    path = folder(tmp_path, "good,0\n")
    with pytest.raises(DataError, match="split 'dev' cannot be loaded"):
        load_hub_examples(SOURCE, LABELS, path=path, split="dev")
