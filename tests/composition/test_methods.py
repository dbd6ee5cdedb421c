"""Conformance of every registered composition method, and the registry itself."""

from __future__ import annotations

import inspect
from itertools import permutations

import pytest
import torch
from torch import nn

from sparseft import Adapter, Composer, SparseDiff
from sparseft.composition import (
    Part,
    Recipe,
    Rule,
    Term,
    compose_adapters,
    methods,
    register_method,
)
from sparseft.composition.registry import REGISTRY
from sparseft.errors import UnknownNameError
from sparseft.ops.combine import combine

METHODS = sorted(methods())

# Options under which a method does something to every adapter. A new method needs a line here.
ACTIVE = {
    "linear": {},
    "ties": {"density": 0.5, "vote": "count", "mean": "weights"},
    "dare_linear": {"density": 0.5, "seed": 3},
    "dare_ties": {"density": 0.7, "seed": -1, "mean": "none"},
    "breadcrumbs": {"density": 0.6, "gamma": 0.2},
    "della": {"density": 0.5, "epsilon": 0.3, "seed": 2**70},
    "magnitude_max": {},
    "consensus": {"least": 1, "strength": 0.6},
}
CASES = [pytest.param(m, {}, id=m) for m in METHODS] + [
    pytest.param(m, ACTIVE[m], id=f"{m}-active") for m in METHODS if ACTIVE.get(m)
]
COEFFS = {"a": 0.3, "b": -1.1, "c": 1}


def test_every_method_is_covered():
    assert set(ACTIVE) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
class TestConformance:
    def test_is_described(self, method):
        entry = methods()[method]
        assert entry.reference.startswith("https://")
        assert entry.summary.endswith(".")
        parameters = inspect.signature(entry.fn).parameters.values()
        assert all(p.annotation is not p.empty for p in parameters)
        assert all(p.kind is p.KEYWORD_ONLY for p in parameters)
        assert not entry.required  # every method runs as it is
        documented = inspect.getdoc(entry.fn)
        assert all(option in documented for option in entry.options)

    def test_one_adapter_is_the_identity(self, method, make_model, make_adapter, naive, snapshot):
        model = make_model()
        adapter = make_adapter(model, 0)
        wanted = naive(model, [adapter], [1.0])
        composer = Composer(model, {"a": adapter})
        options = methods()[method].options
        for chosen in ({}, {"density": 1}, {"density": 1.0, "seed": 7}):
            composer.switch("a", method=method, **{k: v for k, v in chosen.items() if k in options})
            got = snapshot(model)
            assert all(torch.equal(got[n], w) for n, w in wanted.items())

    def test_inputs_are_not_changed(self, method):
        recipe = methods()[method].fn()
        values = [torch.randn(4), torch.randn(3)]
        positions = torch.tensor([0, 2, 4], dtype=torch.int32)
        first = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
        before = [v.clone() for v in values]
        terms = [Term(0.5, values[0], first), Term(2.0, values[1], positions)]
        own = not isinstance(recipe.rule, Rule)  # a function of the method's
        out = recipe.rule(terms, 5) if own else combine(terms, 5, recipe.rule)
        assert out.shape == (5,)
        assert out.dtype == torch.float32
        if recipe.prepare is not None:
            for v in values:
                at = torch.arange(len(v), dtype=torch.int32)
                recipe.prepare(Part(at, v, torch.Size((2, 3)), "w", "00" * 16))
        assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))
        assert all(out.data_ptr() != v.data_ptr() for v in values)

    @pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 1, 2)], ids=str)
    def test_any_shape(self, method, shape):
        module = torch.nn.Module()
        module.w = torch.nn.Parameter(torch.zeros(shape))
        mask = torch.ones(shape, dtype=torch.bool)
        diff = SparseDiff.from_dense(torch.full(shape, 2.0), mask)
        composer = Composer(module, {"a": Adapter({"w": diff})})
        composer.apply("a", method=method)
        assert torch.equal(module.w, torch.full(shape, 2.0))
        composer.revert()
        assert torch.equal(module.w, torch.zeros(shape))


