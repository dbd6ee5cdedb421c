"""Languages and groups: every spelling, every group, and a user's own file."""

from __future__ import annotations

import pytest

from sparseft.data import builtin_languages, load_languages
from sparseft.errors import DataError, UnknownNameError


def test_groups_have_the_sizes_of_the_data_sets():
    known = builtin_languages()
    sizes = {g: len(known.expand([g])) for g in ("nusax", "americasnli", "xnli", "paws_x")}
    assert sizes == {"nusax": 12, "americasnli": 10, "xnli": 15, "paws_x": 7}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("ban", "ban"),
        ("Balinese", "ban"),
        ("toba batak", "bbc"),
        ("toba_batak", "bbc"),
        ("en", "eng"),
        ("ID", "ind"),
        ("Shipibo-Konibo", "shp"),
    ],
)
def test_spellings(text, code):
    assert builtin_languages().code(text) == code


def test_expand_mixes_groups_and_languages_each_once():
    known = builtin_languages()
    assert known.expand(["paws_x", "German", "sw"]) == "de eng es fr ja ko zh sw".split()


def test_unknown_names_list_the_nearest():
    known = builtin_languages()
    with pytest.raises(UnknownNameError, match="balinese"):
        known.code("balinse")
    with pytest.raises(UnknownNameError, match="nusax"):
        known.expand(["nusa"])


def test_own_file_adds_and_replaces(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "languages: {tpi: [Tok Pisin]}\ngroups: {mine: [tpi, nusax_unseen], germanic: [de]}\n"
    )
    known = load_languages(file)
    assert known.expand(["mine"])[:2] == ["tpi", "ace"]
    assert known.expand(["germanic"]) == ["de"]
    assert known.name("tpi") == "Tok Pisin"
    assert "tpi" not in builtin_languages().names


@pytest.mark.parametrize(
    ("text", "error", "needle"),
    [
        ("group: {a: [ban]}", DataError, "'languages' and 'groups'"),
        ("- a", DataError, "'languages' and 'groups'"),
        ("groups: {a: [b], b: [a]}", DataError, "contains itself"),
        ("groups: {a: [nowhere]}", UnknownNameError, "'nowhere'.*in group 'a'"),
        ("languages: {no: [Norwegian]}", DataError, "quote it"),
        ("languages: {xx: [Balinese]}", DataError, "spelling of both"),
        ("groups: {ban: [min]}", DataError, "both a group and a language"),
        ("groups: [", DataError, "not YAML"),
    ],
)
def test_bad_files(tmp_path, text, error, needle):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(error, match=needle):
        load_languages(file)
    with pytest.raises(DataError, match="no such file"):
        load_languages(tmp_path / "none.yaml")
