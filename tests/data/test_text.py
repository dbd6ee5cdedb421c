"""Masked-LM examples from text files: nothing lost, nothing reordered, errors with the path."""

from __future__ import annotations

import pytest

from sparseft.data import load_mlm_texts, text_files
from sparseft.errors import DataError


@pytest.fixture
def words(tiny):
    return tiny.WORDS


def body(example, tokenizer):
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return [i for i in example["input_ids"] if i not in special]


def all_ids(dataset, tokenizer):
    return [i for k in range(len(dataset)) for i in body(dataset[k], tokenizer)]


@pytest.mark.parametrize("mode", ["blocks", "lines"])
@pytest.mark.parametrize("length", [3, 5, 8, 64])
def test_every_token_is_there_once_and_in_order(tmp_path, tokenizer, words, mode, length):
    lines = [" ".join(words[i : i + n]) for i, n in enumerate([1, 3, 6, 7, 20, 2, 1, 13])]
    (tmp_path / "a.txt").write_text("\n".join(lines[:5]) + "\n\n  \n")
    (tmp_path / "b.txt").write_text("\n".join(lines[5:]))
    dataset, _ = load_mlm_texts(
        [tmp_path / "a.txt", tmp_path / "b.txt"], tokenizer, length, mode=mode
    )
    expected = tokenizer(" ".join(lines), add_special_tokens=False)["input_ids"]
    assert all_ids(dataset, tokenizer) == expected
    sizes = [len(dataset[i]["input_ids"]) for i in range(len(dataset))]
    assert max(sizes) <= length
    assert dataset.n_tokens == sum(sizes)
    if mode == "blocks":
        assert set(sizes[:-1]) <= {length}
    for i in range(len(dataset)):
        ids = dataset[i]["input_ids"]
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert dataset[i]["attention_mask"] == [1] * len(ids)


def test_blocks_separate_lines(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("ba\nbe\n")
    dataset, _ = load_mlm_texts(tmp_path / "a.txt", tokenizer, 16)
    ba, be = tokenizer.convert_tokens_to_ids(["ba", "be"])
    assert dataset[0]["input_ids"] == [0, ba, 2, be, 2]


def test_more_lines_than_one_chunk(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("ba be\n" * 2500)
    dataset, _ = load_mlm_texts(tmp_path / "a.txt", tokenizer, 16, mode="lines")
    assert len(dataset) == 2500


def test_indexing_is_that_of_a_sequence(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("ba\nbe\nbi\n")
    dataset, _ = load_mlm_texts(tmp_path / "a.txt", tokenizer, 16, mode="lines")
    assert dataset[-1] == dataset[2]
    for outside in (3, -4):
        with pytest.raises(IndexError):
            dataset[outside]


def test_split_and_sample_are_seeded_and_disjoint(tmp_path, tokenizer, words):
    (tmp_path / "a.txt").write_text("\n".join(words))
    dataset, _ = load_mlm_texts(tmp_path / "a.txt", tokenizer, 16, mode="lines")
    train, valid = dataset.split(0.05, seed=1)
    assert len(valid) == round(0.05 * len(words))
    assert sorted(all_ids(train, tokenizer) + all_ids(valid, tokenizer)) == sorted(
        all_ids(dataset, tokenizer)
    )
    assert all_ids(dataset.split(0.05, seed=1)[1], tokenizer) == all_ids(valid, tokenizer)
    assert all_ids(dataset.split(0.05, seed=2)[1], tokenizer) != all_ids(valid, tokenizer)
    fewer, _ = load_mlm_texts(tmp_path / "a.txt", tokenizer, 16, 7, mode="lines", max_examples=10)
    ids = all_ids(fewer, tokenizer)
    assert len(ids) == 10
    assert ids == sorted(ids), "the order of the text is kept"


def test_folder_means_its_text_files_by_name(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text("x")
    assert [f.name for f in text_files(tmp_path)] == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("content", "needle"),
    [(b"", "empty"), (b" \n\t\n", "blank"), (b"fine\n\xc3(\n", "UTF-8")],
    ids=["empty", "blank", "not utf-8"],
)
def test_unusable_files_are_named(tmp_path, tokenizer, content, needle):
    (tmp_path / "good.txt").write_text("ba")
    (tmp_path / "odd.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"odd\.txt: .*{needle}"):
        load_mlm_texts([tmp_path / "good.txt", tmp_path / "odd.txt"], tokenizer, 16)


def test_missing_files_are_named(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"none\.txt: no such text file"):
        load_mlm_texts(tmp_path / "none.txt", tokenizer, 16)
    with pytest.raises(DataError, match=r"without \*\.txt"):
        load_mlm_texts(tmp_path, tokenizer, 16)
    with pytest.raises(DataError, match="no text file given"):
        load_mlm_texts([], tokenizer, 16)


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        ({"max_length": 2}, "no room"),
        ({"max_length": 129}, "at most 128"),
        ({"max_length": 16, "mode": "block"}, "'blocks', 'lines'"),
        ({"max_length": 16, "max_examples": 0}, "at least 1"),
    ],
)
def test_values_outside_their_range(tmp_path, tokenizer, options, needle):
    (tmp_path / "a.txt").write_text("ba")
    with pytest.raises(DataError, match=needle):
        load_mlm_texts(tmp_path / "a.txt", tokenizer, **options)
