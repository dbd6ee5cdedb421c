"""Seen entries in a trainer's JSON state: what is taken back, and what is done without it."""

from __future__ import annotations

import json

import pytest
import torch

from sparseft import attach
from sparseft.modules.seen_entries import seen_entries, watch_entries
from sparseft.training.saved_entries import begin_watching, saved_entries


def attached(names=("0.weight", "1.weight")):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    return attach(model, {name: torch.eye(4) > 0 for name in names})


def flags(sparse):
    return {n: seen_entries(m).flags.tolist() for n, m in sparse._masked.items() if seen_entries(m)}


def looked(sparse, *grads):
    for masked, grad in zip(sparse._masked.values(), grads, strict=True):
        masked.leaf.grad = torch.tensor(grad)
        watch_entries(masked).look(masked)
    return sparse


def state(found):
    """As Trainer writes and reads it."""
    return json.loads(json.dumps({"args": {}, "attributes": {"_saved": found}}))


FIRST, SECOND = [1.0, 0.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]
SEEN = {"0.weight": [True, False, False, True], "1.weight": [True] * 4}


def test_there_and_back():
    saved = saved_entries(looked(attached(), FIRST, SECOND))
    assert saved["steps"] == 1
    again = attached()
    begin_watching(again, state(saved), 7)
    assert flags(again) == SEEN
    assert saved_entries(again) == saved
    begin_watching(again, state(saved), 0)
    assert flags(again) == {}, "a run that begins has seen nothing"
    assert saved_entries(again) == {}


def test_of_several_callbacks_the_one_with_these_masks():
    saved = saved_entries(looked(attached(("1.weight",)), SECOND))
    others = {"steps": 3, "seen": {"elsewhere": ""}}
    again = attached(("1.weight",))
    begin_watching(again, [state({}), state(saved), state(others)], 2)
    assert flags(again) == {"1.weight": [True] * 4}


@pytest.mark.parametrize(
    "found",
    [
        None,
        state({}),
        {"args": {}},
        {"attributes": {"_saved": {"steps": 4, "seen": {"0.weight": "%", "1.weight": "AAAA"}}}},
        {
            "attributes": {
                "_saved": {"steps": 4, "seen": {"0.weight": 3, "1.weight": "eJwDAAAAAAE="}}
            }
        },
    ],
    ids=["nothing", "empty", "no-attributes", "no-base64", "another-size"],
)
def test_without_flags_entries_that_have_moved_count(found, caplog):
    sparse = attached()
    with torch.no_grad():
        sparse.leaves["0.weight"].copy_(torch.tensor([0.5, 0.0, 0.0, -0.5]))
    begin_watching(sparse, found, 4)
    looked(sparse, [0.0] * 4, [0.0] * 4)
    assert flags(sparse) == {"0.weight": SEEN["0.weight"], "1.weight": [False] * 4}
    damaged = isinstance(found, dict) and "seen" in str(found)
    assert ("0.weight: which entries had got gradient is unknown" in caplog.text) == damaged
