"""Separate mode over linear layers whose weights are not floating: only diffs are added."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparseft import SeparateComposer, SparseDiff
from sparseft.adapter import Adapter
from sparseft.errors import BaseMismatchError, CompositionError


class Int8Linear(nn.Module):
    """As quantisation libraries make them: int8 rows with scales, multiplied out in forward."""

    def __init__(self, linear: nn.Linear, *, buffer: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        packed = (linear.weight.detach() / scale).round().to(torch.int8)
        if buffer:
            self.register_buffer("weight", packed)
        else:
            self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def dequantised(self) -> torch.Tensor:
        return self.weight * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dequantised(), self.bias)


def make_model(buffer: bool) -> nn.Module:
    first, last = nn.Linear(6, 8), nn.Linear(8, 3)
    return nn.Sequential(
        Int8Linear(first, buffer=buffer), nn.ReLU(), Int8Linear(last, buffer=buffer)
    )


def make_adapter(seed: int, mode: str = "add") -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=generator)  # noqa: E731
    return Adapter(
        {
            "0.weight": SparseDiff.from_dense(draw(8, 6) * (draw(8, 6) > 0), mode=mode),
            "0.bias": SparseDiff.from_dense(draw(8)),
            "2.weight": SparseDiff.from_dense(draw(3, 8)),
        },
        name=f"a{seed}",
    )


@pytest.mark.parametrize("buffer", [False, True], ids=["parameter", "buffer"])
def test_rows_equal_the_dequantised_model_with_the_diff_written(buffer):
    torch.manual_seed(0)
    model, adapters = make_model(buffer), {"a": make_adapter(0), "b": make_adapter(1)}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    x = torch.randn(3, 6, requires_grad=True)
    with SeparateComposer(model, adapters) as handle, handle.rows(["a", None, "b"]):
        got = model(x)
        got.square().sum().backward()
    leaf = x.detach().requires_grad_()
    for row, name in enumerate(("a", None, "b")):
        change = adapters[name].diffs if name else {}

        def layer(at, h, change=change):
            weight, bias = model[at].dequantised(), model[at].bias.detach()
            if f"{at}.weight" in change:
                weight = weight + change[f"{at}.weight"].to_dense()
            if f"{at}.bias" in change:
                bias = bias + change[f"{at}.bias"].to_dense()
            return nn.functional.linear(h, weight, bias)

        expected = layer(2, layer(0, leaf[row]).relu())
        torch.testing.assert_close(got[row], expected)
        expected.square().sum().backward()
    torch.testing.assert_close(x.grad, leaf.grad)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("buffer", [False, True], ids=["parameter", "buffer"])
def test_set_entries_are_refused(buffer):
    with SeparateComposer(make_model(buffer), {"s": make_adapter(0, "set")}) as handle:
        with pytest.raises(CompositionError, match=r"'s' replaces.*'0.weight'.*quantised.*int8"):
            handle.switch("s")


class Float8Linear(nn.Linear):
    """As transformers' FP8Linear: a weight of one byte an entry, and a scale."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.scale = linear.weight.detach().abs().max() / torch.finfo(dtype).max
        packed = (linear.weight.detach() / self.scale).to(dtype)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_weights_are_quantised_ones(dtype):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Linear(8, 3)]
    model = nn.Sequential(Float8Linear(layers[0], dtype), nn.ReLU(), Float8Linear(layers[1], dtype))
    adapters, x = {"a": make_adapter(0), "s": make_adapter(1, "set")}, torch.randn(2, 6)
    base = model(x)
    with SeparateComposer(model, adapters) as handle:
        with handle.rows(["a", None]):
            got = model[0](x)
        change = adapters["a"]
        added = nn.functional.linear(x, change["0.weight"].to_dense(), change["0.bias"].to_dense())
        torch.testing.assert_close(got[0], (model[0](x) + added)[0])
        assert torch.equal(model(x), base)
        with pytest.raises(CompositionError, match=r"'s' replaces.*'0.weight'.*float8"):
            handle.switch("s")


def test_a_layer_that_gives_float8_is_refused_by_name():
    table = nn.Embedding(5, 4)
    packed = table.weight.detach().to(torch.float8_e4m3fn)
    table.weight = nn.Parameter(packed, requires_grad=False)
    adapter = Adapter({"weight": SparseDiff.from_dense(torch.ones(5, 4))})
    with SeparateComposer(table, {"a": adapter}) as handle, handle.using("a"):
        with pytest.raises(CompositionError, match=r"'weight'.*gives torch.float8_e4m3fn"):
            table(torch.tensor([[1, 2]]))


def test_shapes_are_checked():
    transposed = Adapter({"0.weight": SparseDiff.from_dense(torch.ones(6, 8))}, name="t")
    with SeparateComposer(make_model(False), {"t": transposed}) as handle:
        with pytest.raises(BaseMismatchError, match=r"'t'.*\(6, 8\).*\(8, 6\)"):
            handle.switch("t")


def test_a_whole_weight_may_replace_a_quantised_one():
    model = make_model(False)
    head = {"2.weight": torch.randn(3, 8), "2.bias": torch.randn(3)}
    hidden = torch.randn(4, 8)
    with SeparateComposer(model, {"h": Adapter({}, name="h", dense=head)}) as handle:
        with handle.using("h"):
            got = model[2](hidden)
    expected = nn.functional.linear(hidden, head["2.weight"], head["2.bias"])
    torch.testing.assert_close(got, expected)
