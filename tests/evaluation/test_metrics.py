"""Scores against scikit-learn's, classes that never occur included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseft.errors import DataError
from sparseft.evaluation import accuracy, confusion, macro_f1

lists = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 4), min_size=n, max_size=n),
        st.lists(st.integers(0, 4), min_size=n, max_size=n),
    )
)


@settings(max_examples=60, deadline=None)
@given(lists)
def test_equal_to_scikit_learn(pair):
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    y, p = pair
    assert accuracy(y, p) == pytest.approx(sklearn.accuracy_score(y, p), abs=1e-15)
    options = {"average": "macro", "zero_division": 0}
    assert macro_f1(y, p) == pytest.approx(sklearn.f1_score(y, p, **options), abs=1e-15)
    with_absent = sklearn.f1_score(y, p, labels=range(7), **options)
    assert macro_f1(y, p, classes=range(7)) == pytest.approx(with_absent, abs=1e-15)
    table = sklearn.confusion_matrix(y, p, labels=range(5))
    assert np.array_equal(confusion(y, p, 5), table)


def test_by_hand():
    y, p = [0, 0, 1, 1, 2], [0, 1, 1, 1, 1]
    # F1: class 0 2/(2+1), class 1 4/(4+2), class 2 never predicted
    assert macro_f1(y, p) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert accuracy(y, p) == 0.6


def test_majority_class_on_nusax():
    """A model that always says positive scores 18.3 on NusaX test (153/151/96 of 400)."""
    y = [0] * 153 + [2] * 151 + [1] * 96
    assert round(100 * macro_f1(y, [0] * 400), 1) == 18.4
    assert round(100 * macro_f1(y, [2] * 400), 1) == 18.3


@pytest.mark.parametrize("pair", [([], []), ([1], [1, 2])])
def test_nothing_to_score(pair):
    with pytest.raises(DataError):
        macro_f1(*pair)
