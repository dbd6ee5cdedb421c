"""What replaces rather than adds: diffs of mode "set", and heads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparseft import Composer, SparseDiff
from sparseft.adapter import Adapter
from sparseft.errors import BaseMismatchError, CompositionError, UnknownNameError


class TestSetMode:
    @pytest.fixture
    def diffs(self):
        low = torch.tensor([True] * 4 + [False] * 4)
        return {
            "low": Adapter(
                {"body.0.bias": SparseDiff.from_dense(torch.full((8,), 2.0), low, "set")},
                name="low",
            ),
            "high": Adapter(
                {"body.0.bias": SparseDiff.from_dense(torch.full((8,), 3.0), ~low, "set")},
                name="high",
            ),
            "all": Adapter(
                {"body.0.bias": SparseDiff.from_dense(torch.full((8,), 3.0), mode="set")},
                name="all",
            ),
            "add": Adapter({"body.0.bias": SparseDiff.from_dense(torch.full((8,), 0.5))}, name="x"),
        }

    def test_replaces_then_adds(self, model, diffs):
        composer = Composer(model, diffs)
        composer.apply({"low": 1, "add": 2})
        base = torch.zeros(8)
        composer.revert()
        base.copy_(model.body[0].bias.detach())
        composer.apply({"add": 2, "low": 1})
        assert torch.equal(model.body[0].bias[:4], torch.full((4,), 3.0))
        assert torch.equal(model.body[0].bias[4:], base[4:] + 1.0)

    def test_apart_or_equal_entries_do_not_clash(self, model, diffs):
        composer = Composer(model, diffs)
        composer.apply(["low", "high"])
        assert model.body[0].bias.tolist() == [2.0] * 4 + [3.0] * 4
        composer.switch(["high", "all"])  # 3 and 3 on the upper half
        assert model.body[0].bias.tolist() == [3.0] * 8

    def test_contradiction(self, model, diffs, snapshot, same):
        composer = Composer(model, diffs)
        base = snapshot(model)
        with pytest.raises(CompositionError, match=r"'all' and 'low'.*entry 0 of 'body.0.bias'"):
            composer.apply(["low", "all"])
        assert same(snapshot(model), base)
        composer.apply({"low": 1, "all": 0})
        assert model.body[0].bias.tolist()[:4] == [2.0] * 4

    def test_coefficient_has_no_meaning(self, model, diffs):
        with pytest.raises(CompositionError, match=r"'low' replaces entries.*coefficient 0.5"):
            Composer(model, diffs).apply({"low": 0.5})


class TestHeads:
    def test_loaded_and_restored(self, model, make_adapter, snapshot, same):
        adapter = make_adapter(model, 0, dense=True)
        base = snapshot(model)
        composer = Composer(model, {"nli": adapter, "sw": make_adapter(model, 1)})
        composer.apply(["nli", "sw"], [0.5, 1])
        # A head is taken whole, whatever the coefficient.
        assert torch.equal(model.classifier.weight, adapter.dense["classifier.weight"])
        composer.switch("sw")
        assert same({"c": snapshot(model)["classifier.weight"]}, {"c": base["classifier.weight"]})
        composer.switch({"nli": 0})
        assert same(snapshot(model), base)
        composer.revert()
        assert same(snapshot(model), base)

    def test_skip(self, model, make_adapter, snapshot):
        before = snapshot(model)["classifier.weight"]
        composer = Composer(model, {"nli": make_adapter(model, 0, dense=True)}, dense="skip")
        composer.apply("nli")
        assert torch.equal(snapshot(model)["classifier.weight"], before)

    def test_absent_in_the_model(self, make_model, make_adapter):
        model = make_model()
        adapter = make_adapter(model, 0, dense=True)
        del model.classifier
        composer = Composer(model, {"nli": adapter})
        composer.apply("nli")
        assert composer.skipped == {"nli": ("classifier.bias", "classifier.weight")}
        with pytest.raises(UnknownNameError, match="dense tensor of 'classifier.bias'"):
            Composer(model, {"nli": adapter}, dense="require").apply("nli")

    def test_another_label_count(self, make_model, make_adapter, snapshot, same):
        model = make_model()
        adapter = make_adapter(model, 0, dense=True)
        model.classifier = nn.Linear(6, 2)
        base = snapshot(model)
        composer = Composer(model, {"nli": adapter})
        with pytest.raises(BaseMismatchError, match=r"\(3,\).*\(2,\).*dense='skip'"):
            composer.apply("nli")
        assert same(snapshot(model), base)

    def test_two_heads(self, model, make_adapter):
        one, other = make_adapter(model, 0, dense=True), make_adapter(model, 1, dense=True)
        composer = Composer(model, {"nli": one, "ner": other, "again": one})
        with pytest.raises(CompositionError, match="both hold all of 'classifier.bias'"):
            composer.apply(["nli", "ner"])
        composer.apply({"nli": 1, "ner": 0})
        composer.switch(["nli", "again"])
        assert torch.equal(model.classifier.bias, one.dense["classifier.bias"])

    def test_head_and_diff_of_it(self, model, make_adapter):
        diff = SparseDiff.from_dense(torch.ones(3, 6))
        composer = Composer(
            model,
            {"nli": make_adapter(model, 0, dense=True), "x": Adapter({"classifier.weight": diff})},
        )
        with pytest.raises(CompositionError, match="the two cannot be active together"):
            composer.apply(["nli", "x"])

    def test_unknown_choice(self, model):
        with pytest.raises(CompositionError, match=r"dense='requier'.*Did you mean 'require'"):
            Composer(model, dense="requier")
        with pytest.raises(CompositionError, match="missing='no' is not one of"):
            Composer(model, missing="no")
