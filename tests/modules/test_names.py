"""Canonical names: wrappers, ties, shared modules, globs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparseft import attach
from sparseft.errors import UnknownNameError
from sparseft.modules import ParameterIndex, canonical_name, match_patterns


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("weight", "weight"),
        ("module.encoder.weight", "encoder.weight"),
        ("_orig_mod.encoder.weight", "encoder.weight"),
        ("module._orig_mod.module.weight", "weight"),
        ("layers.0._fsdp_wrapped_module.attn.weight", "layers.0.attn.weight"),
        ("layers.0._checkpoint_wrapped_module.attn.weight", "layers.0.attn.weight"),
        ("encoder.query.base_layer.weight", "encoder.query.weight"),
        ("encoder.module.weight", "encoder.module.weight"),
        ("module", "module"),
    ],
)
def test_canonical_name(name, bare):
    assert canonical_name(name) == bare


class Tied(nn.Module):
    """The head is registered before the embedding it is tied to, as transformers 5 does."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 5)
        self.emb = nn.Embedding(5, 3)
        self.head.weight = self.emb.weight
        self.block = nn.Linear(3, 3)
        self.again = self.block


def test_ties_are_named_after_the_embedding_and_shared_modules_after_the_first():
    model = Tied()
    index = ParameterIndex(model)
    assert index.names == ["emb.weight", "head.bias", "block.weight", "block.bias"]
    assert index.aliases("emb.weight") == ["head.weight"]
    assert index.aliases("block.bias") == ["again.bias"]
    assert index.owners("head.weight") == [(model.emb, "weight"), (model.head, "weight")]
    assert index.owners("again.weight") == [(model.block, "weight")]
    assert index.resolve("head.weight") == "emb.weight"
    assert index.get("again.weight") is model.block.weight
    assert "again.weight" in index
    assert "weight" not in index
    assert dict(index.items())["emb.weight"] is model.emb.weight
    assert len(index) == 4


def test_the_same_names_inside_wrappers():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.module = inner

    names = ParameterIndex(Tied()).names
    assert ParameterIndex(Wrapper(Tied())).names == names
    compiled = torch.compile(Tied(), backend="eager")
    assert ParameterIndex(compiled).names == names
    assert ParameterIndex(Wrapper(compiled)).resolve("module._orig_mod.emb.weight") == "emb.weight"


def test_a_part_called_like_a_wrapper_keeps_its_name():
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2))
    model.module = nn.Module()
    model.module.weight = nn.Parameter(torch.zeros(3))
    index = ParameterIndex(model)
    assert index.names == ["weight", "module.weight"]
    assert index.get("module.weight").shape == (3,)


def test_leaves_are_no_parameters_of_the_model():
    model = Tied()
    names = ParameterIndex(model).names
    with attach(model, {"emb.weight": torch.ones(5, 3) > 0}):
        assert ParameterIndex(model).names == names
        assert len(list(model.named_parameters())) == len(names) + 1


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(UnknownNameError, match=r"no parameter 'blok.weight'.*'block.weight'"):
        ParameterIndex(Tied()).get("blok.weight")


def test_globs():
    names = ["emb.weight", "layer.0.weight", "layer.0.bias", "layer.10.weight"]
    assert match_patterns("layer.*.weight", names) == ["layer.0.weight", "layer.10.weight"]
    assert match_patterns(["layer.1?.*", "emb.weight"], names) == ["emb.weight", "layer.10.weight"]
    assert match_patterns([], names) == []
    with pytest.raises(UnknownNameError, match=r"'layr.\*' matches none of 4 names"):
        match_patterns(["*", "layr.*"], names)
    with pytest.raises(UnknownNameError, match=r"Did you mean 'layer.0.\*'"):
        match_patterns("layer.0", names)


def test_globs_over_an_index_may_speak_of_aliases():
    assert ParameterIndex(Tied()).match("head.*") == ["emb.weight", "head.bias"]