@pytest.mark.parametrize(("method", "options"), CASES)
class TestProperties:
    def test_coefficient_zero_is_the_base(
        self, method, options, make_model, make_adapter, snapshot, same
    ):
        model = make_model()
        base = snapshot(model)
        adapters = {n: make_adapter(model, i) for i, n in enumerate("abc")}
        Composer(model, adapters).apply(dict.fromkeys("abc", 0), method=method, **options)
        assert same(snapshot(model), base)

    def test_a_zero_coefficient_is_as_if_absent(
        self, method, options, make_model, make_adapter, snapshot, same
    ):
        model = make_model()
        adapters = {n: make_adapter(model, i) for i, n in enumerate("abc")}
        composer = Composer(model, adapters)
        for others in ({"a": 0.5, "b": -1}, {"b": 1}):
            composer.switch(others, method=method, **options)
            wanted = snapshot(model)
            composer.switch({**others, "c": 0}, method=method, **options)
            assert same(snapshot(model), wanted)

    def test_permutations_give_the_same_bits(
        self, method, options, make_model, make_adapter, snapshot, same
    ):
        model = make_model()
        adapters = {n: make_adapter(model, i, name="x", scale=3.0) for i, n in enumerate("abc")}
        results = []
        for names in permutations("abc"):
            composer = Composer(model, {n: adapters[n] for n in names})
            composer.apply({n: COEFFS[n] for n in names}, method=method, **options)
            results.append(snapshot(model))
            composer.revert()
        assert all(same(results[0], other) for other in results[1:])

    def test_undo_is_exact(self, method, options, make_model, make_adapter, snapshot, same):
        model = make_model(torch.bfloat16)
        base = snapshot(model)
        composer = Composer(model, {n: make_adapter(model, i) for i, n in enumerate("abc")})
        composer.apply(COEFFS, method=method, **options)
        assert not same(snapshot(model), base)
        composer.switch({"b": 2, "c": 1}, method=method, **options)
        composer.revert()
        assert same(snapshot(model), base)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_the_merged_adapter_gives_what_the_composer_gives(
        self, method, options, dtype, make_model, make_adapter, snapshot, same
    ):
        model = make_model(dtype)
        adapters = {n: make_adapter(model, i, dtype=dtype) for i, n in enumerate("abc")}
        composer = Composer(model, adapters)
        composer.apply(COEFFS, method=method, **options)
        wanted = snapshot(model)
        composer.revert()
        merged = compose_adapters(adapters, COEFFS, method=method, **options)
        assert all(d.values.dtype == torch.float32 for d in merged.diffs.values())
        Composer(model, {"merged": merged}).apply("merged")
        assert same(snapshot(model), wanted)

    def test_what_is_drawn_for_one_adapter_does_not_depend_on_others(
        self, method, options, make_model, make_adapter
    ):
        model = make_model()
        ours = make_adapter(model, 0, names=("body.0.weight", "body.2.weight"), density=0.9)
        other = make_adapter(model, 1, names=("embed.weight", "body.1.weight"))
        options = {**options, "least": 1} if method == "consensus" else options
        alone = compose_adapters([ours], method=method, **options)
        for adapters in ([ours, other], [other, ours], {"z": ours, "y": other}):
            beside = compose_adapters(adapters, method=method, **options)
            assert all(beside[name].equals(alone[name]) for name in ours.diffs)

    def test_names_and_places_change_nothing(
        self, method, options, make_model, make_adapter, snapshot, same
    ):
        """Another name in the composer, a wrapped model, strided weights."""
        model = make_model()
        adapters = [make_adapter(model, i) for i in range(2)]
        Composer(model, dict(zip("ab", adapters, strict=True))).apply(
            ["a", "b"], method=method, **options
        )
        wanted = snapshot(model)

        wrapped = nn.Module()
        wrapped.base_model_prefix = "inner"
        wrapped.inner = make_model()
        weight = wrapped.inner.body[0].weight
        weight.data = weight.data.t().contiguous().t()
        composer = Composer(wrapped, dict(zip("yx", adapters, strict=True)))
        composer.apply(["x", "y"], method=method, **options)
        assert same(snapshot(wrapped.inner), wanted)

    def test_replaced_entries_are_left_alone(
        self, method, options, make_model, make_adapter, snapshot, same
    ):
        model = make_model()
        composer = Composer(model, {"a": make_adapter(model, 0, mode="set")})
        composer.apply("a")
        wanted = snapshot(model)
        composer.switch("a", method=method, **options)
        assert same(snapshot(model), wanted)

    def test_the_record_repeats_the_result(
        self, method, options, make_model, make_adapter, tmp_path
    ):
        model = make_model()
        adapters = [make_adapter(model, i) for i in range(3)]
        first = compose_adapters(adapters, [1, 0.5, -2], method=method, **options)
        first.save(tmp_path / "merged")
        record = Adapter.load(tmp_path / "merged").metadata.extra["composition"]
        assert record["method"] == method
        assert record["options"] == {**methods()[method].options, **options}
        again = compose_adapters(
            {part["name"]: adapters[int(part["name"][1:])] for part in record["adapters"]},
            {part["name"]: part["coeff"] for part in record["adapters"]},
            method=record["method"],
            **record["options"],
        )
        assert again.equals(first)

    def test_from_disk_as_in_memory(self, method, options, make_model, make_adapter, tmp_path):
        model = make_model()
        adapters = {n: make_adapter(model, i, name=n) for i, n in enumerate("ab")}
        for name, adapter in adapters.items():
            adapter.save(tmp_path / name)
        paths = {name: tmp_path / name for name in adapters}
        wanted = compose_adapters(adapters, method=method, **options)
        assert compose_adapters(paths, method=method, **options).equals(wanted)

    def test_nothing_of_the_weight_s_size_is_made(self, method, options):
        """A weight of 2**44 entries, adapters of 300: anything dense would not fit in memory."""
        adapters = []
        for i in range(2):
            generator = torch.Generator().manual_seed(i)
            at = torch.arange(300) * (2**35 + i % 2) + 5
            values = torch.randn(300, generator=generator)
            diff = SparseDiff(at, values, torch.Size((2**22, 2**22)))
            adapters.append(Adapter({"w": diff}, name=f"a{i}"))
        merged = compose_adapters(adapters, [1, 0.5], method=method, **options)
        assert 1 <= merged["w"].nnz <= 600
        assert merged["w"].shape == (2**22, 2**22)

    @pytest.mark.parametrize("shape", [(), (1,), (0,), (1, 1), (3, 0), (3, 1, 2)], ids=str)
    def test_small_shapes(self, method, options, shape):
        mask = torch.ones(shape, dtype=torch.bool)
        diff = SparseDiff.from_dense(torch.full(shape, 2.0), mask)
        adapters = [Adapter({"w": diff}, name=n) for n in "ab"]
        merged = compose_adapters(adapters, method=method, **options)
        assert merged["w"].shape == shape
        assert merged["w"].nnz <= diff.nnz

    def test_double_values_stay_double(self, method, options, make_model, make_adapter):
        model = make_model(torch.float64)
        adapters = [make_adapter(model, i, dtype=torch.float64) for i in range(2)]
        merged = compose_adapters(adapters, method=method, **options)
        assert all(d.values.dtype == torch.float64 for d in merged.diffs.values())


