"""Fingerprints of models: the bottom base, casts, other bases."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from sparseft import attach
from sparseft.errors import BaseMismatchError, UnknownNameError
from sparseft.modules import fingerprint_model, verify_fingerprint


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))


def test_of_the_bottom_base_through_an_attachment(model):
    plain = fingerprint_model(model, ["0.weight"])
    sparse = attach(model, {"0.weight": torch.rand(16, 16) < 0.5})
    with torch.no_grad():
        sparse.leaves["0.weight"].normal_()
    sparse.sync_()
    assert fingerprint_model(model, ["0.weight"]) == plain
    assert fingerprint_model(model, ["0.weight"], bottom=False) != plain
    verify_fingerprint(model, plain)


def test_only_the_named_tensors_count(model):
    plain = fingerprint_model(model, ["0.weight"])
    with torch.no_grad():
        model[1].weight.add_(1)
    verify_fingerprint(model, plain)


def test_a_cast_of_the_same_base_is_accepted_and_logged(model, caplog):
    plain = fingerprint_model(model, ["0.weight", "1.weight"])
    with caplog.at_level(logging.INFO, logger="sparseft"):
        verify_fingerprint(model.bfloat16(), plain)
    assert "2 base tensors are a cast" in caplog.text


def test_another_base_is_refused_with_both_values(model):
    plain = fingerprint_model(model, ["0.weight"])
    with torch.no_grad():
        model[0].weight[3, 3] += 1e-3
    with pytest.raises(BaseMismatchError) as error:
        verify_fingerprint(model, plain)
    now = fingerprint_model(model, ["0.weight"])
    for value in (plain.tensors["0.weight"], now.tensors["0.weight"]):
        assert str(value) in str(error.value)


def test_a_model_without_the_tensor(model):
    plain = fingerprint_model(model, ["1.weight"])
    with pytest.raises(UnknownNameError, match=r"1\.weight"):
        verify_fingerprint(model[:1], plain)
