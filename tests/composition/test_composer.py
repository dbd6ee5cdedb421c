"""What a composer does and says: adapters, coefficients, heads, names, bases."""

from __future__ import annotations

import copy
import logging
import math

import numpy as np
import pytest
import torch
from torch import nn

from sparseft import Composer, SparseDiff
from sparseft.adapter import Adapter
from sparseft.errors import (
    AdapterFormatError,
    BaseMismatchError,
    CompositionError,
    StackOrderError,
    UnknownNameError,
)


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def composer(model, make_adapter):
    return Composer(model, {n: make_adapter(model, i) for i, n in enumerate(("sw", "qu", "nli"))})


class TestAdapters:
    def test_objects_files_and_folders(self, make_model, make_adapter, snapshot, same, tmp_path):
        model, other = make_model(), make_model()
        adapters = {n: make_adapter(model, i) for i, n in enumerate("abc")}
        sources = {
            "a": adapters["a"],
            "b": adapters["b"].save(tmp_path / "b.safetensors"),
            "c": str(adapters["c"].save(tmp_path / "c").parent),
        }
        Composer(model, adapters).apply(list("abc"))
        composer = Composer(other, sources)
        composer.apply(list("abc"))
        assert same(snapshot(model), snapshot(other))
        assert composer.names() == list("abc")

    def test_a_name_is_taken_once(self, composer, model, make_adapter):
        with pytest.raises(CompositionError, match=r"'sw' is here already.*remove\('sw'\)"):
            composer.add("sw", make_adapter(model, 7))
        composer.remove("sw")
        composer.add("sw", make_adapter(model, 7))
        composer.apply("sw")
        with pytest.raises(CompositionError, match="'sw' is active"):
            composer.remove("sw")

    def test_readding_a_name_forgets_the_old_union(self, composer, model, make_adapter, snapshot):
        composer.switch(["sw", "qu"])
        composer.revert()
        composer.remove("sw")
        composer.add("sw", make_adapter(model, 9))
        composer.switch(["sw", "qu"])
        got = snapshot(model)
        composer.revert()
        fresh = Composer(model, {"sw": make_adapter(model, 9), "qu": composer["qu"]})
        fresh.switch(["sw", "qu"])
        assert all(torch.equal(b, got[n]) for n, b in snapshot(model).items())

    def test_missing_file(self, model, tmp_path):
        with pytest.raises(FileNotFoundError, match="no adapter at"):
            Composer(model, {"a": tmp_path / "nothing"})

    def test_damaged_file_is_found_before_the_model_is_touched(
        self, model, make_adapter, snapshot, same, tmp_path
    ):
        path = make_adapter(model, 0).save(tmp_path / "a.safetensors")
        data = bytearray(path.read_bytes())
        data[-3] ^= 0xFF
        path.write_bytes(data)
        base = snapshot(model)
        composer = Composer(model, {"a": path})
        with pytest.raises(AdapterFormatError):
            composer.apply("a")
        assert same(snapshot(model), base)
        assert composer.active == {}

    def test_unknown_names_and_the_nearest(self, composer):
        with pytest.raises(UnknownNameError, match=r"'swa'.*Did you mean 'sw'"):
            composer.apply("swa")
        with pytest.raises(UnknownNameError, match="no composition method 'linaer'.*'linear'"):
            composer.apply("sw", method="linaer")
        with pytest.raises(UnknownNameError, match="'linear' has no option 'density'; it has none"):
            composer.apply("sw", density=0.5)
        with pytest.raises(UnknownNameError, match="None has been added"):
            Composer(nn.Linear(2, 2)).apply("sw")


class TestCoefficients:
    @pytest.mark.parametrize(
        ("which", "coeffs", "active"),
        [
            ("sw", None, {"sw": 1.0}),
            (["sw", "qu"], None, {"sw": 1.0, "qu": 1.0}),
            (["sw", "qu"], 0.5, {"sw": 0.5, "qu": 0.5}),
            (["sw", "qu"], [2, -1], {"sw": 2.0, "qu": -1.0}),
            (("sw", "qu"), {"qu": 3, "sw": 0}, {"sw": 0.0, "qu": 3.0}),
            ({"sw": np.float32(0.5)}, None, {"sw": 0.5}),
            ({"sw": torch.tensor(0.25)}, None, {"sw": 0.25}),
            ([], None, {}),
        ],
    )
    def test_forms(self, composer, which, coeffs, active):
        composer.switch(which, coeffs)
        assert composer.active == active

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39, "1", None, True, 1j])
    def test_only_finite_numbers(self, composer, snapshot, same, bad):
        base = snapshot(composer.model)
        with pytest.raises(CompositionError, match="coefficient of 'qu'"):
            composer.apply({"sw": 1.0, "qu": bad})
        assert same(snapshot(composer.model), base)

    def test_wrong_count(self, composer):
        with pytest.raises(CompositionError, match="3 coefficients were given for 2 adapters"):
            composer.apply(["sw", "qu"], [1, 2, 3])
        with pytest.raises(CompositionError, match="name each adapter once"):
            composer.apply(["sw", "qu"], {"sw": 1})
        with pytest.raises(CompositionError, match="given twice"):
            composer.apply({"sw": 1}, [1])
        with pytest.raises(CompositionError, match="'sw' is named 2 times"):
            composer.apply(["sw", "qu", "sw"])

    @pytest.mark.parametrize(("dtype", "coeff"), [(torch.float32, 3e38), (torch.float16, 1e5)])
    def test_overflow_is_refused_and_leaves_the_model(
        self, make_model, make_adapter, snapshot, same, dtype, coeff
    ):
        model = make_model(dtype)
        composer = Composer(
            model, {n: make_adapter(model, i, scale=3.0) for i, n in enumerate("ab")}
        )
        composer.apply("a")
        before = snapshot(model)
        with pytest.raises(CompositionError, match=f"overflows {dtype}"):
            composer.switch({"a": coeff, "b": coeff})
        assert same(snapshot(model), before)
        assert composer.active == {"a": 1.0}


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
        import sparseft.composition.composer as module

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
        import sparseft.composition.placement as module

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


