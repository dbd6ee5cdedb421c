"""Apply, switch, revert and ``composed``: the model in between and after."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparseft import Composer, SparseDiff, attach
from sparseft.adapter import Adapter
from sparseft.errors import CompositionError, StackOrderError, UnknownNameError


class TestApply:
    def test_adding_what_is_active(self, composer):
        composer.apply("sw")
        with pytest.raises(CompositionError, match=r"'sw' is active already.*switch"):
            composer.apply({"sw": 0.5})

    def test_revert_when_nothing_is_active(self, composer, snapshot, same):
        base = snapshot(composer.model)
        composer.revert()
        composer.apply("sw")
        composer.revert()
        composer.revert()
        assert same(snapshot(composer.model), base)

    def test_tied_weights_are_written_once(self, make_model, snapshot):
        """Under either name the diff lands once, and both modules see it."""
        results = []
        for name in ("embed.weight", "head.weight"):
            model = make_model()
            base = model.embed.weight.detach().clone()
            diff = SparseDiff.from_dense(torch.full((11, 6), 0.5))
            Composer(model, {"a": Adapter({name: diff})}).apply("a")
            assert model.head.weight is model.embed.weight
            assert torch.equal(model.embed.weight, base + 0.5)
            results.append(snapshot(model))
        assert all(torch.equal(a, b) for a, b in zip(*(r.values() for r in results), strict=True))

    def test_two_diffs_of_one_tied_weight_are_refused(self, model):
        diff = SparseDiff.from_dense(torch.ones(11, 6))
        composer = Composer(model, {"a": Adapter({"embed.weight": diff, "head.weight": diff})})
        with pytest.raises(CompositionError, match=r"'embed.weight' and 'head.weight'.*tied"):
            composer.apply("a")

    def test_gradients_flow_and_versions_move(self, composer, model):
        composer.apply("sw")
        model(torch.tensor([[1, 2]])).sum().backward()
        assert model.body[0].weight.grad is not None

    def test_a_graph_from_before_is_not_silently_wrong(self, composer, model):
        out = model(torch.tensor([[1, 2]])).sum()
        composer.apply("sw")
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()

    def test_reweighting_rebuilds_no_union(self, composer, monkeypatch):
        import sparseft.composition.planning as module

        built = []
        real = module.plan_tensor
        monkeypatch.setattr(
            module, "plan_tensor", lambda *a, **k: built.append(a[0]) or real(*a, **k)
        )
        composer.switch(["sw", "nli"])
        first = len(built)
        assert first
        composer.switch({"sw": 0.5, "nli": -2})
        composer.switch(["qu"])
        other = len(built)
        composer.switch({"nli": 0.1, "sw": 1})
        assert other > first
        assert len(built) == other, "a set seen before keeps its union"

    def test_reweighting_captures_nothing(self, composer, monkeypatch):
        import sparseft.composition.writer as module

        composer.switch(["sw", "nli"])

        def fail(*args, **kwargs):
            raise RuntimeError("captured again")

        monkeypatch.setattr(module, "gather_entries", fail)
        composer.switch({"sw": 0.5, "nli": -2})
        assert composer.active == {"sw": 0.5, "nli": -2.0}

    def test_cast_while_composed(self, composer, model, snapshot, same):
        base = snapshot(model)
        composer.apply("sw")
        model.to(torch.float64)
        with pytest.raises(CompositionError, match="was torch.float32 when .* is torch.float64"):
            composer.revert()
        model.to(torch.float32)
        composer.revert()
        assert same(snapshot(model), base)

    def test_parameters_replaced_before_use(self, composer, make_model, make_adapter):
        """load_state_dict(assign=True) gives new Parameter objects; the next apply finds them."""
        model = composer.model
        composer.apply("sw")
        composer.revert()
        state = {n: t.clone() for n, t in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        old = model.body[0].weight.detach().clone()
        composer.apply("sw")
        assert not torch.equal(model.body[0].weight, old)
        composer.revert()
        assert torch.equal(model.body[0].weight, old)

    @pytest.mark.parametrize(
        "optimizer",
        [
            lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
            lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
            lambda p: torch.optim.SGD(p, lr=1e-2),
        ],
        ids=["fused", "loop", "sgd"],
    )
    def test_a_dense_step_while_applied_is_refused(
        self, composer, model, snapshot, same, optimizer
    ):
        """Reverting would lose it at the adapters' entries and keep it elsewhere."""
        composer.apply("sw")
        parameters = [p for n, p in model.named_parameters() if n.startswith("body.0")]
        model(torch.tensor([[1, 2, 3]])).square().sum().backward()
        optimizer(parameters).step()
        trained, active = snapshot(model), composer.active
        for step in (composer.revert, lambda: composer.switch("qu"), lambda: composer.apply("qu")):
            with pytest.raises(StackOrderError, match=r"'body.0.*were changed.*sparseft.attach"):
                step()
        assert same(snapshot(model), trained), "nothing is lost: the trained state is still there"
        assert composer.active == active

    def test_a_dense_step_on_a_head_while_applied_is_refused(self, model, make_adapter):
        composer = Composer(model, {"nli": make_adapter(model, 0, names=(), dense=True)})
        composer.apply("nli")
        with torch.no_grad():
            model.classifier.weight.mul_(1.001)
        with pytest.raises(StackOrderError, match="'classifier.weight': its values were changed"):
            composer.revert()

    def test_a_change_that_is_put_back_is_none(self, composer, model, snapshot, same):
        """Weights trained and rewound beneath, or trained by attach and detached."""
        base = snapshot(model)
        composer.apply("sw")
        state = {n: t.clone() for n, t in model.state_dict().items()}
        with torch.no_grad():
            model.body[0].weight.add_(1)
        model.load_state_dict(state)
        composer.switch({"sw": 0.5})
        with attach(model, {"body.0.weight": torch.ones(8, 6, dtype=torch.bool)}) as sparse:
            model(torch.tensor([[1, 2]])).sum().backward()
            torch.optim.SGD(sparse.parameters(), lr=0.1).step()
        composer.switch(["sw", "qu"])
        composer.revert()
        assert same(snapshot(model), base)

    @pytest.mark.parametrize("whole_module", [False, True])
    def test_parameters_replaced_while_applied(self, composer, whole_module):
        """As a resized embedding is: what the base was there is not to be had any more."""
        model = composer.model
        composer.apply("sw")
        if whole_module:
            model.body[0] = copy.deepcopy(model.body[0])
        else:
            model.body[0].weight = nn.Parameter(model.body[0].weight.detach().clone())
        for step in (composer.revert, lambda: composer.switch("qu"), lambda: composer.apply("qu")):
            with pytest.raises(StackOrderError, match="replaced by another object"):
                step()