def test_a_plugged_in_method_is_found(make_model, make_adapter):
    model = make_model()
    base = model.body[0].weight.detach().clone()

    @register_method("nothing", reference="https://example.org")
    def compose_nothing(*, shift: float = 0.0) -> Recipe:
        """Add a constant."""
        return Recipe(rule=lambda terms, size: torch.full((size,), shift))

    try:
        composer = Composer(model, {"a": make_adapter(model, 0)})
        composer.apply("a", method="nothing")
        assert torch.equal(model.body[0].weight, base)
        composer.switch("a", method="nothing", shift=1.0)
        moved = model.body[0].weight != base
        assert int(moved.sum()) == composer["a"]["body.0.weight"].nnz
        with pytest.raises(
            ValueError, match=r"active together share one method|'nothing' is active"
        ):
            composer.add("b", make_adapter(model, 1)) or composer.apply("b")
        with pytest.raises(UnknownNameError, match="no option 'shfit'; it has shift. Did you mean"):
            composer.switch("a", method="nothing", shfit=1.0)
        with pytest.raises(ValueError, match="registered already"):
            register_method("nothing", reference="https://example.org")(lambda: Recipe())
    finally:
        REGISTRY.unregister("nothing")
    assert "nothing" not in methods()


def test_linear_rounds_product_and_sum_apart():
    """A fused multiply-add would give another last bit; values are chosen so that it shows."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4096, generator=generator) for _ in range(2))
    got = combine([Term(1.0, a, None), Term(0.3, b, None)], 4096, Rule("sum"))
    coeff = torch.tensor(0.3)
    assert torch.equal(got, a + coeff * b)
    fused = (a.double() + coeff.double() * b.double()).float()
    assert not torch.equal(got, fused)
