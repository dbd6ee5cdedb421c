"""All-zero rows of dY are skipped in a linear layer's backward, and that changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparseft import attach
from sparseft.ops.live_rows import live_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


# Wide enough that half of the rows being zero pays.
M, N = 512, 640


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finds_the_rows_that_are_not_zero(dtype):
    dy = torch.zeros(12, M, dtype=dtype)
    dy[3, M - 1] = 1e-7 if dtype == torch.float16 else 1e-30
    dy[4, 0] = -1.0
    dy[10] = float("nan")
    assert live_rows(dy, torch.ones(12, N, dtype=dtype)).tolist() == [3, 4, 10]


def test_all_rows_zero():
    assert live_rows(torch.zeros(3, M), torch.ones(3, N)).tolist() == []


@pytest.mark.parametrize(("zeros", "pays"), [(0, False), (1, False), (7, False), (8, True)])
def test_few_zero_rows_are_left_alone(zeros, pays):
    dy = torch.ones(16, M)
    dy[:zeros] = 0
    assert (live_rows(dy, torch.ones(16, N)) is not None) == pays


@pytest.mark.parametrize("shape", [(16, 1024), (1024, 16), (3, 384), (96, 96)])
def test_narrow_layers_never_pay(shape):
    m, n = shape
    assert live_rows(torch.zeros(16, m), torch.ones(16, n)) is None


def test_zero_only_in_the_columns_looked_at_first():
    dy = torch.ones(16, M)
    dy[:, :8] = 0
    assert live_rows(dy, torch.ones(16, N)) is None


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty(shape):
    assert live_rows(torch.zeros(shape), torch.zeros(shape[0], 3)) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_keep_their_rows(value):
    """0 * inf is NaN in the dense gradient, and must be NaN here."""
    x = torch.ones(16, N)
    x[2, 1] = value
    assert live_rows(torch.zeros(16, M), x) is None


def test_an_expanded_gradient():
    dy = torch.zeros(1, M).expand(16, M)
    assert live_rows(dy, torch.ones(16, N)).tolist() == []


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("density", [0.02, 0.9])
def test_gradients_of_a_layer_read_at_one_position(kind, density):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer, dense = (nn.Linear(N, M) if kind == "linear" else Conv1D(M, N) for _ in range(2))
    dense.load_state_dict(layer.state_dict())
    mask = torch.rand(layer.weight.shape) < density
    sparse = attach(layer, {"weight": mask}, full_params=["bias"])
    x = torch.randn(4, 16, N)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    for model, x in zip((layer, dense), inputs, strict=True):
        model(x)[:, 0].square().sum().backward()
    assert torch.equal(inputs[0].grad == 0, inputs[1].grad == 0)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(sparse.leaves["weight"].grad, dense.weight.grad[mask])
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


def test_no_temporary_of_the_operands_size():
    """85 % of 4,000 rows are zero: the rest is copied, and little more."""
    dy, x = torch.zeros(4000, M), torch.randn(4000, N)
    dy[:600] = 1.0
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        assert len(live_rows(dy, x)) == 600
    level = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    assert 0 < peak < 1 << 20  # dy is 8 MiB


def test_skipped_rows_cost_no_product():
    layer = nn.Linear(N, M, bias=False)
    attach(layer, {"weight": torch.rand(M, N) < 0.01})
    x = torch.randn(32, N, requires_grad=True)

    def backward_rows(loss):
        rows = []
        multiply = torch.Tensor.mm

        def spy(a, b):
            rows.append(a.shape[0])
            return multiply(a, b)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "mm", spy)
            loss.backward()
        return rows

    assert backward_rows(layer(x).sum()) == [32]
    assert backward_rows(layer(x)[5:7].sum()) == [2]


def test_tracers_and_transforms_see_every_row():
    dy, x = torch.zeros(16, M), torch.ones(16, N)
    assert live_rows(dy, x) is not None
    with FlopCounterMode(display=False):
        assert live_rows(dy, x) is None
    with torch._subclasses.FakeTensorMode() as mode:
        assert live_rows(mode.from_tensor(dy), mode.from_tensor(x)) is None
    seen = []
    torch.func.vmap(lambda a: seen.append(live_rows(a, x)) or a)(dy.expand(2, 16, M))
    assert seen == [None]
