"""Which entries have got a gradient: kept where masks move, in JSON and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseft import SparsePattern, attach
from sparseft.modules.seen_entries import SeenEntries, forget, seen_entries, watch_entries


def masked(indices, shape=(4, 5)):
    model = torch.nn.Linear(shape[1], shape[0], bias=False)
    pattern = SparsePattern.from_indices(torch.tensor(indices), shape)
    sparse = attach(model, {"weight": pattern})
    return sparse, sparse._masked["weight"]


def test_zero_and_nan_are_no_gradient():
    _, m = masked([0, 3, 7, 11, 19])
    seen = SeenEntries(m)
    seen.look(m)
    m.leaf.grad = torch.tensor([0.0, -0.0, float("nan"), 1e-30, float("inf")])
    seen.look(m)
    assert seen.flags.tolist() == [False, False, False, True, True]
    m.leaf.grad = torch.tensor([0.0, -1e-45, 0.0, 0.0, 0.0])
    seen.look(m)
    assert seen.flags.tolist() == [False, True, False, True, True]
    assert int(seen.unseen()) == 2
    assert seen.looks == 3


def test_what_is_seen_moves_with_the_mask():
    """Kept entries keep it, grown ones begin anew, also those that were there once before."""
    sparse, m = masked([0, 3, 7])
    seen = watch_entries(m)
    m.leaf.grad = torch.tensor([1.0, 0.0, 1.0])
    seen.look(m)
    seen.settle(0)
    for indices, wanted in (([3, 7, 8, 9], [0, 1, 0, 0]), ([0, 7, 9], [0, 1, 0])):
        pattern = SparsePattern.from_indices(torch.tensor(indices), (4, 5))
        sparse.reselect_({"weight": pattern}, optimizer=None)
        assert seen_entries(m).flags.tolist() == [bool(w) for w in wanted]
    m.leaf.grad = torch.ones(3)
    seen.look(m)
    assert seen.flags.all(), "settled flags of another mask do not count"
    with torch.no_grad():
        m.leaf[0] = 0.5
    pattern = SparsePattern.from_indices(torch.tensor([0, 1]), (4, 5))
    sparse.reselect_({"weight": pattern}, optimizer=None)
    assert seen_entries(m).flags.tolist() == [True, False]


def test_entries_that_a_loaded_state_has_moved_had_gradients():
    sparse, m = masked([0, 3])
    watch_entries(m).look(m)
    pattern = SparsePattern.from_indices(torch.tensor([1, 3]), (4, 5))
    sparse.reselect_({"weight": pattern}, optimizer=None)
    with torch.no_grad():
        m.leaf[0] = 0.25
    assert seen_entries(m).flags.tolist() == [True, False]


def test_the_flags_live_with_the_mask():
    sparse, m = masked([0, 3])
    assert seen_entries(m) is None
    first = watch_entries(m)
    assert seen_entries(m) is None, "nobody has looked"
    first.look(m)
    assert seen_entries(m) is watch_entries(m) is first
    forget(m)
    assert seen_entries(m) is None
    other, n = masked([0, 3])
    assert watch_entries(n) is not watch_entries(m)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_flags_survive_json(flags):
    _, m = masked(range(len(flags)), (10, 7))
    seen = SeenEntries(m)
    seen.flags = torch.tensor(flags)
    text = seen.encode()
    assert text == "" or not all(flags)
    fresh = SeenEntries(m)
    fresh.restore(text, 5, m)
    assert fresh.flags.tolist() == flags
    assert fresh.looks == 5


@pytest.mark.parametrize("text", ["%", "AAAA", "eJxjBwAACAAI"])
def test_damaged_flags_are_refused(text):
    import zlib

    _, m = masked(range(20))
    with pytest.raises((ValueError, zlib.error)):
        SeenEntries(m).restore(text, 1, m)
