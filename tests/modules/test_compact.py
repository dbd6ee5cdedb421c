"""Compact state dicts: what loading one reports as missing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparseft import attach


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)


def attached(compact):
    model = Net()
    mask = {"body.weight": torch.eye(4) > 0}
    return model, attach(model, mask, full_params=["head.*"], compact_state_dict=compact)


def test_the_frozen_weights_of_a_compact_state_dict_are_not_missing():
    model, sparse = attached(True)
    with torch.no_grad():
        sparse.leaves["body.weight"].normal_()
    state = model.state_dict()
    for into, _ in (attached(True), attached(False)):
        assert into.load_state_dict(state) == ([], []), "strict"
        assert torch.equal(into.body.diff_weight, sparse.leaves["body.weight"])
        twin = copy.deepcopy(into)
        assert twin.load_state_dict(state) == ([], [])


@pytest.mark.parametrize("lost", ["body.diff_weight", "head.bias", "norm.weight"])
def test_what_is_missing_in_earnest_is_reported(lost):
    """One frozen weight lost of a whole state dict, or anything trained."""
    model, _ = attached(lost != "norm.weight")
    state = model.state_dict()
    del state[lost]
    fresh, sparse = attached(False)
    assert lost in fresh.load_state_dict(state, strict=False).missing_keys
    sparse.detach()
    assert not fresh._load_state_dict_post_hooks
    assert not fresh._state_dict_hooks