class TestOtherModels:
    def test_language_adapter_on_a_classifier(self, make_model, make_adapter, caplog):
        """Made under a masked-LM head of its own, which the classifier lacks."""
        model = make_model()
        model.lm_head = nn.Linear(6, 6)
        adapter = make_adapter(model, 0, names=("body.0.weight", "lm_head.weight"))
        del model.lm_head
        composer = Composer(model, {"sw": adapter})
        with caplog.at_level(logging.WARNING):
            composer.apply("sw")
            composer.revert()
            composer.apply("sw")
        assert composer.skipped == {"sw": ("lm_head.weight",)}
        assert len([r for r in caplog.records if "lm_head.weight" in r.message]) == 1
        with pytest.raises(UnknownNameError, match=r"'lm_head.weight'.*missing='skip'"):
            Composer(model, {"sw": adapter}, missing="error").apply("sw")

    def test_a_missing_layer_is_not_a_missing_head(self, make_model, make_adapter):
        model = make_model()
        adapter = make_adapter(model, 0, names=("body.0.weight", "body.2.weight"))
        model.body = model.body[:2]
        composer = Composer(model, {"sw": adapter})
        with pytest.raises(UnknownNameError, match=r"'body.2.weight'.*does not have"):
            composer.apply("sw")
        Composer(model, {"sw": adapter}, missing="skip").apply("sw")

    def test_nothing_fits(self, make_model, make_adapter):
        adapter = make_adapter(make_model(), 0)
        for missing in ("auto", "skip"):
            with pytest.raises(UnknownNameError, match="none of the 5 parameters"):
                Composer(nn.Sequential(nn.Linear(2, 2)), {"a": adapter}, missing=missing).apply("a")

    def test_encoder_with_and_without_a_head(self, make_model, make_adapter):
        class Wrapped(nn.Module):
            base_model_prefix = "net"

            def __init__(self, net):
                super().__init__()
                self.net = net

        class Bare(type(make_model())):
            base_model_prefix = "net"

        plain = make_model()
        adapter = make_adapter(plain, 0)
        base = plain.body[0].weight.detach().clone()
        wrapped = Wrapped(plain)
        Composer(wrapped, {"a": adapter}).apply("a")
        moved = plain.body[0].weight.detach().clone()
        assert not torch.equal(moved, base)

        bare = Bare()
        bare.load_state_dict(make_model().state_dict())
        prefixed = Adapter({f"net.{n}": d for n, d in adapter.diffs.items()})
        Composer(bare, {"a": prefixed}).apply("a")
        assert torch.equal(bare.body[0].weight, moved)

    def test_shape(self, make_model, make_adapter):
        model = make_model()
        adapter = make_adapter(model, 0, fingerprint=False)
        model.body[0] = nn.Linear(6, 9)
        with pytest.raises(BaseMismatchError, match=r"\(8,\).*\(9,\)"):
            Composer(model, {"a": adapter}).apply("a")

    def test_another_base(self, make_model, make_adapter, snapshot, same):
        adapter = make_adapter(make_model(), 0)
        other = make_model(seed=1)
        base = snapshot(other)
        composer = Composer(other, {"a": adapter})
        with pytest.raises(BaseMismatchError, match=r"'a' was made on another base \(net\)") as e:
            composer.apply("a")
        wanted = adapter.metadata.fingerprint.tensors["body.0.bias"].digest[:12]
        assert wanted in str(e.value)
        assert str(e.value).count("digest") == 2
        assert same(snapshot(other), base)
        Composer(other, {"a": adapter}, check_base=False).apply("a")

    def test_a_cast_of_the_base_is_accepted(self, make_model, make_adapter):
        adapter = make_adapter(make_model(), 0)
        Composer(make_model(torch.bfloat16), {"a": adapter}).apply("a")

    def test_quantised_weight(self, make_model, make_adapter):
        model = make_model()
        adapter = make_adapter(model, 0, names=("body.0.weight",), fingerprint=False)
        model.body[0].weight = nn.Parameter(
            torch.zeros(8, 6, dtype=torch.int8), requires_grad=False
        )
        with pytest.raises(CompositionError, match=r"torch.int8.*unquantised"):
            Composer(model, {"a": adapter}).apply("a")

    def test_base_is_read_once_per_tensor(self, composer, monkeypatch):
        import sparseft.composition.fit as module

        read = []
        real = module.fingerprint_tensor
        monkeypatch.setattr(module, "fingerprint_tensor", lambda n, t: read.append(n) or real(n, t))
        composer.apply("sw")
        composer.switch("qu")
        composer.switch(["qu", "nli"])
        assert len(read) == len(set(read)) == 5
