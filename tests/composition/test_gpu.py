"""The same bits on a GPU as on the CPU, and switching without a host copy of the model."""

from __future__ import annotations

import pytest
import torch

from sparseft import Composer, select

pytestmark = pytest.mark.gpu


def on_cpu(bits):
    return {name: tensor.cpu() for name, tensor in bits.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_of_the_cpu(make_model, make_adapter, snapshot, same, dtype):
    here, there = make_model(dtype), make_model(dtype).cuda()
    adapters = {f"n{i}": make_adapter(here, i, scale=3.0, density=0.8) for i in range(3)}
    base = snapshot(there)
    one, other = Composer(here, adapters), Composer(there, adapters)
    for coeffs in ({"n0": 0.3, "n1": -1.1}, {"n0": 2.0, "n1": 0.7}, {"n2": 1, "n1": 0.3, "n0": 1}):
        one.switch(coeffs)
        other.switch(coeffs)
        assert same(snapshot(here), on_cpu(snapshot(there)))
    other.revert()
    assert same(snapshot(there), base)


def test_moved_while_composed(make_model, make_adapter, snapshot, same):
    model = make_model()
    base = snapshot(model)
    composer = Composer(model, {"a": make_adapter(model, 0), "b": make_adapter(model, 1)})
    composer.apply("a")
    model.cuda()
    composer.switch({"a": 0.5, "b": 1})
    composer.revert()
    assert same(on_cpu(snapshot(model)), base)


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_the_same_masks(make_model, method, scope):
    base, tuned = make_model(), make_model(seed=1)
    given = {"base": base} if method == "magnitude" else {}
    here = select(tuned, method, nnz=57, scope=scope, **given)
    there = select(tuned.cuda(), method, nnz=57, scope=scope, **given)
    assert there.equals(here)
    assert all(p.device.type == "cuda" for p in there.values())
