"""What separate mode keeps between blocks, and when it must not: a base that changes or moves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparseft import Adapter, SeparateComposer, SparseDiff
from sparseft.errors import CompositionError
from sparseft.modules import separate as modules_separate
from sparseft.ops import _streams
from sparseft.ops._csr import csr_of


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3).to(dtype)


def setting(**entries: float) -> Adapter:
    """Replaces the first entry of each of some tensors."""
    shapes = {"weight": (3, 4), "bias": (3,)}
    diffs = {
        name: SparseDiff(torch.tensor([0], dtype=torch.int32), torch.tensor([value]),
                         shapes[name], "set")
        for name, value in entries.items()
    }  # fmt: skip
    return Adapter(diffs, name="s")


def dense(weight: float, bias: float = 0.0) -> Adapter:
    head = {"weight": torch.full((3, 4), weight), "bias": torch.full((3,), bias)}
    return Adapter({}, name="h", dense=head)


# The base changes under what was kept.

CHANGES = {
    "filled": lambda m: [p.fill_(100.0) for p in m.parameters()],
    "loaded": lambda m: m.load_state_dict({n: t + 7 for n, t in m.state_dict().items()}),
    "one entry": lambda m: m.weight.view(-1)[:1].fill_(3.0),
    "data": lambda m: setattr(m.weight, "data", m.weight + 1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_set_entries_are_put_into_the_base_of_now(change):
    model, x = linear(), torch.randn(2, 4)
    with SeparateComposer(model, {"s": setting(weight=5.0, bias=-2.0)}) as handle:
        with handle.using("s"):
            model(x)
        with torch.no_grad():
            change(model)
        weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
        weight[0, 0], bias[0] = 5.0, -2.0
        expected = nn.functional.linear(x, weight, bias)
        with handle.using("s"):
            torch.testing.assert_close(model(x), expected)
        with handle.rows(["s", None]):
            torch.testing.assert_close(model(x)[0], expected[0])


def test_set_deltas_are_kept_while_the_base_is_the_same():
    model = linear()
    with SeparateComposer(model, {"s": setting(weight=5.0)}) as handle:
        with handle.using("s"):
            first = handle._open[0].blends[0]["weight"]
        with handle.using("s"):
            assert handle._open[0].blends[0]["weight"] is first


KINDS = {
    "head": dense(0.1, 0.2),
    "sum": Adapter({"weight": SparseDiff.from_dense(torch.full((3, 4), 0.1))}, name="h"),
}


@pytest.mark.parametrize("adapter", KINDS.values(), ids=KINDS)
def test_what_was_kept_follows_the_model_to_another_dtype_and_device(adapter):
    """`Module.to` keeps the parameter objects, so nothing else tells that they moved."""
    model, x = linear(), torch.ones(2, 4)
    with SeparateComposer(model, {"h": adapter}) as handle:

        def now():
            with handle.using("h"):
                model(x.to(model.weight.dtype))
                delta = handle._open[0].blends[0]["weight"]
            return delta, delta.values if delta.replaced is None else delta.replaced

        assert now()[1].dtype == torch.float32
        model.double()
        delta, held = now()
        assert delta.dtype == torch.float64
        if delta.replaced is not None:
            assert held.dtype == torch.float64
        object.__setattr__(delta, "indices", delta.indices.to("meta"))  # as if made elsewhere
        again, held = now()
        assert again is not delta
        assert held.device.type == again.indices.device.type == "cpu"


# Values that the model's dtype cannot hold.


@pytest.mark.parametrize(("weight", "bias", "name"), [(1e30, 0.0, "weight"), (1.0, 1e30, "bias")])
def test_a_head_that_overflows_is_refused_by_name(weight, bias, name):
    model = linear(torch.float16)
    with SeparateComposer(model, {"h": dense(weight, bias), "ok": dense(2.0)}) as handle:
        with pytest.raises(CompositionError, match=rf"'h'.*'{name}'.*torch.float16.*dense='skip'"):
            handle.switch("h")
        assert handle.active == {}
        with handle.using("ok"):
            assert model(torch.ones(1, 4).half()).eq(8).all()


@pytest.mark.parametrize("mode", ["add", "set"])
def test_entries_that_overflow_are_refused_by_name(mode):
    diff = SparseDiff.from_dense(torch.full((3, 4), 1e30), mode=mode)
    with SeparateComposer(linear(torch.float16), {"a": Adapter({"weight": diff})}) as handle:
        with pytest.raises(CompositionError, match=r"'weight' overflows torch.float16"):
            handle.switch("a")


# Threads with streams of their own: what one of them made is not freed while another reads it.


def test_readers_on_every_stream_are_told_to_the_allocator_once(monkeypatch):
    model, x = nn.Sequential(linear(), nn.LayerNorm(3)), torch.randn(2, 4)
    diff = lambda *shape: SparseDiff.from_dense(torch.ones(shape))  # noqa: E731
    adapter = Adapter({"0.weight": diff(3, 4), "0.bias": diff(3), "1.weight": diff(3)})
    stream, told = [7], []
    monkeypatch.setattr(_streams, "stream_of", lambda device: stream[0])
    monkeypatch.setattr(_streams, "_record", lambda tensor: told.append(tensor))
    with SeparateComposer(model, {"a": adapter}) as handle, handle.rows([None, "a"]):
        applied = handle._open[0]
        seen = []
        for stream[0] in (7, 7, 8, 8):
            told.clear()
            model(x)
            seen.append({id(t) for t in told})
        blend = applied.blends[1]
        weight, bias = blend["0.weight"], blend["0.bias"]
        csr = csr_of(weight.indices, 3, 4, transposed=False)
        order = [t for made, each, _ in applied._orders.values() for t in (made.order, *each)]
    read = [weight.indices, weight.values, bias.spread, csr.offsets, csr.inputs, *order]
    assert seen[1] == seen[3] == set()
    assert seen[0] == seen[2]
    assert {id(t) for t in read} <= seen[0]


def test_dense_changes_are_made_with_the_composition_not_in_the_first_forward():
    model = linear()
    adapter = Adapter({"bias": SparseDiff.from_dense(torch.tensor([0.0, 2.0, 0.0]))})
    with SeparateComposer(model, {"a": adapter}) as handle, handle.using("a"):
        delta = handle._open[0].blends[0]["bias"]
        assert torch.equal(delta.spread, torch.tensor([0.0, 2.0, 0.0]))
        assert delta.vector(model.bias) is delta.spread


def test_operands_have_the_same_addresses_in_every_forward(monkeypatch):
    """The kernels' tables are kept by address; a row without a bias diff needs none."""
    model, x, calls = linear(), torch.randn(3, 4), []
    full = {"weight": SparseDiff.from_dense(torch.ones(3, 4))}
    both = {**full, "bias": SparseDiff.from_dense(torch.ones(3))}
    original = modules_separate.segment_spmm

    def spy(*args):
        calls.append([t for a in args[2:5] for t in a])
        return original(*args)

    monkeypatch.setattr(modules_separate, "segment_spmm", spy)
    adapters = {"w": Adapter(full), "b": Adapter(both)}
    with SeparateComposer(model, adapters) as handle, handle.rows(["w", "b", None]):
        got = model(x)
        model(x)
        with handle.using("b"):
            assert torch.equal(model(x)[1], got[1])
        with handle.using("w"):
            assert torch.equal(model(x)[0], got[0])
    first, again, *_ = calls
    assert all(a is b for a, b in zip(first, again, strict=True))
