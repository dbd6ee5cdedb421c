"""A `Composer` whose parameters the kernels write: the same bits as by torch operations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparseft import Adapter, Composer, SparseDiff, ops
from sparseft.composition import methods
from sparseft.composition.writer import PackedWriter
from sparseft.errors import CompositionError, StackOrderError

pytestmark = pytest.mark.usefixtures("poisoned_launcher")
LANES = [
    pytest.param("cpu", marks=pytest.mark.interpret, id="interpret"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]


def make_model(device, dtype=torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(60, 16), nn.Linear(16, 40), nn.LayerNorm(40), nn.Linear(40, 4)
    )
    return model.to(device=device, dtype=dtype)


def make_adapter(model, seed, *, mode="add", share=0.2, names=None) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    diffs = {}
    for name, p in model.named_parameters():
        if names is not None and name not in names:
            continue
        mask = torch.rand(p.shape, generator=g) < share
        delta = torch.randn(p.shape, generator=g)
        if mode == "set":
            delta = delta.to(p.dtype)
        diffs[name] = SparseDiff.from_dense(delta, mask, mode=mode)
    return Adapter(diffs, name=f"a{seed}")


def snapshot(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[n].view(torch.int16), b[n].view(torch.int16)) for n in a)


@pytest.fixture(params=LANES)
def model(request):
    with ops.backend("triton"):
        yield make_model(request.param)


@pytest.mark.parametrize("method", sorted(methods()))
def test_the_same_bits_as_torch(model, method):
    adapters = {f"x{i}": make_adapter(model, i) for i in range(3)}
    composer, base = Composer(model, adapters), snapshot(model)
    steps = [{"x0": 1.0}, {"x0": 0.5, "x1": -1.0, "x2": 2.0}, {"x0": 0.0, "x1": 1.0, "x2": 1.0}]
    found = []
    for coeffs in steps:
        composer.switch(coeffs, method=method)
        assert all(isinstance(w, PackedWriter) for w in composer._placement._writers)
        found.append(snapshot(model))
    composer.revert()
    assert same(snapshot(model), base)
    with ops.backend("reference"):
        plain = Composer(model, adapters)
        for coeffs, got in zip(steps, found, strict=True):
            plain.switch(coeffs, method=method)
            assert same(snapshot(model), got)
        plain.revert()


def test_set_entries_beside_added_ones(model):
    adapters = {
        "set": make_adapter(model, 0, mode="set"),
        "add": make_adapter(model, 1),
        "few": make_adapter(model, 2, names=("1.weight",)),
    }
    composer, base = Composer(model, adapters), snapshot(model)
    found = []
    for coeffs in (
        {"set": 1, "add": 0.5},
        {"set": 0, "add": 0.5},
        {"set": 1},
        {"few": 2, "set": 1},
    ):
        composer.switch(coeffs)
        found.append((coeffs, snapshot(model)))
    composer.revert()
    assert same(snapshot(model), base)
    with ops.backend("reference"):
        plain = Composer(model, adapters)
        for coeffs, got in found:
            plain.switch(coeffs)
            assert same(snapshot(model), got), coeffs
        plain.revert()


def test_two_dtypes_are_two_launches(model, monkeypatch):
    model[1].float()
    launched = []
    import sparseft.composition.writer as writer

    real = writer.compose_many_
    monkeypatch.setattr(
        writer, "compose_many_", lambda w, *a, **k: (launched.append(len(w)), real(w, *a, **k))[1]
    )
    composer, base = Composer(model, {"a": make_adapter(model, 0)}), snapshot(model)
    composer.switch("a")
    assert sorted(launched) == [2, 5]
    composer.switch({"a": 0.5})
    assert sorted(launched) == [2, 2, 5, 5]
    composer.revert()
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())


def test_an_overflow_leaves_the_model_as_it_was(model):
    model.half()
    huge = make_adapter(model, 1)
    composer = Composer(model, {"a": make_adapter(model, 0), "b": huge})
    composer.switch("a")
    before = snapshot(model)
    with pytest.raises(CompositionError, match=r"overflows torch.float16 .* nothing was written"):
        composer.switch({"a": 1e6, "b": 1e6})
    assert same(snapshot(model), before)
    with pytest.raises(CompositionError, match="overflows"):
        composer.switch({"a": 1e6})
    assert same(snapshot(model), before)
    assert composer.active == {"a": 1.0}


def test_a_dense_step_is_noticed_and_the_base_loaded_again_accepted(model):
    composer = Composer(model, {"a": make_adapter(model, 0)})
    base = snapshot(model)
    composer.switch("a")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    with pytest.raises(StackOrderError, match="its values were changed"):
        composer.switch({"a": 0.5})
    model.load_state_dict(base)
    composer.revert()
    assert same(snapshot(model), base)


@pytest.mark.parametrize("at", ["before", "after"])
@pytest.mark.parametrize("function", ["compose_many_", "restore_many_", "capture_many"])
def test_a_failure_at_any_launch_leaves_no_trace(model, monkeypatch, function, at):
    import sparseft.composition.writer as writer

    adapters = {"a": make_adapter(model, 0), "b": make_adapter(model, 1, names=("1.weight",))}
    composer = Composer(model, adapters)
    composer.switch("b")
    composer.switch("a")
    before = snapshot(model)
    real, left = getattr(writer, function), [1]

    def broken(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0 and at == "before":
            raise KeyboardInterrupt
        out = real(*args, **kwargs)
        if left[0] == 0:
            raise KeyboardInterrupt
        return out

    for change in (
        lambda: composer.switch("b"),
        lambda: composer.switch({"a": 0.5}),
        composer.revert,
    ):
        left[0] = 1
        with monkeypatch.context() as patch:
            patch.setattr(writer, function, broken)
            try:
                change()
            except KeyboardInterrupt:
                assert same(snapshot(model), before)
                assert composer.active == {"a": 1.0}
        composer.switch("a")
        assert same(snapshot(model), before)


def test_values_in_fp64_change_no_other_tensors_bits(model):
    """Nor does an adapter of them with coefficient 0."""
    wide = make_adapter(model, 3)
    wide = Adapter(
        {
            **{n: d for n, d in wide.items()},
            "1.bias": SparseDiff(
                wide["1.bias"].indices, wide["1.bias"].values.double(), wide["1.bias"].shape
            ),
        },
        name="wide",
    )
    adapters = {"a": make_adapter(model, 0), "b": make_adapter(model, 1), "z": wide}
    composer = Composer(model, adapters)
    for coeffs in ({"a": 0.3, "b": -0.7, "z": 0.1}, {"a": 0.3, "b": -0.7, "z": 0.0}):
        composer.switch(coeffs)
        got = snapshot(model)
        composer.revert()
        with ops.backend("reference"):
            plain = Composer(model, adapters)
            plain.switch({n: c for n, c in coeffs.items() if c})
            assert same(snapshot(model), got)
            plain.revert()