class TestContexts:
    def test_nested(self, composer, snapshot, same):
        base = snapshot(composer.model)
        composer.apply("nli")
        outer = snapshot(composer.model)
        with composer.composed(["sw", "nli"]) as inside:
            assert inside is composer
            middle = snapshot(composer.model)
            with composer.composed({"qu": 2}):
                assert composer.active == {"qu": 2.0}
                composer.revert()
                assert same(snapshot(composer.model), base)
            assert same(snapshot(composer.model), middle)
        assert same(snapshot(composer.model), outer)
        assert composer.active == {"nli": 1.0}

    def test_exceptions_restore(self, composer, snapshot, same):
        composer.apply("nli")
        before = snapshot(composer.model)
        with pytest.raises(ZeroDivisionError), composer.composed("sw"), composer.composed("qu"):
            raise ZeroDivisionError
        assert same(snapshot(composer.model), before)

    def test_left_out_of_order(self, composer):
        first, second = composer.composed("sw"), composer.composed("qu")
        first.__enter__()
        second.__enter__()
        with pytest.raises(StackOrderError, match="Leave the innermost first"):
            first.__exit__(None, None, None)

    def test_a_bad_switch_opens_no_block(self, composer):
        with pytest.raises(UnknownNameError), composer.composed("nothing"):
            pass
        assert composer.active == {}
        with composer.composed("sw"):
            pass
        assert composer.active == {}
