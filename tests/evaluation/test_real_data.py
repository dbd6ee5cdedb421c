"""The real files: rows counted, labels complete."""

from __future__ import annotations

from collections import Counter

import pytest

from sparseft.data import builtin_languages
from sparseft.evaluation import get_task


def test_nusax_has_twelve_languages_of_500_100_400(real_data):
    task = get_task("nusax_senti")
    languages = task.languages(real_data)
    assert languages == sorted(builtin_languages().expand(["nusax"]))
    for language in languages:
        sizes = [len(task.load(real_data, language, s)) for s in ("train", "valid", "test")]
        assert sizes == [500, 100, 400], language
    # the sentences are parallel: each language has the same ids with the same labels
    of = {
        code: Counter((e.id, e.label) for e in task.load(real_data, code, "test"))
        for code in languages
    }
    assert len({frozenset(c.items()) for c in of.values()}) == 1


@pytest.mark.parametrize(
    ("split", "rows"),
    [("train", 11_000), ("valid", 1_260), ("test", 500), ("train_leak_free", 11_865)],
)
def test_smsa_rows(real_data, split, rows):
    found = get_task("smsa").load(real_data, "ind", split)
    assert len(found) == rows
    if split == "train":
        assert Counter(e.label for e in found) == {0: 3_436, 1: 1_148, 2: 6_416}
