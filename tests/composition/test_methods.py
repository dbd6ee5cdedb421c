"""Conformance of every registered composition method, and the registry itself."""

from __future__ import annotations

import inspect

import pytest
import torch

from sparseft import Composer
from sparseft.composition import Part, Recipe, Rule, Term, methods, register_method
from sparseft.composition.registry import REGISTRY
from sparseft.errors import UnknownNameError
from sparseft.ops.combine import combine

METHODS = sorted(methods())


@pytest.mark.parametrize("method", METHODS)
class TestConformance:
    def test_is_described(self, method):
        entry = methods()[method]
        assert entry.reference.startswith("https://")
        assert entry.summary
        hints = inspect.signature(entry.fn).parameters.values()
        assert all(p.annotation is not p.empty for p in hints)

    def test_one_adapter_is_the_identity(self, method, make_model, make_adapter, naive, snapshot):
        model = make_model()
        adapter = make_adapter(model, 0)
        wanted = naive(model, [adapter], [1.0])
        Composer(model, {"a": adapter}).apply("a", method=method)
        got = snapshot(model)
        assert all(torch.equal(got[n], w) for n, w in wanted.items())

    def test_coefficient_zero_is_the_base(self, method, make_model, make_adapter, snapshot, same):
        model = make_model()
        base = snapshot(model)
        adapters = {n: make_adapter(model, i) for i, n in enumerate("abc")}
        Composer(model, adapters).apply(dict.fromkeys("abc", 0), method=method)
        assert same(snapshot(model), base)

    def test_a_zero_coefficient_is_as_if_absent(
        self, method, make_model, make_adapter, snapshot, same
    ):
        model = make_model()
        adapters = {n: make_adapter(model, i) for i, n in enumerate("abc")}
        composer = Composer(model, adapters)
        composer.switch({"a": 0.5, "b": -1}, method=method)
        wanted = snapshot(model)
        composer.switch({"a": 0.5, "b": -1, "c": 0}, method=method)
        assert same(snapshot(model), wanted)

    def test_permutations_give_the_same_bits(
        self, method, make_model, make_adapter, snapshot, same
    ):
        model = make_model()
        adapters = {n: make_adapter(model, i, name="x", scale=3.0) for i, n in enumerate("abc")}
        results = []
        for names in ("abc", "bca", "cba"):
            composer = Composer(model, {n: adapters[n] for n in names})
            composer.apply({n: {"a": 0.3, "b": -1.1, "c": 1}[n] for n in names}, method=method)
            results.append(snapshot(model))
            composer.revert()
        assert same(results[0], results[1])
        assert same(results[0], results[2])

    def test_inputs_are_not_changed(self, method):
        recipe = methods()[method].fn()
        values = [torch.randn(4), torch.randn(3)]
        positions = torch.tensor([0, 2, 4], dtype=torch.int32)
        first = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
        before = [v.clone() for v in values]
        out = combine(
            [Term(0.5, values[0], first), Term(2.0, values[1], positions)], 5, recipe.rule
        )
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
        from sparseft import Adapter, SparseDiff

        module = torch.nn.Module()
        module.w = torch.nn.Parameter(torch.zeros(shape))
        mask = torch.ones(shape, dtype=torch.bool)
        diff = SparseDiff.from_dense(torch.full(shape, 2.0), mask)
        composer = Composer(module, {"a": Adapter({"w": diff})})
        composer.apply("a", method=method)
        assert torch.equal(module.w, torch.full(shape, 2.0))
        composer.revert()
        assert torch.equal(module.w, torch.zeros(shape))


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
