"""Exact bits: against the naive definition, under permutation, after undo, in every dtype."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseft import Composer, SparseDiff, compose_adapters
from sparseft.adapter import Adapter
from sparseft.modules import ParameterIndex

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COEFFS = [1.0, -1.0, 0.5, 0.3, 2.0, -0.7]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def test_matches_the_naive_sum(make_model, make_adapter, naive, snapshot, dtype):
    model = make_model(dtype)
    adapters = {f"n{i}": make_adapter(model, i) for i in range(4)}
    composer = Composer(model, adapters)
    for count in (1, 2, 4):
        names = list(adapters)[:count]
        coeffs = COEFFS[2 : 2 + count]
        wanted = naive(model, [adapters[n] for n in names], coeffs)
        composer.apply(names, coeffs)
        got = snapshot(model)
        for name, expected in wanted.items():
            assert torch.equal(got[name], expected), f"{name} with {count} adapters"
        composer.revert()


def test_the_naive_sum_is_sensitive_to_order(make_model, make_adapter, naive):
    """Else the permutation test could not fail: some order of addition gives other bits."""
    model = make_model()
    adapters = [make_adapter(model, i, name="same", density=0.9, scale=3.0) for i in range(3)]
    plain = naive(model, adapters, [0.3, 0.7, -0.9])
    swapped = [Adapter(a.diffs, name=n) for a, n in zip(adapters, "cab", strict=True)]
    other = naive(model, swapped, [0.3, 0.7, -0.9])
    assert any(not torch.equal(plain[n], other[n]) for n in plain)


def test_call_order_and_composer_names_change_no_bit(make_model, make_adapter, snapshot, same):
    model = make_model()
    adapters = [make_adapter(model, i, name="same", density=0.9, scale=3.0) for i in range(4)]
    coeffs = [0.3, 0.7, -0.9, 1.0]
    results = []
    for order in itertools.permutations(range(4)):
        composer = Composer(
            model, {f"x{position}": adapters[i] for position, i in enumerate(order)}
        )
        composer.apply({f"x{position}": coeffs[i] for position, i in enumerate(order)})
        results.append(snapshot(model))
        composer.revert()
    assert all(same(results[0], r) for r in results[1:])


def test_one_by_one_equals_together(make_model, make_adapter, snapshot, same):
    model = make_model(torch.bfloat16)
    adapters = {f"n{i}": make_adapter(model, i) for i in range(3)}
    composer = Composer(model, adapters)
    composer.apply({"n2": 0.5, "n0": -0.25, "n1": 1})
    together = snapshot(model)
    composer.revert()
    for name, coeff in (("n0", -0.25), ("n1", 1), ("n2", 0.5)):
        composer.apply(name, coeff)
    assert same(snapshot(model), together)
    assert composer.active == {"n0": -0.25, "n1": 1.0, "n2": 0.5}


def test_coefficient_zero_is_the_base(make_model, make_adapter, snapshot, same, dtype):
    model = make_model(dtype)
    base = snapshot(model)
    composer = Composer(
        model, {"a": make_adapter(model, 0, dense=True), "b": make_adapter(model, 1)}
    )
    composer.apply({"a": 0, "b": 0.0})
    assert same(snapshot(model), base)
    composer.switch({"a": 0, "b": 1})
    alone = snapshot(model)
    composer.switch(["b"])
    assert same(snapshot(model), alone)


def test_rebuilds_trained_weights(make_model, snapshot, dtype):
    """One adapter, coefficient 1, own base: W = rn(base + values), bit for bit."""
    model = make_model(dtype)
    generator = torch.Generator().manual_seed(5)
    index = ParameterIndex(model)
    base = index.get("body.0.weight").detach().clone()
    trained = (base.float() + torch.randn(base.shape, generator=generator) * 0.05).to(dtype)
    # What attach holds after training: fp32 values with W = rn(base + values).
    diff = SparseDiff.from_dense(trained.float() - base.float())
    Composer(model, {"a": Adapter({"body.0.weight": diff})}).apply("a")
    wanted = (base.float() + diff.to_dense()).to(dtype)
    assert torch.equal(index.get("body.0.weight"), wanted)
    if dtype != torch.float32:  # narrow weights differ by exactly representable fp32 differences
        assert torch.equal(index.get("body.0.weight"), trained)


def test_set_mode_rebuilds_bit_for_bit(make_model, snapshot, same, dtype):
    model, tuned = make_model(dtype), make_model(dtype, seed=1)
    index = ParameterIndex(tuned)
    diffs = {
        n: SparseDiff.from_dense(p.detach(), torch.ones(p.shape, dtype=torch.bool), "set")
        for n, p in index.items()
    }
    base = snapshot(model)
    composer = Composer(model, {"t": Adapter(diffs)})
    composer.apply("t")
    assert same(snapshot(model), snapshot(tuned))
    composer.revert()
    assert same(snapshot(model), base)


def test_negative_zero_survives_a_diff_of_zero(make_model, snapshot):
    model = make_model()
    pattern = torch.zeros(8, dtype=torch.bool)
    pattern[0] = True
    diff = SparseDiff.from_dense(torch.full((8,), -0.0), pattern)
    with Composer(model, {"a": Adapter({"body.0.bias": diff})}).composed("a"):
        assert torch.signbit(model.body[0].bias[0])


def test_float64_weights_sum_in_float64(make_model, make_adapter):
    model = make_model(torch.float64)
    base = model.body[0].weight.detach().clone()
    value = 1e-12  # lost in fp32 beside a weight of order 0.1
    diff = SparseDiff.from_dense(torch.full((8, 6), value, dtype=torch.float64))
    Composer(model, {"a": Adapter({"body.0.weight": diff})}).apply("a", 3.0)
    assert torch.equal(model.body[0].weight, base + 3.0 * value)


free = st.sampled_from([*COEFFS, 0.0])
coeffs_of = st.fixed_dictionaries(
    # "d" replaces entries, so only 0 and 1 mean something for it.
    {},
    optional={"a": free, "b": free, "c": free, "d": st.sampled_from([0.0, 1.0])},
)
actions = st.sampled_from(["switch", "apply", "revert", "nested"])
steps = st.lists(st.tuples(actions, coeffs_of), max_size=8)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@given(sequence=steps)
@settings(max_examples=25, deadline=None)
def test_any_sequence_reverts_to_the_base(weight_dtype, sequence):
    model, adapters, base, composed = _case(weight_dtype)
    composer = Composer(model, adapters)
    for action, coeffs in sequence:
        if action == "apply":
            composer.apply({n: c for n, c in coeffs.items() if n not in composer.active})
        elif action == "switch":
            composer.switch(coeffs)
        elif action == "revert":
            composer.revert()
        else:
            before, active = _bits(model), composer.active
            with composer.composed(coeffs):
                assert composer.active == coeffs
                composer.switch("a")
            assert composer.active == active
            assert all(torch.equal(before[n], b) for n, b in _bits(model).items())
        wanted = composed(composer.active)
        assert all(torch.equal(wanted[n], b) for n, b in _bits(model).items())
    composer.revert()
    assert composer.active == {}
    assert all(torch.equal(base[n], b) for n, b in _bits(model).items())


def _bits(model):
    width = {2: torch.int16, 4: torch.int32}
    return {
        n: p.detach().clone().view(width[p.element_size()]) for n, p in model.named_parameters()
    }


_CASES: dict = {}


def _case(dtype):
    """Model, adapters ("d" replaces entries and holds a head), base bits, coefficients -> bits."""
    if dtype not in _CASES:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)).to(dtype)
        generator = torch.Generator().manual_seed(1)

        def diff(shape, mode="add"):
            mask = torch.rand(shape, generator=generator) < 0.5
            return SparseDiff.from_dense(torch.randn(shape, generator=generator), mask, mode)

        adapters = {
            n: Adapter({"0.weight": diff((7, 5)), "1.weight": diff((3, 7))}, name=n) for n in "abc"
        }
        adapters["d"] = Adapter(
            {"0.bias": diff((7,), "set")}, name="d", dense={"1.bias": torch.tensor([1.0, -2, 3])}
        )
        _CASES[dtype] = (model, adapters, _bits(model))
    model, adapters, base = _CASES[dtype]
    fresh = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)).to(dtype)
    fresh.load_state_dict(model.state_dict())

    def composed(coeffs):
        """A new model and composer, applied once: what any history must lead to."""
        other = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)).to(dtype)
        other.load_state_dict(model.state_dict())
        Composer(other, adapters).apply(coeffs)
        return _bits(other)

    return fresh, adapters, base, composed


def test_merged_adapter_gives_the_composers_bits(make_model, make_adapter, snapshot, same, dtype):
    model = make_model(dtype)
    adapters = {f"n{i}": make_adapter(model, i, name=f"n{i}") for i in range(3)}
    coeffs = {"n0": 0.3, "n1": -1.7, "n2": 1.0}
    composer = Composer(model, adapters)
    composer.apply(coeffs)
    wanted = snapshot(model)
    composer.revert()
    merged = Composer(model, {"m": compose_adapters(adapters, coeffs)})
    merged.apply("m")
    assert same(snapshot(model), wanted)
