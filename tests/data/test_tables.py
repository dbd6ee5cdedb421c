"""Rows out of files: what a sentence may hold, and what a message must name."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseft.data import load_classification, read_table
from sparseft.errors import DataError

LABELS = ("negative", "neutral", "positive")


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_csv_quotes_commas_and_line_breaks(tmp_path):
    file = write(tmp_path / "a.csv", 'id,text,label\n1,"a, ""b""\nc",positive\n\n2,d,neutral\n')
    assert list(read_table(file)) == [
        (2, {"id": "1", "text": 'a, "b"\nc', "label": "positive"}),
        (5, {"id": "2", "text": "d", "label": "neutral"}),
    ]


def test_tsv_takes_quotes_and_odd_separators_as_text(tmp_path):
    odd = 'say "x\u2028y\x0bz\rw'  # str.splitlines would cut this into four
    file = write(tmp_path / "a.tsv", f"{odd}\tpositive\r\nb\tneutral")
    rows = [row for _, row in read_table(file, columns=("text", "label"))]
    assert rows == [{"text": odd, "label": "positive"}, {"text": "b", "label": "neutral"}]


def test_byte_order_mark_is_not_part_of_the_first_column(tmp_path):
    file = write(tmp_path / "a.csv", "text,label\na,neutral\n", "utf-8-sig")
    assert list(next(read_table(file))[1]) == ["text", "label"]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.text(st.characters(blacklist_categories=("Cs",)), max_size=20), st.integers()),
        min_size=1,
        max_size=5,
    )
)
def test_jsonl_round_trip(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    write(
        file, "".join(json.dumps({"text": t, "n": n}, ensure_ascii=False) + "\n" for t, n in rows)
    )
    assert [(r["text"], r["n"]) for _, r in read_table(file)] == rows


@pytest.mark.parametrize(
    ("name", "content", "needles"),
    [
        ("a.csv", b"id,text,label\n1,x\n", ["a.csv, line 2", "2 fields", "3", "id, text, label"]),
        ("a.csv", b'text,label\n"open,neutral\n', ["a.csv", "CSV"]),
        ("a.tsv", b"text\tlabel\nx\ty\tz\n", ["a.tsv, line 2", "3 fields"]),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', ["a.jsonl, line 2", "JSON"]),
        ("a.jsonl", b"[1, 2]\n", ["a.jsonl, line 1", "list"]),
        ("a.csv", b"text,label\n\xff\xfe,x\n", ["a.csv", "UTF-8", "0xff"]),
        ("a.parquet", b"PAR1", ["a.parquet", ".parquet", ".csv"]),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, needles):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_table(file))
    assert all(needle in str(caught.value) for needle in needles), caught.value


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.csv: no such file"):
        list(read_table(tmp_path / "none.csv"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match=r"folder\.csv: cannot be read"):
        list(read_table(tmp_path / "folder.csv"))


def test_label_outside_the_set_names_file_line_label_and_set(tmp_path):
    file = write(tmp_path / "a.csv", "id,text,label\n1,x,positive\n2,y,postive\n")
    with pytest.raises(DataError) as caught:
        load_classification(file, LABELS)
    message = str(caught.value)
    for needle in (
        "a.csv, line 3",
        "'postive'",
        "'negative', 'neutral', 'positive'",
        "Did you mean",
    ):
        assert needle in message


@pytest.mark.parametrize("content", ["", "id,text,label\n"], ids=["empty", "header only"])
def test_empty_dataset_is_an_error(tmp_path, content):
    file = write(tmp_path / "a.csv", content)
    with pytest.raises(DataError, match=r"a\.csv: the file has no rows"):
        load_classification(file, LABELS)


def test_missing_column_names_those_that_exist(tmp_path):
    file = write(tmp_path / "a.csv", "id,txt,label\n1,x,positive\n")
    with pytest.raises(DataError, match=r"'text'.*'id', 'txt', 'label'.*Did you mean 'txt'"):
        load_classification(file, LABELS)


def test_empty_text_is_an_error_unless_skipped(tmp_path):
    file = write(tmp_path / "a.csv", "id,text,label\n1, ,positive\n2,x,neutral\n")
    with pytest.raises(DataError, match=r"line 2: empty text in column 'text'"):
        load_classification(file, LABELS)
    kept = load_classification(file, LABELS, skip=lambda row: not row["text"].strip())
    assert [e.text for e in kept] == ["x"]


def test_pairs_positions_filters_and_aliases(tmp_path):
    file = write(tmp_path / "a.tsv", "sw\ta\tb\tyes\nur\tc\td\tno\nsw\te\tf\tnope\n")
    options = {
        "text_fields": ("p", "h"),
        "columns": ("lang", "p", "h", "label"),
        "aliases": {"nope": "no"},
    }
    found = load_classification(file, ("no", "yes"), where={"lang": "sw"}, **options)
    assert [(e.text, e.pair, e.label, e.id) for e in found] == [
        ("a", "b", 1, "1"),
        ("e", "f", 0, "3"),
    ]
    with pytest.raises(DataError, match=r"'fr'.*lang: sw, ur"):
        load_classification(file, ("no", "yes"), where={"lang": "fr"}, **options)
