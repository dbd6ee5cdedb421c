"""What separate mode keeps between blocks, and when it must not: a base that changes or moves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparseft import Adapter, SeparateComposer, SparseDiff
from sparseft.errors import CompositionError


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
